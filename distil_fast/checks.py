"""Argument checks of the public functions: expected, got, remedy, raised before anything runs.

Only what needs no value of a tensor is looked at here, so every check works while torch.compile traces; labels,
token weights and per-row temperatures are checked by the kernels before they read a logit. Next: functional.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("mean", "sum", "none")


def check_values(name: str, tensor: object) -> None:
    """Logits or hidden states [..., size]: a floating-point tensor with at least one column."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}.")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name}: expected float32, float16, bfloat16 or float64, got {tensor.dtype}. Convert it with .float()."
        )
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape [..., size] with size >= 1, got {tuple(tensor.shape)}.")


def check_pair(name: str, student: Tensor, teacher: object, vocab_size: int | None = None) -> None:
    """The teacher's tensor against the student's, already checked: same shape and device, and no gradient.

    With a `vocab_size` the last dimensions may differ."""
    check_values(f"teacher_{name}", teacher)
    assert isinstance(teacher, Tensor)
    if vocab_size is not None and teacher.shape[:-1] == student.shape[:-1]:
        check_vocab_size(vocab_size, min(student.shape[-1], teacher.shape[-1]))
    elif teacher.shape != student.shape:
        raise ValueError(
            f"teacher_{name}: expected student_{name}'s shape {tuple(student.shape)}, got {tuple(teacher.shape)}."
            + _shape_remedy(name, student, teacher)
        )
    if teacher.device != student.device:
        raise ValueError(
            f"teacher_{name}: expected student_{name}'s device {student.device}, got {teacher.device}. "
            f"Move it with .to({str(student.device)!r})."
        )
    if (teacher.dtype == torch.float64) != (student.dtype == torch.float64):
        raise TypeError(
            f"teacher_{name}: expected float64 beside float64 only, got {teacher.dtype} beside {student.dtype}. "
            "Convert one of them; float32, float16 and bfloat16 mix freely."
        )
    if teacher.requires_grad:
        raise ValueError(
            f"teacher_{name} requires grad, and the loss has no gradient for the teacher. Compute it under "
            f"torch.no_grad() or torch.inference_mode(), or pass teacher_{name}.detach()."
        )


def _shape_remedy(name: str, student: Tensor, teacher: Tensor) -> str:
    if name != "logits" or teacher.shape[:-1] != student.shape[:-1]:
        return ""
    shared = min(student.shape[-1], teacher.shape[-1])
    return (
        f" If one vocabulary is padded, cut both to the columns that they share, at most {shared}: with vocab_size "
        f"where the loss has it, or by logits[..., :{shared}]."
    )


def _check_plain(name: str, tensor: Tensor) -> None:
    """A shard of a DTensor is not what its shape says."""
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor. Call the loss inside the forward of the module that FSDP "
            f"wraps, where its weights are whole, or pass {name}.full_tensor(); for heads sharded along the vocabulary "
            "use distil_fast.parallel."
        )


def check_head(name: str, hidden: Tensor, weight: object, bias: object) -> None:
    """Hidden states [..., H] with a head: weights [V, H], bias [V] or None, on one device."""
    check_values(name, hidden)
    prefix = name.removesuffix("hidden")
    for part, tensor, dims in ((f"{prefix}weight", weight, 2), (f"{prefix}bias", bias, 1)):
        if tensor is None and dims == 1:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{part}: expected a tensor, got {type(tensor).__name__}.")
        _check_plain(part, tensor)
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{part}: expected a floating-point tensor, got {tensor.dtype}.")
        expected = ("V", hidden.shape[-1]) if dims == 2 else (weight.shape[0],)  # type: ignore[attr-defined]
        if tensor.dim() != dims or tensor.shape[-1] != expected[-1] or tensor.shape[0] == 0:
            raise ValueError(
                f"{part}: expected shape ({', '.join(map(str, expected))}) beside {name} {tuple(hidden.shape)}, got "
                f"{tuple(tensor.shape)}."
            )
        if tensor.device != hidden.device:
            raise ValueError(f"{part}: expected {name}'s device {hidden.device}, got {tensor.device}.")
        if (tensor.dtype == torch.float64) != (hidden.dtype == torch.float64):
            raise TypeError(
                f"{part}: expected float64 beside float64 only, got {tensor.dtype} beside {hidden.dtype}. Convert one."
            )


