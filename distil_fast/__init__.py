"""distil_fast: knowledge-distillation losses in one fused pass, exact, forward and gradient.

`functional` and `hidden` hold the functions, `modules` their nn.Module faces, `reference` the same in plain torch.
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
from distil_fast.hidden import attention_loss, hidden_loss, logit_mse, mse_loss
from distil_fast.linear import linear_cross_entropy, linear_distillation_loss, linear_divergence_loss
from distil_fast.modules import (
    AttentionLoss,
    CosineLoss,
    CrossEntropyLoss,
    DistillationLoss,
    DivergenceLoss,
    HiddenLoss,
    HiddenMSELoss,
    LinearCrossEntropyLoss,
    LinearDistillationLoss,
    LinearDivergenceLoss,
    LogitMSELoss,
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
    "AttentionLoss",
    "CosineLoss",
    "CrossEntropyLoss",
    "DistillationLoss",
    "DivergenceLoss",
    "ForwardKL",
    "Hellinger",
    "Hidden",
    "HiddenLoss",
    "HiddenMSELoss",
    "LinearCrossEntropyLoss",
    "LinearDistillationLoss",
    "LinearDivergenceLoss",
    "LogProbs",
    "LogitMSELoss",
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
    "attention_loss",
    "cosine_loss",
    "cross_entropy",
    "distillation_loss",
    "divergence_loss",
    "hidden_loss",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_divergence_loss",
    "log_softmax",
    "logit_mse",
    "mse_loss",
    "softmax",
    "triple_loss",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_distillation_loss",
    "vocab_parallel_divergence_loss",
    "vocab_parallel_linear_distillation_loss",
]
