"""The demo, start to end: the packaged BERT distilled into a student of half its depth in minutes, and timed.

A run of the trainer with the preset `short`, on text that every installation has, whose teacher may lack a head; then
the losses' speed beside plain PyTorch's. Next: run.py, which it calls; corpus.py for the text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from distil_fast.training import html_report, masked_lm_job, mlm_head, report, results, run, throughput
from distil_fast.training.command_line import parse
from distil_fast.training.corpus import documents_from_installed_packages
from distil_fast.training.distributed import make_accelerator
from distil_fast.training.job import Job
from distil_fast.training.objective import MaskedLMObjective
from distil_fast.training.precision import resolve_precision
from distil_fast.training.settings import CheckpointConfig, TrainConfig
from distil_fast.training.sources import documents_source

STEPS = {"bf16": 250, "fp32": 100}  # which two cores with and without bf16 instructions make in three minutes


@dataclass(frozen=True)
class DemoConfig:
    """What `distil-fast demo` does."""

    teacher: str | None = None  # folder or hub name; None: the packaged MiniLM
    text: Path | None = None  # UTF-8 file; None: documentation of installed packages
    output: Path = Path("runs/demo")
    cache: Path | None = None  # of tokenised text and fitted heads; None: $XDG_CACHE_HOME/distil_fast
    precision: str = "auto"  # "fp32", "bf16", or "auto": bf16 where the processor multiplies it
    steps: int | None = None  # of the distillation; None: three minutes' worth
    head: mlm_head.HeadConfig | None = None  # of the fit of a head; None: three minutes' worth


def demo(config: DemoConfig, console: Console) -> results.RunResults:
    """Do all of it, and print it on `console`; see `run.train` for what stays in `config.output`.

    Raises:
        InputError: teacher, text, cache or output folder cannot be used.
        FloatingPointError: a loss was inf or nan.
    """
    chosen = _training(config)
    accelerator = make_accelerator(chosen)
    precision = resolve_precision(chosen.precision, accelerator.device)
    chosen = replace(chosen, steps=config.steps or STEPS["bf16" if precision == "bf16" else "fp32"])
    head = config.head or mlm_head.short_fit("bf16" if precision == "bf16" else "fp32")
    jobs: list[Job] = []

    def prepare(speaking: Console) -> Job:
        source = None
        if config.text is None:
            with speaking.status("Reading the text"):
                source = documents_source("installed documentation", documents_from_installed_packages())
        jobs.append(masked_lm_job.make(chosen, accelerator, speaking, source, head))
        return jobs[0]

    found = run.run(chosen, accelerator, prepare, console)
    assert found is not None  # it is the only rank
    with console.status("Timing the losses"):
        speeds = {"loss and its gradient": _loss_speeds(jobs[0], chosen, precision)}
    found = replace(found, speeds=speeds)
    results.save(found, chosen.output / run.RESULTS)
    html_report.write(found, chosen.output / run.REPORT)
    console.print(report.speeds_table(speeds))
    return found


def _training(config: DemoConfig) -> TrainConfig:
    """The preset `short`, on the demo's own text."""
    preset = parse(TrainConfig, ["--preset", "short"], "distil-fast demo", "", presets=True)
    data = replace(preset.data, text=None if config.text is None else str(config.text), cache=config.cache)
    return replace(
        preset,
        teacher=config.teacher,
        output=config.output,
        data=data,
        precision=config.precision,  # type: ignore[arg-type]  # checked where it is resolved
        checkpoint=CheckpointConfig(interval=100, keep=1),
    )


def _loss_speeds(job: Job, config: TrainConfig, precision: str) -> dict[str, float]:
    objective = job.objective
    assert isinstance(objective, MaskedLMObjective)
    batch = job.prepare(next(job.feed))
    return throughput.loss_throughput(objective.student, objective.teacher, batch, config.loss, precision)
