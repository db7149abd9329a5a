"""The CUDA kernels, from tensors to pointers: outputs and workspace, the stream, scalars that may stand on the device.

Each function computes exactly one op of ops.py, from arguments that functional.py has checked, and waits for nothing:
it launches kernels on the current stream and returns. It knows nothing of autograd, and no formula. Next: native.py,
its twin on the CPU; csrc/core.h.
"""

from __future__ import annotations

import torch  # before _C: see native.py
from torch import Tensor

from distil_fast import _C
from distil_fast.backends.gpu import DTYPES, check_temperature, on_device_of, raise_if_checking
from distil_fast.backends.layout import (
    PAIR_CODE,
    REDUCTION_CODE,
    address,
    check_inplace,
    cut,
    cut_gradient,
    flat,
    geometry,
    topk_tolerance,
)
from distil_fast.backends.native import row_settings
from distil_fast.backends.settings import TAILS, RowSettings

OLDEST = (8, 0)  # compute capability


def available(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether these kernels serve such tensors, and why or why not in a sentence."""
    if device.type != "cuda" or torch.version.hip:
        return False, "the CUDA kernels are for NVIDIA's GPUs"
    if dtype not in DTYPES:
        return False, f"the CUDA kernels have no {str(dtype).removeprefix('torch.')}"
    if not hasattr(_C, "cuda_devices"):
        return False, "distil_fast was built without CUDA: install it anew where nvcc is on the PATH"
    count, why = _C.cuda_devices()
    if not count:
        return False, f"CUDA finds no device: {why or 'there is none'}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return False, f"the CUDA kernels need compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    return True, f"the CUDA kernels, on compute capability {capability[0]}.{capability[1]}"


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _unit(student: Tensor, grad: Tensor | None) -> Tensor | None:
    """Where the kernels write the unit of an fp16 gradient."""
    if grad is None or student.dtype != torch.float16:
        return None
    return student.new_empty((), dtype=torch.float32)


class _Scalars:
    """Numbers as they are, tensors by their address on the device; keeps alive what was converted."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kept: list[Tensor] = []

    def __call__(self, quantity: float | Tensor) -> tuple[float, int]:
        if not isinstance(quantity, Tensor):
            return quantity, 0
        self.kept.append(quantity.to(self.device, torch.float32, non_blocking=True))
        return 0.0, self.kept[-1].data_ptr()

    def temperature(self, temperature: float | Tensor) -> tuple[int, tuple[float, int]]:
        """Per-row temperatures, or one for all."""
        if not isinstance(temperature, Tensor) or not temperature.dim():
            return 0, self(temperature)
        rows = flat(temperature, torch.float32)
        assert rows is not None
        self.kept.append(rows)
        return rows.data_ptr(), (1.0, 0)


# ------------------------------------------------------------------------------------------------ the ops


def row_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    soft_mask: Tensor | None,
    class_weights: Tensor | None,
    temperature: float | Tensor,
    soft_weight: float | Tensor,
    hard_weight: float | Tensor,
    soft_count: float | Tensor,
    hard_count: float | Tensor,
    settings: RowSettings,
    *,
    gradient: str = "no",
    upstream: Tensor | None = None,
    topk: tuple[int, int, int, float, int, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float | Tensor]:
    """Loss, its two terms, the student's gradient and the unit that it is stored in (fp16: a tensor; else 1.0).

    A count of -1 is counted here. gradient: "no", "fresh", or "inplace", which leaves it where the logits were;
    `upstream` multiplies each row's. topk: the top-k teacher as the core takes it (`topk_loss`).
    """
    if gradient == "inplace":
        check_inplace(student, teacher)
    grad = None
    if gradient != "no":
        grad = student if gradient == "inplace" else torch.empty_like(student, memory_format=torch.contiguous_format)
    part = cut(settings.vocab_size, student, teacher)
    shape, (student_m, teacher_m, grad_m) = geometry(*part, cut_gradient(settings.vocab_size, grad))
    leading = student.shape[:-1] if settings.reduction == "none" else ()
    loss, soft, hard = (student.new_empty(leading, dtype=torch.float32) for _ in range(3))
    unit = _unit(student, grad)
    if shape[0] * shape[1] * shape[2] == 0:
        return loss.zero_(), soft.zero_(), hard.zero_(), grad, 1.0 if unit is None else unit.fill_(1.0)
    labels = flat(labels, torch.int64)
    mask_is_bool = soft_mask is not None and soft_mask.dtype == torch.bool
    soft_mask = flat(soft_mask, torch.bool if mask_is_bool else torch.float32)
    class_weights = flat(class_weights, torch.float32)
    if upstream is not None:
        upstream = flat(upstream.expand(student.shape[:-1]), torch.float32)
    scalars = _Scalars(student.device)
    workspace = student.new_empty(_C.cuda_row_workspace(shape[0] * shape[1]), dtype=torch.float32)
    fault = student.new_empty(3, dtype=torch.float64)
    with on_device_of(student):
        _C.cuda_row_loss(
            shape,
            student_m,
            teacher_m,
            grad_m,
            address(labels),
            address(soft_mask),
            mask_is_bool,
            address(class_weights),
            *scalars.temperature(temperature),
            scalars(soft_weight),
            scalars(hard_weight),
            scalars(soft_count),
            scalars(hard_count),
            row_settings(settings),
            address(upstream),
            loss.data_ptr(),
            soft.data_ptr(),
            hard.data_ptr(),
            address(unit),
            fault.data_ptr(),
            workspace.data_ptr(),
            _stream(student),
            topk,
        )
    raise_if_checking(fault, shape[2], "soft_mask")
    return loss, soft, hard, grad, 1.0 if unit is None else unit


def topk_loss(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    soft_mask: Tensor | None,
    class_weights: Tensor | None,
    temperature: float | Tensor,
    soft_weight: float | Tensor,
    hard_weight: float | Tensor,
    soft_count: float | Tensor,
    hard_count: float | Tensor,
    settings: RowSettings,
    shift: float,
    tail: str,
    *,
    gradient: str = "no",
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float | Tensor]:
    """`row_loss` with a teacher of k columns a row; shift: the divergence's."""
    rows = labels, soft_mask, class_weights
    scalars = temperature, soft_weight, hard_weight, soft_count, hard_count
    tolerance = topk_tolerance(log_probs)
    ids, log_probs = flat(ids, torch.int64), flat(log_probs, torch.float32)
    topk = ids.shape[-1], address(ids), address(log_probs), tolerance, TAILS.index(tail), shift
    return row_loss(student, None, *rows, *scalars, settings, gradient=gradient, upstream=upstream, topk=topk)


def rescale(grad: Tensor, grad_output: Tensor, unit: float | Tensor) -> None:
    """grad *= grad_output * unit, in place; nothing is touched where the product is 1."""
    shape, (grad_m,) = geometry(grad)
    if shape[0] * shape[1] * shape[2] == 0:
        return
    scalars = _Scalars(grad.device)
    if not isinstance(unit, Tensor) and unit != 1.0:
        grad_output = grad_output * unit
    with on_device_of(grad):
        _C.cuda_rescale(
            shape,
            grad_m,
            scalars(grad_output)[1],
            address(unit) if isinstance(unit, Tensor) else 0,
            _stream(grad),
        )


def softmax(logits: Tensor, temperature: float | Tensor, logarithm: bool) -> Tensor:
    """softmax(logits / temperature), or its logarithm, in the logits' dtype."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    shape, (logits_m, out_m) = geometry(logits, out)
    check_temperature(temperature)
    if shape[0] * shape[1] * shape[2]:
        scalars = _Scalars(logits.device)
        with on_device_of(logits):
            _C.cuda_softmax(shape, logits_m, out_m, logarithm, *scalars.temperature(temperature), _stream(logits))
    return out


def softmax_backward(out: Tensor, grad_out: Tensor, temperature: float | Tensor, logarithm: bool) -> Tensor:
    """The logits' gradient from the output and its gradient."""
    grad = torch.empty_like(out, memory_format=torch.contiguous_format)
    grad_out = grad_out.contiguous()  # upstream gradients come with any strides
    shape, (out_m, grad_out_m, grad_m) = geometry(out, grad_out, grad)
    if shape[0] * shape[1] * shape[2]:
        scalars = _Scalars(out.device)
        with on_device_of(out):
            _C.cuda_softmax_backward(
                shape, out_m, grad_out_m, grad_m, logarithm, *scalars.temperature(temperature), _stream(out)
            )
    return grad


def pair_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    weight: float | Tensor,
    count: float | Tensor,
    kind: str,
    scale: float,
    reduction: str,
    *,
    gradient: bool = False,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, float | Tensor]:
    """Weighted loss, the term before its weight, the student's gradient and the unit that it is stored in.

    kind: what csrc/core.h compares two rows by; scale: of a row's value, in (0, 1].
    """
    grad = torch.empty_like(student, memory_format=torch.contiguous_format) if gradient else None
    shape, (student_m, teacher_m, grad_m) = geometry(student, teacher, grad)
    leading = student.shape[:-1] if reduction == "none" else ()
    loss, term = (student.new_empty(leading, dtype=torch.float32) for _ in range(2))
    unit = _unit(student, grad)
    if shape[0] * shape[1] * shape[2] == 0:
        return loss.zero_(), term.zero_(), grad, 1.0 if unit is None else unit.fill_(1.0)
    mask_is_bool = mask is not None and mask.dtype == torch.bool
    mask = flat(mask, torch.bool if mask_is_bool else torch.float32)
    if upstream is not None:
        upstream = flat(upstream.expand(student.shape[:-1]), torch.float32)
    scalars = _Scalars(student.device)
    workspace = student.new_empty(_C.cuda_row_workspace(shape[0] * shape[1]), dtype=torch.float32)
    fault = student.new_empty(3, dtype=torch.float64)
    with on_device_of(student):
        _C.cuda_pair_loss(
            shape,
            student_m,
            teacher_m,
            grad_m,
            address(mask),
            mask_is_bool,
            PAIR_CODE[kind],
            scale,
            scalars(weight),
            scalars(count),
            REDUCTION_CODE[reduction],
            address(upstream),
            loss.data_ptr(),
            term.data_ptr(),
            address(unit),
            fault.data_ptr(),
            workspace.data_ptr(),
            _stream(student),
        )
    raise_if_checking(fault, shape[2], "mask")
    return loss, term, grad, 1.0 if unit is None else unit
