"""A run of `distil-fast train`, start to end: a job is prepared, trained, compared with its teacher, and reported.

It alone knows the order of things; each thing is a file of its own. Under torchrun or `accelerate launch` every rank
comes through here, and the first one speaks. Next: masked_lm_job.py, task_job.py, trainer.py, html_report.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TypeAlias

import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console

from distil_fast.training import html_report, masked_lm_job, results, task_job
from distil_fast.training.distributed import make_accelerator
from distil_fast.training.environment import environment
from distil_fast.training.job import Job
from distil_fast.training.metrics import History
from distil_fast.training.progress import Display, duration
from distil_fast.training.report import comparison_table
from distil_fast.training.results import STEP, RunResults, plain
from distil_fast.training.settings import InputError, TrainConfig
from distil_fast.training.trainer import Trainer

RESULTS, REPORT = "results.json", "report.html"
JobMaker: TypeAlias = Callable[[Console], Job]


def train(config: TrainConfig, console: Console | None = None) -> RunResults | None:
    """Distil, as the configuration says, and print on the console what came of it.

    Leaves in `config.output`: `student/`, a Hugging Face checkpoint with its tokenizer; `checkpoints/`; `results.json`
    and `report.html`; and `teacher/`, if its head had to be fitted.

    Args:
        config: all of it.
        console: of rich; None: the terminal.

    Returns:
        What results.json holds; None on ranks but the first.

    Raises:
        InputError: something in the configuration cannot be used; before the first step.
        NonFiniteLoss: a loss or gradient was not finite, and `non_finite` is "stop".
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint.
    """
    accelerator = make_accelerator(config)
    make = task_job.make if config.task.name else masked_lm_job.make
    return run(config, accelerator, lambda speaking: make(config, accelerator, speaking), console)


def run(
    config: TrainConfig, accelerator: Accelerator, prepare: JobMaker, console: Console | None = None
) -> RunResults | None:
    """`train`, of a job that somebody else prepares."""
    quiet = not accelerator.is_main_process
    console = Console(quiet=True) if quiet else console or Console()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    set_seed(config.seed)
    seconds: dict[str, float] = {}
    with _timed(seconds, "total"):
        with _timed(seconds, "preparation"):
            job = prepare(console)
        config = _with_steps(config, job)
        with _timed(seconds, "distillation"), Display(console, "Distilling") as display:
            history = Trainer(
                job.objective,
                job.feed,
                job.prepare,
                config,
                accelerator=accelerator,
                evaluate=job.evaluate,
                report=display,
                save_student=job.save_student,
            ).fit()
        if quiet:
            return None
        with _timed(seconds, "evaluation"), console.status("Comparing student and teacher"):
            models = job.compare()
    found = RunResults(
        title=job.title,
        configuration=plain(asdict(config)),
        environment=environment().as_dict(),
        history=_columns(history),
        evaluations=_evaluations(history),
        models=models,
        text=job.text,
        seconds=seconds,
    )
    results.save(found, config.output / RESULTS)
    html_report.write(found, config.output / REPORT)
    console.print(comparison_table(models))
    console.print(f"{duration(seconds['total'])}. Student, {RESULTS} and {REPORT} are in {config.output}.")
    return found


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def _with_steps(config: TrainConfig, job: Job) -> TrainConfig:
    """The configuration with its epochs as steps."""
    if config.steps is not None:
        return config
    if job.micro_batches is None:
        raise InputError("steps: expected a number for a stream, whose length nobody knows, got null.")
    return replace(config, steps=max(1, math.ceil(config.epochs * job.micro_batches / config.accumulation_steps)))


def _columns(history: History) -> dict[str, list[float]]:
    """The curves of the report."""
    shown = [name for name in history.columns if name not in ("tokens", "skipped", "fault", "seconds")]
    columns = {name: history[name].tolist() for name in shown}
    speeds = history["tokens"].double() / history["seconds"].double().clamp(min=1e-9)
    return {STEP: [float(i + 1) for i in range(len(history.rows))], **columns, "tokens_per_second": speeds.tolist()}


def _evaluations(history: History) -> dict[str, list[float]]:
    if not history.evaluations:
        return {}
    steps, values = zip(*history.evaluations, strict=True)
    return {STEP: [float(step) for step in steps], **{name: [v[name] for v in values] for name in values[0]}}
