"""The other libraries' losses, each from the same inputs as ours and at its best documented setting.

Each is imported when it is asked for, and one that is absent, or has no such kernel for this device, says so. Where a
library leaves out a factor of the loss, the factor is multiplied in here, so that everyone answers the same question.
It knows nothing of time or truth. Next: contenders.py, which asks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from distil_fast.bench.formulas import BETA
from distil_fast.bench.linear import (
    LinearCrossEntropy,
    LinearJSD,
    LinearKL,
    LinearKLAndCrossEntropy,
    LinearProblem,
)
from distil_fast.bench.problem import HARD_WEIGHT, SOFT_WEIGHT, Function, Problem
from distil_fast.bench.problems import (
    KL,
    CrossEntropy,
    Divergence,
    JensenShannon,
    KLAndCrossEntropy,
    LossProblem,
    ReverseKL,
    SoftCrossEntropy,
)

ABSENT = "not available"  # how the reason begins where the machine lacks something
TORCHTUNE_CHUNKS = 8  # torchtune's default
QUACK_ROWS = 8  # by which its chunks of rows must divide


class UnavailableError(Exception):
    """This contender does not run on this machine; the message says why."""


def _not_installed(distribution: str) -> UnavailableError:
    return UnavailableError(f"{ABSENT}: {distribution} is not installed")


def _no_kernel(library: str, problem: Problem) -> UnavailableError:
    return UnavailableError(f"{ABSENT}: {library} has no kernel of {type(problem).__name__}")


def _needs_gpu(what: str, device: str) -> None:
    if device != "cuda":
        raise UnavailableError(f"{ABSENT}: {what} runs on GPUs alone, and this case is on a {device}")


def _beta(problem: Problem) -> float | None:
    """Where TRL's and Liger's generalised divergence is this one; None if nowhere."""
    if isinstance(problem, JensenShannon | LinearJSD):
        return BETA
    if isinstance(problem, ReverseKL):
        return 1.0
    return 0.0 if isinstance(problem, KL | LinearKL) else None


def _scale(problem: LossProblem | LinearKL) -> float:
    """T^2 where the problem has it: neither TRL nor Liger does."""
    return problem.temperature**2 if getattr(problem, "t_squared", False) else 1.0


# ------------------------------------------------------------------------------------------------ Liger


def liger(problem: Problem, device: str) -> Function:
    """Liger's kernels from logits (its JSD of log_softmax, its cross-entropy); its chunked distillation of heads."""
    if isinstance(problem, LinearProblem):
        return _liger_chunked(problem)
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss, LigerJSD
    except ImportError:
        raise _not_installed("liger-kernel") from None
    _needs_gpu("Liger's loss of logits", device)
    cross_entropy = LigerCrossEntropyLoss()
    if isinstance(problem, CrossEntropy):
        return lambda s, _, y: cross_entropy(s, y)
    mixed = isinstance(problem, KLAndCrossEntropy)
    beta = 0.0 if mixed else _beta(problem)
    if beta is None or not isinstance(problem, LossProblem):
        raise _no_kernel("Liger", problem)
    jsd, t, chosen = LigerJSD(beta=beta), problem.temperature, problem.chosen

    def soft(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = (F.log_softmax(chosen(logits) / t, -1) for logits in (student, teacher))
        return jsd(log_q, log_p) * (t**2 if mixed else _scale(problem))

    if mixed:
        return lambda s, t, y: soft(s, t) * SOFT_WEIGHT + cross_entropy(s, y) * HARD_WEIGHT
    return lambda s, t, _: soft(s, t)


def _liger_chunked(problem: LinearProblem) -> Function:
    """Liger's chunked distillation, compiled, at its default chunk of 1024 rows: plain torch, on any device."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        raise _not_installed("liger-kernel") from None
    t = problem.temperature
    if isinstance(problem, LinearKLAndCrossEntropy):
        return LigerFusedLinearJSDLoss(HARD_WEIGHT, SOFT_WEIGHT * t**2, beta=0.0, temperature=t)
    beta = _beta(problem)
    if beta is None or not isinstance(problem, LinearKL):
        raise _no_kernel("Liger's chunked distillation", problem)
    return LigerFusedLinearJSDLoss(0.0, _scale(problem), beta=beta, temperature=t)


def liger_triton(problem: Problem, device: str) -> Function:
    """Liger's fused heads in Triton: its JSD, and its cross-entropy."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD
    except ImportError:
        raise _not_installed("liger-kernel") from None
    _needs_gpu("Liger's fused head in Triton", device)
    if isinstance(problem, LinearCrossEntropy):
        loss = LigerFusedLinearCrossEntropyLoss()
        return lambda hidden, weight, teacher, head, labels: loss(weight, hidden, labels)
    beta = _beta(problem)
    if beta is None or not isinstance(problem, LinearKL):
        raise _no_kernel("Liger's Triton", problem)
    jsd, scale = LigerFusedLinearJSD(jsd_beta=beta, temperature=problem.temperature), _scale(problem)
    return lambda *inputs: jsd(*inputs) * scale


# ------------------------------------------------------------------------------------------------ TRL and torchtune


def trl(problem: Problem, device: str) -> Function:
    """TRL's generalised JSD of logits, and its chunked divergence of hidden states."""
    if isinstance(problem, LinearProblem):
        return _trl_chunked(problem)
    beta = _beta(problem)
    if beta is None or not isinstance(problem, Divergence):
        raise _no_kernel("TRL", problem)
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError:
        raise _not_installed("trl (with trl.experimental.gkd)") from None
    scale, t, everyone = _scale(problem), problem.temperature, problem.mask is None

    def jsd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = GKDTrainer.generalized_jsd_loss(
            student, teacher, labels=None if everyone else labels, beta=beta, temperature=t
        )
        return loss * scale

    return jsd


def _trl_chunked(problem: LinearProblem) -> Function:
    beta = _beta(problem)
    if beta is None or not isinstance(problem, LinearKL):
        raise _no_kernel("TRL's chunked divergence", problem)
    try:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss
    except ImportError:
        raise _not_installed("a trl that has a chunked divergence") from None
    scale, t = _scale(problem), problem.temperature

    def chunked(hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        mask = (labels != -100).unsqueeze(0)
        found = _chunked_divergence_loss(
            hidden.unsqueeze(0), teacher.unsqueeze(0), weight, head, mask, beta, temperature=t
        )
        return found[0] * scale

    return chunked


def torchtune(problem: Problem, device: str) -> Function:
    """torchtune's distillation losses of whole logits; its forward KL is the cross-entropy of soft targets."""
    return _torchtune(problem, "")


def torchtune_chunked(problem: Problem, device: str) -> Function:
    """The same, cast to float32 chunk by chunk."""
    return _torchtune(problem, "WithChunkedOutput")


def _torchtune(problem: Problem, chunked: str) -> Function:
    names: dict[type[Problem], str] = {SoftCrossEntropy: "ForwardKL", ReverseKL: "ReverseKL"}
    name = names.get(type(problem))
    if name is None or getattr(problem, "temperature", None) != 1.0:
        raise _no_kernel("torchtune", problem)
    try:
        from torchtune.modules import loss as losses
    except ImportError:
        raise _not_installed("torchtune") from None
    loss: Callable[..., Tensor] = getattr(losses, f"{name}{chunked}Loss")()
    if not chunked:
        return loss

    def in_chunks(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        batch = (values.unsqueeze(0) for values in (student, teacher))
        return loss(*(list(values.chunk(TORCHTUNE_CHUNKS, dim=1)) for values in batch), labels.unsqueeze(0))

    return in_chunks


# ------------------------------------------------------------------------------------------------ fla, cce, quack


def fla(problem: Problem, device: str) -> Function:
    """flash-linear-attention's fused heads: its KL at T = 1, and its cross-entropy."""
    try:
        from fla.modules import fused_kl_div, fused_linear_cross_entropy
    except ImportError:
        raise _not_installed("flash-linear-attention") from None
    _needs_gpu("fla", device)
    if isinstance(problem, LinearCrossEntropy):
        loss = fused_linear_cross_entropy.FusedLinearCrossEntropyLoss()
        return lambda hidden, weight, teacher, head, labels: loss(hidden, labels, weight)
    if _beta(problem) != 0.0 or not isinstance(problem, LinearKL) or problem.temperature != 1.0:
        raise _no_kernel("fla", problem)
    kl, rows = fused_kl_div.FusedKLDivLoss(), problem.rows

    def divergence(hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor, _: Tensor) -> Tensor:
        of_student, of_teacher = (hidden, teacher) if rows is None else (hidden[rows], teacher[rows])
        found: Tensor = kl(of_student, of_teacher, weight, head)
        return found

    return divergence


def cut_cross_entropy(problem: Problem, device: str) -> Function:
    """Apple's cut cross-entropy: its Triton kernel on a GPU, else its implementation by torch.compile."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        raise _not_installed("cut-cross-entropy") from None
    if not isinstance(problem, LinearCrossEntropy):
        raise _no_kernel("cut-cross-entropy", problem)
    how = "cce" if device == "cuda" else "torch_compile"
    return lambda hidden, weight, teacher, head, labels: linear_cross_entropy(hidden, weight, labels, impl=how)


def quack(problem: Problem, device: str) -> Function:
    """QuACK's cross-entropy of logits, and of hidden states in chunks."""
    try:
        from quack.cross_entropy import cross_entropy
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
    except ImportError:
        raise _not_installed("quack-kernels") from None
    _needs_gpu("QuACK", device)
    if isinstance(problem, CrossEntropy):
        return lambda s, _, y: cross_entropy(s, y, reduction="mean")
    if not isinstance(problem, LinearCrossEntropy) or problem.case.rows % QUACK_ROWS:
        raise _no_kernel("QuACK", problem)
    return lambda hidden, weight, teacher, head, labels: chunked_linear_cross_entropy(hidden, weight, labels)


PEERS: dict[str, Callable[[Problem, str], Function]] = {
    "liger": liger,
    "liger triton": liger_triton,
    "trl": trl,
    "torchtune": torchtune,
    "torchtune chunked": torchtune_chunked,
    "fla": fla,
    "cut-cross-entropy": cut_cross_entropy,
    "quack": quack,
}