def check_teacher_head(hidden: Tensor, weight: object, bias: object, student: Tensor) -> None:
    """A teacher's hidden states and head, beside the student's tensor, already checked."""
    check_head("teacher_hidden", hidden, weight, bias)
    check_constant("teacher_hidden", hidden)
    if hidden.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher_hidden: expected the student's leading shape {tuple(student.shape[:-1])}, got "
            f"{tuple(hidden.shape[:-1])}."
        )
    if hidden.device != student.device:
        raise ValueError(f"teacher_hidden: expected the student's device {student.device}, got {hidden.device}.")
    if (hidden.dtype == torch.float64) != (student.dtype == torch.float64):
        raise TypeError(
            f"teacher_hidden: expected float64 beside float64 only, got {hidden.dtype} beside {student.dtype}."
        )


def check_no_head(teacher: object, weight: object, bias: object) -> None:
    """A teacher that brings its rows, or none, has no head."""
    if weight is not None or bias is not None:
        got = "no teacher" if teacher is None else type(teacher).__name__
        raise ValueError(f"teacher_weight and teacher_bias: expected None beside {got}. Leave them out.")


def check_widths(student: int, teacher: int, vocab_size: int | None) -> None:
    """The heads' vocabularies: equal, or cut by `vocab_size`."""
    if vocab_size is not None:
        check_vocab_size(vocab_size, min(student, teacher))
    elif student != teacher:
        raise ValueError(
            f"expected heads of one vocabulary, got {student} columns of the student's and {teacher} of the teacher's. "
            f"Pass vocab_size, the number of columns that both share (at most {min(student, teacher)})."
        )


def check_some_term(teacher: object, labels: object, name: str) -> None:
    """A loss needs a teacher or labels."""
    if teacher is None and labels is None:
        raise ValueError(f"{name} and labels: expected at least one of them, got None for both, and so no term.")


def check_labels(labels: object, logits: Tensor) -> None:
    """Labels [...] of logits [..., V]: integers on the same device."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor of integers, got {type(labels).__name__}.")
    if labels.dtype not in INTEGERS:
        raise TypeError(f"labels: expected integers, got {labels.dtype}. Convert them with .long().")
    _check_leading("labels", labels, logits)


def check_mask(name: str, mask: object, values: Tensor) -> None:
    """A mask [...] of values [..., size]: bool, or floating-point token weights, on the same device."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(mask).__name__}.")
    if mask.dtype != torch.bool and mask.dtype not in DTYPES:
        raise TypeError(
            f"{name}: expected bool, or non-negative floating-point token weights, got {mask.dtype}. "
            "Convert a mask of zeros and ones with .bool()."
        )
    _check_leading(name, mask, values)
    check_constant(name, mask)


def _check_leading(name: str, tensor: Tensor, values: Tensor) -> None:
    if tensor.shape != values.shape[:-1]:
        raise ValueError(
            f"{name}: expected shape {tuple(values.shape[:-1])}, one entry per row of {tuple(values.shape)}, "
            f"got {tuple(tensor.shape)}."
        )
    if tensor.device != values.device:
        raise ValueError(
            f"{name}: expected device {values.device}, got {tensor.device}. Move it with .to({str(values.device)!r})."
        )


def check_constant(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name} requires grad, and the loss has no gradient for it. Pass {name}.detach().")


