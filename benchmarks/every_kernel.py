"""Runs every kernel once on small odd shapes, and the long rows that take a path of their own:

    DISTIL_FAST_BACKEND=cuda compute-sanitizer python benchmarks/every_kernel.py

For tools that watch memory; the results are compared with the reference too, since it costs nothing here. It knows
the public functions alone. Next: on_device.py, which runs it under each tool.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

import distil_fast
from distil_fast import LogProbs, Probs, TopK, reference
from distil_fast.reference_topk import topk_loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT, LONG = (1, 7, 1003), (30522, 151936)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def rows(device: str, dtype: torch.dtype, cols: int, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels; the rows lie apart, and none begins at a multiple of 16 bytes."""
    wide = torch.randn(2, count, cols + 3, generator=torch.Generator().manual_seed(cols)).to(dtype).to(device)
    labels = torch.arange(count, device=device) % cols
    labels[-1] = -100
    student, teacher = wide[..., 1 : cols + 1]
    return student, teacher, labels


def calls(device: str, dtype: torch.dtype, cols: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What was asked for, and the gradients or outputs of kernel and reference."""
    student, teacher, labels = rows(device, dtype, cols)
    temperatures = torch.tensor([1.0, 2.0, 3.7], device=device)
    for divergence in reference.DIVERGENCES:
        for reduction in ("mean", "none"):

            def loss(functions: object, s: Tensor, how: str = reduction, by: object = divergence) -> Tensor:
                found = functions.distillation_loss(  # type: ignore[attr-defined]
                    s, teacher, labels, temperature=temperatures, divergence=by, label_smoothing=0.1, reduction=how
                )
                return found.loss.sum()

            yield f"{divergence} {reduction}", gradient(loss, distil_fast, student), gradient(loss, reference, student)
    yield from options(student, teacher, labels)
    for name in ("softmax", "log_softmax"):

        def squares(functions: object, s: Tensor, which: str = name) -> Tensor:
            return getattr(functions, which)(s, temperatures).float().square().mean(-1).sum()

        yield name, gradient(squares, distil_fast, student), gradient(squares, reference, student)

    def cosine(functions: object, s: Tensor) -> Tensor:
        return 0.25 * functions.cosine_loss(s, teacher, labels >= 0)  # type: ignore[attr-defined]

    yield "cosine", gradient(cosine, distil_fast, student), gradient(cosine, reference, student)
    others = teacher.softmax(-1)
    for kind in ("mse", "kl"):

        def attention(functions: object, s: Tensor, which: str = kind) -> Tensor:
            maps = s.softmax(-1).view(1, 1, *s.shape), others.view(1, 1, *s.shape)
            mask = (labels >= 0).unsqueeze(0)
            return functions.attention_loss(*((m,) for m in maps), mask, kind=which)  # type: ignore[attr-defined]

        yield f"attention {kind}", gradient(attention, distil_fast, student), gradient(attention, reference, student)

    def logits(functions: object, s: Tensor) -> Tensor:
        return 0.25 * functions.logit_mse(s, teacher, labels >= 0)  # type: ignore[attr-defined]

    yield "logit mse", gradient(logits, distil_fast, student), gradient(logits, reference, student)


def options(student: Tensor, teacher: Tensor, labels: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The row loss with what not every call has: transforms, forms of teacher, the hard term's options, the top k."""
    cols = student.shape[-1]
    capped = {"student_softcap": 5.0, "teacher_softcap": 7.0, "student_logit_scale": 0.7, "z_loss": 1e-3}
    weighted = {"class_weights": torch.linspace(0.5, 2.0, cols, device=student.device)}
    log_probs = (teacher.float() / 2.0).log_softmax(-1) - 0.01
    forms = (("logits", teacher), ("log_probs", LogProbs(log_probs)), ("probs", Probs(log_probs.exp())))
    for settings in (capped, weighted):
        for form, given in forms:
            if form != "logits":
                settings = {name: value for name, value in settings.items() if not name.startswith("teacher")}

            def loss(s: Tensor, by: object = given, how: dict[str, object] = settings) -> Tensor:
                return distil_fast.distillation_loss(s, by, labels, **how).loss  # type: ignore[arg-type]

            def exact(s: Tensor, by: object = given, how: dict[str, object] = settings, form: str = form) -> Tensor:
                values = getattr(by, form, by)
                return reference.distillation_loss(s, values, labels, teacher_form=form, **how).loss

            yield f"{form} {list(settings)}", of(loss, student), of(exact, student)
    for tail in ("bucket", "renormalise", "ignore"):
        top = TopK.from_logits(teacher, min(40, cols), 2.0, tail)

        def few(s: Tensor, top: TopK = top) -> Tensor:
            return distil_fast.distillation_loss(s, top, labels).loss

        def exactly(s: Tensor, top: TopK = top) -> Tensor:
            return topk_loss(s, top.ids, top.log_probs, labels, tail=top.tail).loss

        yield f"top-k {tail}", of(few, student), of(exactly, student)


def of(loss: object, student: Tensor) -> Tensor:
    """The gradient of a function of the student alone."""
    return gradient(lambda _, s: loss(s), None, student)  # type: ignore[operator]


def gradient(loss: object, functions: object, student: Tensor) -> Tensor:
    leaf = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    (grad,) = torch.autograd.grad(loss(functions, leaf), leaf)  # type: ignore[operator]
    return grad


def main() -> None:
    parser = argparse.ArgumentParser(description="Every kernel of a backend, once.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--short", action="store_true", help="short rows only")
    arguments = parser.parse_args()
    count = 0
    for dtype in DTYPES:
        for cols in SHORT if arguments.short else (*SHORT, *LONG):
            for name, ours, exact in calls(arguments.device, dtype, cols):
                error = float((ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-12))
                if not error <= TOLERANCE[dtype] and float(exact.double().norm()) > 1e-6:
                    raise SystemExit(f"{name}, {dtype}, V = {cols}: relative error {error:.1e}")
                count += 1
    print(f"{count} calls agree with the reference")


if __name__ == "__main__":
    main()
