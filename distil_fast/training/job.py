"""What a run trains and how it is judged: the parts that masked-LM and task distillation fill in.

It knows the protocols and nothing else. Next: masked_lm_job.py and task_job.py, which make them; run.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from distil_fast.training.protocols import Feed, Objective, Prepare
from distil_fast.training.results import ModelResults


class Job(NamedTuple):
    """Everything that the loop needs, and what is said at the end."""

    title: str  # of the report
    objective: Objective
    feed: Feed  # this rank's
    prepare: Prepare
    micro_batches: int | None  # of a pass on this rank; None: nobody knows
    evaluate: Callable[[Objective], dict[str, float]]  # while training
    save_student: Callable[[Path], None]
    compare: Callable[[], dict[str, ModelResults]]  # teacher, untrained and distilled student, after training
    text: dict[str, int]  # counts, for the reader
