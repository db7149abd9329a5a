"""Which term of DistilBERT's loss matters: the same distillation without one of them, or without the teacher's layers.

`python -m benchmarks.ablation --minutes 8 --text FILES... --output FOLDER` trains every arm with every seed, each for
the same number of steps, and goes on where it was stopped. An arm is a difference in the configuration. It knows
nothing of tables. Next: ablation_report.py, which shows what came out; docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import BertForMaskedLM

from benchmarks import ablation_report
from distil_fast.bench import machine
from distil_fast.training.arrange import evaluation_batches
from distil_fast.training.atomic import replacing
from distil_fast.training.batch import MaskedBatch
from distil_fast.training.cache import cache_folder
from distil_fast.training.config import HeadConfig, short_head_fit
from distil_fast.training.corpus import documents_from_installed_packages
from distil_fast.training.evaluate import Predictions, predict, quality
from distil_fast.training.masked_lm import MaskedLM
from distil_fast.training.metrics import Progress
from distil_fast.training.mlm_head import cache_key, fit_head, load_fitted, save_fitted
from distil_fast.training.objective import MaskedLMObjective
from distil_fast.training.precision import resolve_precision
from distil_fast.training.settings import (
    CheckpointConfig,
    DataConfig,
    InputError,
    LossConfig,
    MaskingConfig,
    StudentConfig,
    TrainConfig,
)
from distil_fast.training.sources import documents_source
from distil_fast.training.student import make_student
from distil_fast.training.teacher import load_teacher, require_head
from distil_fast.training.text import Text, open_text
from distil_fast.training.trainer import Trainer


@dataclass(frozen=True)
class Arm:
    """What is different from the full recipe: weights of the loss, or where the student begins."""

    loss: LossConfig = LossConfig()  # noqa: RUF009 - frozen
    student: StudentConfig = StudentConfig()  # noqa: RUF009


FULL = "full"
ARMS = {
    FULL: Arm(),
    "no ce": Arm(LossConfig(alpha_ce=0.0)),
    "no mlm": Arm(LossConfig(alpha_mlm=0.0)),
    "no cos": Arm(LossConfig(alpha_cos=0.0)),
    "random initialisation": Arm(student=StudentConfig(initialisation="random")),
}
SEEDS = 3
LENGTH = 128  # tokens of a sequence
# Short runs learn faster with twice the share of masked tokens, all alike, and without dropout: no text is seen often.
MASKING = MaskingConfig(rate=0.3, smoothing=0.0)
BASE = TrainConfig(masking=MASKING, micro_batch_size=8, accumulation_steps=2, dropout=False)
# Uniform positions, all of them hidden: the question a reader expects behind "accuracy" and "pseudo-perplexity".
EVALUATION_MASKING = MaskingConfig(mask=1.0, random=0.0, smoothing=0.0)
EVALUATION_BATCH, EVALUATION_SEED = 16, 56
PROBE_STEPS = 8  # of the full arm, from whose time the number of steps follows
MARGIN = 0.9  # of the minutes: evaluation and the machine's moods need some


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    output: Path
    minutes: float = 8.0
    text: tuple[Path, ...] = ()
    held_out: tuple[Path, ...] = ()
    arms: tuple[str, ...] = tuple(ARMS)
    seeds: int = SEEDS
    steps: int | None = None
    teacher: str | None = None
    head_steps: int | None = None
    base: TrainConfig = BASE
    length: int = LENGTH


@dataclass(frozen=True)
class Session:
    """What all arms share."""

    request: Request
    teacher: MaskedLM
    text: Text
    masked: list[MaskedBatch]  # the held-out text under fixed masks
    of_teacher: Predictions

    def config(self, arm: Arm, seed: int, steps: int, output: Path) -> TrainConfig:
        base, checkpoint = self.request.base, CheckpointConfig(interval=100, keep=1)
        return replace(
            base, loss=arm.loss, student=arm.student, seed=seed, steps=steps, output=output, checkpoint=checkpoint
        )


def run(request: Request, console: Console) -> dict[str, Any]:
    """Trains what is not trained yet, and writes results.json, table.md and ablation.png beside the arms' own files.

    Raises:
        InputError: text, teacher or output folder cannot be used, or the folder belongs to another request.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    session = prepare(request, console)
    plan = _plan(session, console)
    trained = []
    for name, seed in product(request.arms, range(request.seeds)):
        path = request.output / f"{name.replace(' ', '-')}-seed{seed}.json"
        if not path.exists():
            with console.status(f"{name}, seed {seed}") as status:
                found = train_arm(session, name, seed, plan["steps"], status.update)
            console.print(f"{name}, seed {seed}: {found['seconds']:.0f} s")
            _write(path, found)
        trained.append(json.loads(path.read_text("utf-8")))
    untrained = make_student(session.teacher, StudentConfig())
    results = {
        "plan": plan,
        "machine": machine.describe(),
        "text": session.text.summary,
        "teacher": _scores(session, session.teacher),
        "untrained": _scores(session, untrained),
        "arms": trained,
    }
    _write(request.output / "results.json", results)
    return results


