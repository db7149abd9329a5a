"""The doorway to csrc/core.h, whose structs say what the arguments mean. 0 stands for a null pointer."""

from typing_extensions import Buffer as BufferProtocol

Shape = tuple[int, int, int]  # outer, inner, cols
Matrix = tuple[int, int, int, int]  # pointer, dtype, outer stride, row stride
Result = tuple[int, int, float, float]  # fault's kind (0: none), row and value; the gradient's unit

DIVERGENCES: list[str]

class Buffer(BufferProtocol):
    def __init__(self, size: int) -> None: ...

def row_loss(
    shape: Shape,
    student: Matrix,
    teacher: Matrix | None,
    grad: Matrix | None,
    labels: int,
    ignore_index: int,
    soft_mask: int,
    mask_is_bool: bool,
    temperatures: int,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    soft_count: float,
    hard_count: float,
    t_squared: bool,
    reduction: int,
    label_smoothing: float,
    divergence: int,
    parameter: float,
    upstream: int,
    loss: int,
    soft: int,
    hard: int,
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
def cosine_loss(
    shape: Shape,
    student: Matrix,
    teacher: Matrix,
    grad: Matrix | None,
    mask: int,
    mask_is_bool: bool,
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
