"""The row losses' settings: what of a call is neither a tensor nor a weight, in the order of the ops' schemas.

Every backend takes them as one argument. It knows nothing of what they mean to a kernel: docs/math.md says that, and
functional.py what a caller passes. Next: ops.py, native.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

TAILS = ("bucket", "renormalise", "ignore")  # of a top-k teacher, in the ABI's order
LOGITS, LOG_PROBS, PROBS = TEACHER_FORMS = ("logits", "log_probs", "probs")  # in the ABI's order


class RowSettings(NamedTuple):
    """Settings of one call; the defaults are those of a plain forward KL at any temperature."""

    ignore_index: int = -100
    divergence: str = "forward_kl"
    parameters: Sequence[float] = (0.0, 0.0)  # the divergence's
    t_squared: bool = True
    label_smoothing: float = 0.0
    z_loss: float = 0.0  # of the hard term: CE + z_loss logsumexp(s)^2
    teacher_form: str = LOGITS  # what the teacher's tensor holds; not logits: already at temperature T
    transforms: Sequence[float] = (1.0, 0.0, 1.0, 0.0)  # logit scale and softcap (0: none), student's and teacher's
    vocab_size: int = 0  # only so many columns take part; 0: all
    reduction: str = "mean"
    backend: str = "native"


# Their part of a schema, in the same order.
SCHEMA = (
    "int ignore_index, str divergence, float[] parameters, bool t_squared, float label_smoothing, float z_loss, "
    "str teacher_form, float[] transforms, int vocab_size, str reduction, str backend"
)