def prepare(request: Request, console: Console) -> Session:
    """The teacher with a head that works, the text, and the held-out text under fixed masks."""
    loaded = load_teacher(request.teacher)
    data = DataConfig(text=list(request.text), held_out=list(request.held_out) or None, sequence_length=request.length)
    documents = None
    if not request.text:
        documents = documents_source("installed packages", documents_from_installed_packages())
    text = open_text(data, loaded.tokenizer, documents)
    console.print(f"Text: {text.summary['training_tokens']:,} tokens, {text.summary['held_out_tokens']:,} held out.")
    if not loaded.has_head:
        require_head(loaded)
        _give_head(loaded.model, text, request, console)
    masking = text.masking(EVALUATION_MASKING, loaded.model.config.vocab_size, EVALUATION_SEED)
    masked = [masking(batch) for batch in evaluation_batches(text.held_out, EVALUATION_BATCH)]
    return Session(request, loaded.model, text, masked, predict(loaded.model, masked))


def _give_head(model: MaskedLM, text: Text, request: Request, console: Console) -> None:
    """As the demo does: fitted on the training text, and kept for the next time."""
    assert isinstance(model, BertForMaskedLM), "the packaged encoder is a BERT"
    precision = resolve_precision(request.base.precision, model.device)
    config: HeadConfig = short_head_fit(precision)
    if request.head_steps is not None:
        config = replace(config, steps=request.head_steps)
    settings = (config, request.base.seed, precision)
    path = cache_folder() / f"{cache_key(model, text.training, settings)}.safetensors"
    if load_fitted(model, path):
        return
    console.print(f"Fitting the teacher's head: {config.steps} steps")
    masking = text.masking(config.masking, model.config.vocab_size, request.base.seed)
    stream: Iterator[MaskedBatch] = map(masking, text.feed(config.batch_size, request.base.seed))
    with console.status("") as status:
        fit_head(model, stream, config, precision, lambda step, words: status.update(f"step {step}: {words}"))
    save_fitted(model, path)


def _plan(session: Session, console: Console) -> dict[str, Any]:
    """How many steps an arm has, which must be the same for all of them: kept in the output folder."""
    request, path = session.request, session.request.output / "plan.json"
    asked = {
        "minutes": request.minutes,
        "text": session.text.summary,
        "length": request.length,
        "base": json.loads(json.dumps(asdict(request.base), default=str)),
        "teacher": request.teacher or "the packaged encoder, its head fitted",
    }
    if path.exists():
        plan: dict[str, Any] = json.loads(path.read_text("utf-8"))
        different = [name for name, value in asked.items() if plan.get(name) != value]
        if different:
            raise InputError(
                f"--output: {request.output} belongs to a run with another {', '.join(different)}. Go on with what it "
                "was begun with, or choose an empty folder."
            )
        return plan
    steps = request.steps or _steps_in(session, request.minutes)
    console.print(f"{steps} steps an arm")
    _write(path, asked | {"steps": steps})
    return asked | {"steps": steps}