def check_quantity(name: str, quantity: object, values: Tensor) -> float | Tensor:
    """A weight or a count: a finite number, or a 0-d tensor on the same device. A number comes back as a float."""
    if not isinstance(quantity, Tensor):
        number = _as_float(name, quantity)
        if not -math.inf < number < math.inf or (name.endswith("count") and number < 0):
            expected = "a finite number >= 0" if name.endswith("count") else "a finite number"
            raise ValueError(f"{name}: expected {expected}, got {quantity}.")
        return number
    if quantity.dim() != 0:
        raise ValueError(f"{name}: expected a number or a 0-d tensor, got shape {tuple(quantity.shape)}.")
    return _checked_scalar(name, quantity, values)


def check_count(name: str, count: object, values: Tensor) -> float | Tensor:
    """A denominator as `check_quantity` has it; None, counted by the kernels, comes back as -1."""
    return -1.0 if count is None else check_quantity(name, count, values)


def check_temperature(temperature: object, values: Tensor) -> float | Tensor:
    """A number > 0, or a tensor: 0-d, or one temperature per row."""
    if not isinstance(temperature, Tensor):
        number = _as_float("temperature", temperature)
        if not 1e-15 <= number <= 1e15:
            raise ValueError(f"temperature: expected a number > 0 (1e-15 to 1e15), got {temperature}.")
        return number
    if temperature.dim() and temperature.shape != values.shape[:-1]:
        raise ValueError(
            f"temperature: expected a number, or one per row with shape {tuple(values.shape[:-1])}, "
            f"got shape {tuple(temperature.shape)}."
        )
    return _checked_scalar("temperature", temperature, values)


def _as_float(name: str, quantity: object) -> float:
    if type(quantity) is float:
        return quantity  # as nearly always: this is paid in every call
    if isinstance(quantity, int) and not -(2**1023) < quantity < 2**1023:
        return math.inf  # float() would overflow
    try:
        if not isinstance(quantity, (str, bytes)):  # which float() would parse
            return float(quantity)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name}: expected a number or a tensor, got {type(quantity).__name__}.")


def _checked_scalar(name: str, tensor: Tensor, values: Tensor) -> Tensor:
    check_constant(name, tensor)
    if tensor.is_complex():
        raise TypeError(f"{name}: expected a real tensor, got {tensor.dtype}.")
    if tensor.device != values.device:
        raise ValueError(
            f"{name}: expected a number or a tensor on {values.device}, got one on {tensor.device}. "
            f"Move it with .to({str(values.device)!r})."
        )
    return tensor


def check_reduction(reduction: str, **counts: object) -> None:
    """One of mean, sum, none; the counts only go with mean."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}.")
    for name, count in counts.items():
        if count is not None and reduction != "mean":
            raise ValueError(
                f"{name}: expected reduction='mean', whose denominator it is, got {reduction!r}. "
                "Leave it out, and divide the result yourself."
            )


def check_label_smoothing(label_smoothing: object) -> float:
    """A number in [0, 1]."""
    number = _as_float("label_smoothing", label_smoothing)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}.")
    return number


def check_positive(name: str, quantity: object) -> float:
    """A logit scale or a softcap: a number above 0, such that their quotient and its products stay in a float."""
    number = _as_float(name, quantity)
    if not 1e-15 <= number <= 1e15:
        raise ValueError(f"{name}: expected a number > 0 (1e-15 to 1e15), got {quantity}.")
    return number


def check_z_loss(z_loss: object) -> float:
    """A finite number >= 0."""
    number = _as_float("z_loss", z_loss)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"z_loss: expected a finite number >= 0, got {z_loss}.")
    return number


def check_class_weights(class_weights: object, values: Tensor, cols: int, label_smoothing: float) -> None:
    """Weights [V] of the labels' classes, on the same device; their values are seen by the kernels."""
    if class_weights is None:
        return
    if not isinstance(class_weights, Tensor) or class_weights.dtype not in DTYPES:
        got = class_weights.dtype if isinstance(class_weights, Tensor) else type(class_weights).__name__
        raise TypeError(f"class_weights: expected a floating-point tensor, got {got}.")
    if class_weights.shape != (cols,):
        raise ValueError(
            f"class_weights: expected shape ({cols},), one weight a class, got {tuple(class_weights.shape)}."
        )
    if class_weights.device != values.device:
        raise ValueError(
            f"class_weights: expected device {values.device}, got {class_weights.device}. "
            f"Move it with .to({str(values.device)!r})."
        )
    check_constant("class_weights", class_weights)
    if label_smoothing:
        raise ValueError(
            "class_weights: expected label_smoothing=0 beside them, got both, on whose meaning libraries differ. "
            "Use one of the two."
        )


