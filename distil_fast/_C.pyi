"""The doorway to csrc/core.h, whose structs say what the arguments mean. 0 stands for a null pointer."""

from collections.abc import Sequence

from typing_extensions import Buffer as BufferProtocol

Shape = tuple[int, int, int]  # outer, inner, cols
Matrix = tuple[int, int, int, int]  # pointer, dtype, outer stride, row stride
Result = tuple[int, int, float, float]  # fault's kind (0: none), row and value; the gradient's unit

# ignore_index, divergence, its parameters, t_squared, label_smoothing, z_loss, teacher_form, transforms, reduction
RowSettings = tuple[int, int, Sequence[float], bool, float, float, int, Sequence[float], int]

TopK = tuple[int, int, int, float, int, float]  # k, ids, log_probs, tolerance, tail, shift

DIVERGENCES: list[str]

class Buffer(BufferProtocol):
    def __init__(self, size: int) -> None: ...

def row_loss(
    shape: Shape,
    student: Matrix,
    teacher: Matrix | None,
    grad: Matrix | None,
    labels: int,
    soft_mask: int,
    mask_is_bool: bool,
    class_weights: int,
    temperatures: int,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    soft_count: float,
    hard_count: float,
    settings: RowSettings,
    upstream: int,
    loss: int,
    soft: int,
    hard: int,
    topk: TopK | None,
    /,
) -> Result: ...
def rescale(shape: Shape, grad: Matrix, factor: float, /) -> None: ...
def softmax(
    shape: Shape, logits: Matrix, out: Matrix, logarithm: bool, temperatures: int, temperature: float, /
) -> Result: ...
def softmax_backward(
    shape: Shape,
    out: Matrix,
    grad_out: Matrix,
    grad: Matrix,
    logarithm: bool,
    temperatures: int,
    temperature: float,
    /,
) -> None: ...
def pair_loss(
    shape: Shape,
    student: Matrix,
    teacher: Matrix,
    grad: Matrix | None,
    mask: int,
    mask_is_bool: bool,
    kind: int,
    scale: float,
    weight: float,
    count: float,
    reduction: int,
    upstream: int,
    loss: int,
    term: int,
    /,
) -> Result: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str, /) -> bool: ...

# ---- CUDA: there where nvcc was when this was built. A quantity is a number and 0, or a float's address on the device.
# Each launches on a stream (its handle, last) and raises RuntimeError where it cannot.

Quantity = tuple[float, int]

def cuda_devices() -> tuple[int, str]: ...  # how many; where they cannot be asked, 0 and why
def cuda_row_workspace(rows: int, /) -> int: ...
def cuda_row_loss(
    shape: Shape,
    student: Matrix,
    teacher: Matrix | None,
    grad: Matrix | None,
    labels: int,
    soft_mask: int,
    mask_is_bool: bool,
    class_weights: int,
    temperatures: int,
    temperature: Quantity,
    soft_weight: Quantity,
    hard_weight: Quantity,
    soft_count: Quantity,
    hard_count: Quantity,
    settings: RowSettings,
    upstream: int,
    loss: int,
    soft: int,
    hard: int,
    unit: int,
    fault: int,
    workspace: int,
    stream: int,
    topk: TopK | None,
    /,
) -> None: ...
def cuda_rescale(shape: Shape, grad: Matrix, grad_output: int, unit: int, stream: int, /) -> None: ...
def cuda_softmax(
    shape: Shape, logits: Matrix, out: Matrix, logarithm: bool, temperatures: int, temperature: Quantity, stream: int, /
) -> None: ...
def cuda_softmax_backward(
    shape: Shape,
    out: Matrix,
    grad_out: Matrix,
    grad: Matrix,
    logarithm: bool,
    temperatures: int,
    temperature: Quantity,
    stream: int,
    /,
) -> None: ...
def cuda_pair_loss(
    shape: Shape,
    student: Matrix,
    teacher: Matrix,
    grad: Matrix | None,
    mask: int,
    mask_is_bool: bool,
    kind: int,
    scale: float,
    weight: Quantity,
    count: Quantity,
    reduction: int,
    upstream: int,
    loss: int,
    term: int,
    unit: int,
    fault: int,
    workspace: int,
    stream: int,
    /,
) -> None: ...

# ---- a shard of a vocabulary; rows: addresses of temperatures, soft and hard weights; settings: divergence, its
# parameters, label smoothing. Sums and totals are rows of so many doubles.

SHARD_SUMS: int
SHARD_TOTALS: int

def shard_statistics(
    shape: Shape,
    student: Matrix,
    teacher: Matrix | None,
    rows: tuple[int, int, int],
    settings: tuple[int, Sequence[float], float],
    of_teacher: bool,
    maxima: int,
    sums: int,
    /,
) -> None: ...
def shard_divergence(
    shape: Shape,
    student: Matrix,
    teacher: Matrix | None,
    rows: tuple[int, int, int],
    settings: tuple[int, Sequence[float], float],
    totals: int,
    f_g: int,
    /,
) -> None: ...
def shard_gradient(
    shape: Shape,
    student: Matrix,
    teacher: Matrix | None,
    rows: tuple[int, int, int],
    settings: tuple[int, Sequence[float], float],
    totals: int,
    labels: int,
    vocabulary: int,
    grad: Matrix,
    /,
) -> None: ...
