"""distil_fast: knowledge-distillation losses in one fused pass, exact, forward and gradient.

`functional` holds the functions, `modules` their nn.Module faces, `reference` the same in plain torch.
"""

from distil_fast.functional import (
    cosine_loss,
    cross_entropy,
    distillation_loss,
    divergence_loss,
    log_softmax,
    softmax,
    triple_loss,
)
from distil_fast.modules import (
    CosineLoss,
    CrossEntropyLoss,
    DistillationLoss,
    DivergenceLoss,
    TripleLoss,
    VocabParallelCrossEntropyLoss,
    VocabParallelDistillationLoss,
    VocabParallelDivergenceLoss,
    VocabParallelLinearDistillationLoss,
)
from distil_fast.parallel import (
    vocab_parallel_cross_entropy,
    vocab_parallel_distillation_loss,
    vocab_parallel_divergence_loss,
    vocab_parallel_linear_distillation_loss,
)
from distil_fast.reference import (
    JSD,
    AlphaBeta,
    ForwardKL,
    Hellinger,
    LossTerms,
    ReverseKL,
    SkewedKL,
    SkewedReverseKL,
    SoftCrossEntropy,
    TotalVariation,
    TripleTerms,
)
from distil_fast.teachers import Hidden, LogProbs, Probs, TopK

__version__ = "0.1.0"

__all__ = [
    "JSD",
    "AlphaBeta",
    "CosineLoss",
    "CrossEntropyLoss",
    "DistillationLoss",
    "DivergenceLoss",
    "ForwardKL",
    "Hellinger",
    "Hidden",
    "LogProbs",
    "LossTerms",
    "Probs",
    "ReverseKL",
    "SkewedKL",
    "SkewedReverseKL",
    "SoftCrossEntropy",
    "TopK",
    "TotalVariation",
    "TripleLoss",
    "TripleTerms",
    "VocabParallelCrossEntropyLoss",
    "VocabParallelDistillationLoss",
    "VocabParallelDivergenceLoss",
    "VocabParallelLinearDistillationLoss",
    "cosine_loss",
    "cross_entropy",
    "distillation_loss",
    "divergence_loss",
    "log_softmax",
    "softmax",
    "triple_loss",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_distillation_loss",
    "vocab_parallel_divergence_loss",
    "vocab_parallel_linear_distillation_loss",
]