def _steps_in(session: Session, minutes: float) -> int:
    """Optimiser steps of the full arm, the slowest, in so many minutes."""
    work = session.request.output / "probe"
    config = replace(session.config(ARMS[FULL], 0, PROBE_STEPS, work), log_interval=1)
    seconds = _trainer(session, config).fit()["seconds"]
    shutil.rmtree(work)
    return max(1, int(60 * MARGIN * minutes / seconds.median().item()))


def train_arm(
    session: Session, name: str, seed: int, steps: int, note: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """One distillation from its beginning, or from where an interrupted one had its last checkpoint; and its scores."""
    start = time.monotonic()
    work = session.request.output / "work"
    known = work / "arm.json"
    if known.exists() and json.loads(known.read_text("utf-8")) != [name, seed, steps]:
        shutil.rmtree(work)
    _write(known, [name, seed, steps])

    def report(progress: Progress) -> None:
        loss = progress.terms["loss"]
        note(
            f"{name}, seed {seed}: step {progress.step} of {steps}, loss {loss:.2f}, {progress.seconds_left:.0f} s left"
        )

    trainer = _trainer(session, session.config(ARMS[name], seed, steps, work), report)
    history = trainer.fit()
    found = {
        "arm": name,
        "seed": seed,
        "steps": steps,
        "seconds": round(time.monotonic() - start, 1),
        "final_loss": round(history["loss"][-max(1, steps // 20) :].mean().item(), 4),
        **_scores(session, trainer.objective.student),
    }
    shutil.rmtree(work)
    return found


def _trainer(session: Session, config: TrainConfig, report: Callable[[Progress], None] | None = None) -> Trainer:
    torch.manual_seed(config.seed)  # of a random initialisation
    objective = MaskedLMObjective(make_student(session.teacher, config.student), session.teacher, config.loss)
    feed = session.text.feed(config.micro_batch_size, config.seed)
    masking = session.text.masking(config.masking, session.teacher.config.vocab_size, config.seed)
    return Trainer(objective, feed, masking, config, report=report)


def _scores(session: Session, model: MaskedLM) -> dict[str, float]:
    """MLM top-1 accuracy, pseudo-perplexity and agreement with the teacher, on the held-out text."""
    return quality(predict(model, session.masked), session.of_teacher)._asdict()


def _write(path: Path, data: object) -> None:
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(data, indent=1) + "\n", "utf-8")


# ------------------------------------------------------------------------------------------------ command line


def main(argv: Sequence[str] | None = None) -> int:
    """Train, then show; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__.partition("\n\n")[0])
    paths: dict[str, Any] = {"type": Path, "nargs": "+", "default": [], "metavar": "FILE"}
    parser.add_argument("--text", help="to train on (default: documentation of installed packages)", **paths)
    parser.add_argument("--held-out", help="to evaluate on (default: one document in 20 of the text)", **paths)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for results; goes on with them")
    parser.add_argument("--minutes", type=float, default=8.0, help="of one arm and seed (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of one arm and seed, instead of minutes")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of each arm (default: %(default)s)")
    parser.add_argument("--teacher", metavar="FOLDER", help="a BERT (default: the packaged encoder, its head fitted)")
    parser.add_argument("--head-steps", type=int, help="of fitting the head (default: the demo's)")
    parser.add_argument(
        "--docs", type=Path, metavar="FILE", help="put the table into this file, such as docs/results.md"
    )
    given = parser.parse_args(argv)
    request = Request(
        output=given.output,
        minutes=given.minutes,
        text=tuple(given.text),
        held_out=tuple(given.held_out),
        arms=tuple(given.arms),
        seeds=given.seeds,
        steps=given.steps,
        teacher=given.teacher,
        head_steps=given.head_steps,
    )
    console = Console()
    try:
        results = run(request, console)
        ablation_report.write(results, request.output, given.docs)
    except (InputError, FloatingPointError) as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 1
    print((request.output / "table.md").read_text("utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