def check_vocab_size(vocab_size: object, cols: int) -> int:
    """How many of `cols` columns take part; 0 stands for all."""
    if vocab_size is None:
        return 0
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
        raise TypeError(f"vocab_size: expected an integer, got {type(vocab_size).__name__}.")
    if not 1 <= vocab_size <= cols:
        raise ValueError(f"vocab_size: expected 1 to {cols}, the columns that both models have, got {vocab_size}.")
    return vocab_size


def check_chunk_bytes(chunk_bytes: object) -> int:
    """The memory for a chunk of a fused head; 0 stands for the device's own."""
    if chunk_bytes is None:
        return 0
    if not isinstance(chunk_bytes, int) or isinstance(chunk_bytes, bool):
        raise TypeError(f"chunk_bytes: expected an integer, got {type(chunk_bytes).__name__}.")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: expected a number of bytes >= 1, or None, got {chunk_bytes}.")
    return chunk_bytes


def check_topk(ids: object, log_probs: object, tail: str, tails: tuple[str, ...], student: Tensor) -> None:
    """A top-k teacher against the student's logits [..., V]: ids and log-probabilities [..., k], k >= 1."""
    if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"TopK.ids: expected a tensor of integers, got {got}. Convert them with .long().")
    if ids.dim() == 0 or ids.shape[:-1] != student.shape[:-1] or ids.shape[-1] == 0:
        raise ValueError(
            f"TopK.ids: expected shape {(*student.shape[:-1], 'k')} with k >= 1, the leading shape of student_logits "
            f"{tuple(student.shape)}, got {tuple(ids.shape)}. Pad rows of fewer entries with -1."
        )
    if not isinstance(log_probs, Tensor) or log_probs.dtype not in DTYPES:
        got = log_probs.dtype if isinstance(log_probs, Tensor) else type(log_probs).__name__
        raise TypeError(f"TopK.log_probs: expected a floating-point tensor, got {got}.")
    if log_probs.shape != ids.shape:
        raise ValueError(
            f"TopK.log_probs: expected the shape of TopK.ids {tuple(ids.shape)}, got {tuple(log_probs.shape)}."
        )
    if log_probs.dtype == torch.float64 and student.dtype != torch.float64:
        raise TypeError(
            f"TopK.log_probs: expected float64 beside float64 only, got it beside {student.dtype}. "
            "Convert them with .float()."
        )
    for name, tensor in (("ids", ids), ("log_probs", log_probs)):
        if tensor.device != student.device:
            raise ValueError(
                f"TopK.{name}: expected student_logits' device {student.device}, got {tensor.device}. "
                f"Move it with .to({str(student.device)!r})."
            )
    check_constant("TopK.log_probs", log_probs)
    if tail not in tails:
        raise ValueError(f"TopK.tail: expected one of {', '.join(tails)}, got {tail!r}.")


def check_ignore_index(ignore_index: object) -> int:
    """An integer that a label can be."""
    if not isinstance(ignore_index, int) or not -(2**63) <= ignore_index < 2**63:
        raise TypeError(f"ignore_index: expected an integer of 64 bits, got {ignore_index!r}.")
    return ignore_index
