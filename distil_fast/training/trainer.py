"""The training loop: optimiser steps on the feed's micro-batches, exact over accumulation and ranks, resumable.

It knows an objective, a feed and their protocols (protocols.py); nothing of text, tokenizers, heads or the screen.
Next: health.py for losses that are not finite, snapshot.py and checkpoint.py for what outlives the process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from distil_fast.training import randomness
from distil_fast.training.atomic import replacing
from distil_fast.training.checkpoint import Checkpoints, Contents, DamagedError, read
from distil_fast.training.distributed import (
    accumulating,
    add_over_ranks,
    from_all,
    from_main,
    make_accelerator,
    make_whole,
    whole,
    whole_weights,
    wrap,
)
from distil_fast.training.health import Health, NonFiniteLoss
from distil_fast.training.interrupt import Interrupt, Interrupted
from distil_fast.training.metrics import History, Meter, Progress
from distil_fast.training.optimiser import learning_rates, make_optimiser, trainable
from distil_fast.training.precision import autocast, resolve_precision
from distil_fast.training.protocols import Feed, Objective, Prepare
from distil_fast.training.settings import InputError, TrainConfig
from distil_fast.training.snapshot import Parts, choices, collect, put_back, weights


class Trainer:
    """Trains an objective for `config.steps` optimiser steps.

    A step takes `accumulation_steps` micro-batches of every rank, and its gradient is that of one batch of all their
    sequences: each term of the loss is divided by its own count over all of them, which is why they are fetched first.
    The host reads nothing from the device but once a log interval, and before an evaluation or a checkpoint.

    Args:
        objective: trained in place; on every rank with the same teacher.
        feed: this rank's micro-batches, on `accelerator.device`.
        prepare: applied to each of them.
        config: `steps` must be a number: who knows the text turns epochs into steps.
        accelerator: of `make_accelerator(config)`, which is the default.
        evaluate: called on every rank with the objective's student in evaluation mode and all weights at hand, every
            `evaluation_interval` steps and at the end; the first rank's numbers are kept. It moves no generator.
        report: called on the first rank once a log interval.
        save_student: called on the first rank at the end, with a folder to make beside `output`/student, which it
            becomes.

    Raises:
        InputError: see the fields of the configuration.
    """

    def __init__(
        self,
        objective: Objective,
        feed: Feed,
        prepare: Prepare,
        config: TrainConfig,
        *,
        accelerator: Accelerator | None = None,
        evaluate: Callable[[Objective], dict[str, float]] | None = None,
        report: Callable[[Progress], None] | None = None,
        save_student: Callable[[Path], None] | None = None,
    ) -> None:
        steps = _steps(config)
        self.objective, self.feed, self.prepare = objective, feed, prepare
        self.config, self.steps = config, steps
        self.evaluate, self.report, self.save_student = evaluate, report, save_student
        self.accelerator = accelerator or make_accelerator(config)
        self.device = self.accelerator.device
        objective.student.train(config.dropout)
        self.precision = resolve_precision(config.precision, self.device)
        self.learning_rate = learning_rates(config.optimiser, steps)
        self.model = wrap(objective, self.accelerator, config.parallel)
        self.optimiser = make_optimiser(objective, config.optimiser)
        self.parameters = list(trainable(objective).values())
        self.health = Health(self.device, config.non_finite == "stop", self.precision == "fp16")
        self.history = History.of(objective.terms)
        self.meter = Meter(1 + len(objective.terms), config.log_interval, self.device)
        self.feeds: list[dict[str, Any]] = []  # the feed's state before each step since the last reading
        self.checkpoints = Checkpoints(config.output / "checkpoints", config.checkpoint.keep)
        self.parts = Parts(objective, self.optimiser, self.health, feed, prepare, self.history)

    def fit(self) -> History:
        """Train from the newest checkpoint, or from the start, to the last step.

        Returns:
            All losses since the first step. The student is left in evaluation mode, with whole weights on every rank.

        Raises:
            InputError: the output folder cannot be used, or its checkpoints are damaged or of another run.
            NonFiniteLoss: a loss or gradient was not finite, and `non_finite` is "stop".
            Interrupted: Ctrl-C or SIGTERM, after a checkpoint.
            OSError: a checkpoint could not be written; earlier ones are whole.
        """
        self._prepare_output()
        set_seed(self.config.seed, device_specific=True)
        self._resume()
        if self.accelerator.log_with:
            self.accelerator.init_trackers("distil_fast", config=_for_tracker(choices(self.config)))
        try:
            with Interrupt(self.accelerator.num_processes) as interrupt:
                self._run(interrupt)
        finally:
            self.objective.student.eval()
            for tracker in self.accelerator.trackers:
                tracker.finish()
        make_whole(self.model)
        if self.save_student and self.accelerator.is_main_process:
            with replacing(self.config.output / "student") as folder:
                self.save_student(folder)
        self.accelerator.wait_for_everyone()
        return self.history

    # ------------------------------------------------------------------------------------------------ the loop

    def _run(self, interrupt: Interrupt) -> None:
        config, start = self.config, len(self.history.rows)
        reported = start
        self.objective.student.train(config.dropout)
        self.meter.restart_clock()
        for done in range(start + 1, self.steps + 1):
            self.step(done - 1)
            last = done == self.steps
            stop = interrupt.requested() and not last
            log = last or done % config.log_interval == 0
            evaluate = self.evaluate is not None and (last or _due(done, config.evaluation_interval))
            save = last or stop or _due(done, config.checkpoint.interval)
            if log or evaluate or save:
                self._read()
            if log:
                self._report(reported)
                reported = done
            if evaluate:
                self._evaluate()
            if save:
                path = self._save()
            if stop:
                raise Interrupted(interrupt.received, done, path)
            if evaluate or save:
                self.meter.restart_clock()

    def step(self, index: int) -> None:
        """Optimiser step number `index`, counted from 0, which asks the device for nothing; `fit` is these, in turn.

        At most `log_interval` of them have room before their losses are read.
        """
        self.feeds.append(self.feed.state_dict())
        batches = [next(self.feed) for _ in range(self.config.accumulation_steps)]
        tokens = sum(batch.tokens.numel() for batch in batches)
        losses, token_count = self._accumulate([self.prepare(batch) for batch in batches], tokens)
        norm = self._gradient_norm()
        scale = self.health.scale
        verdict = self.health.judge(losses, norm)
        norm = norm / scale
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(index)
        # The fused kernel divides gradients by the one and does nothing at all if the other is 1: loss scale, clipping
        # and what must not touch the weights cost no pass over them.
        clipping = ((norm + 1e-6) / self.config.optimiser.max_grad_norm).clamp(min=1.0)
        self.optimiser.grad_scale = scale * clipping  # type: ignore[attr-defined]
        self.optimiser.found_inf = verdict.masked  # type: ignore[attr-defined]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.meter.add(losses, norm, token_count, verdict)

    def _accumulate(self, batches: list[Any], tokens: int) -> tuple[Tensor, Tensor]:
        """Forward and backward of a step's micro-batches; the loss and its terms, and the tokens, of all ranks."""
        ranks = self.accelerator.num_processes
        counts = torch.stack([self.objective.counts(batch) for batch in batches]).sum(0)
        # gradients are averaged over ranks, and these are shares of a sum
        counts = add_over_ranks(counts, self.accelerator) / ranks
        shares = []
        for i, batch in enumerate(batches):
            with accumulating(self.model, last=i == len(batches) - 1):
                with autocast(self.device, self.precision):
                    loss, terms = self.model(batch, counts)
                (loss * self.health.scale).backward()
            shares.append(torch.cat([loss.detach().view(1), terms]))
        here = torch.full((1,), float(tokens), device=self.device)
        # also what makes ranks agree on whether all is finite: nan and inf of one reach all
        sums = add_over_ranks(torch.cat([torch.stack(shares).sum(0), here]), self.accelerator)
        return sums[:-1] / ranks, sums[-1]

    def _gradient_norm(self) -> Tensor:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return whole(torch.nn.utils.get_total_norm(gradients))

    def _read(self) -> None:
        """Fetch what the device knows of the steps since the last time, and stop if one of them failed."""
        first = len(self.history.rows)
        rows = self.meter.read(first, self.learning_rate)
        feeds, self.feeds = self.feeds, []
        faults = rows[:, self.history.columns.index("fault")].tolist()
        if self.config.non_finite == "stop" and 1.0 in faults:
            i = faults.index(1.0)
            self.history.rows = torch.cat([self.history.rows, rows[:i]])
            shown = ("loss", *self.objective.terms, "gradient_norm")
            values = {name: rows[i, self.history.columns.index(name)].item() for name in shown}
            checkpoints = self.checkpoints.paths()
            raise NonFiniteLoss(first + i, values, feeds[i], checkpoints[0] if checkpoints else None)
        self.history.rows = torch.cat([self.history.rows, rows])

    def _report(self, since: int) -> None:
        if not self.accelerator.is_main_process:
            return
        progress = self.history.progress(since, self.steps)
        names = ("gradient_norm", "learning_rate", "tokens_per_second", "skipped")
        self.accelerator.log(progress.terms | {name: getattr(progress, name) for name in names}, step=progress.step)
        if self.report:
            self.report(progress)

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        before = randomness.capture(self.device)
        self.objective.student.eval()
        with whole_weights(self.model), torch.no_grad():
            values = self.evaluate(self.objective)
        self.objective.student.train(self.config.dropout)
        randomness.restore(before, self.device)
        values = from_main(values, self.accelerator)
        self.history.evaluations.append((len(self.history.rows), values))
        self.accelerator.log(values, step=len(self.history.rows))

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save(self) -> Path:
        contents = collect(self.parts, self.config, self.accelerator)
        path, error = None, None
        if self.accelerator.is_main_process:
            try:
                path = self.checkpoints.write(contents.state["step"], contents)
            except OSError as failure:
                error = failure
        path, message = from_main((path, error and str(error)), self.accelerator)
        if message:
            raise OSError(message) from error
        assert path is not None
        return path

    def _prepare_output(self) -> None:
        """Find out before the first step that nothing could be written."""
        message = None
        if self.accelerator.is_main_process:
            sizes = [tensor.numel() * tensor.element_size() for tensor in weights(self.objective).values()]
            try:
                self.checkpoints.prepare(3 * sum(sizes))  # the weights and two moments
            except InputError as error:
                message = str(error)
        if message := from_main(message, self.accelerator):
            raise InputError(message)

    def _resume(self) -> None:
        path, message = None, None
        if self.accelerator.is_main_process:
            try:
                if self.config.checkpoint.resume == "never":
                    self._refuse_to_resume()
                path = self.checkpoints.newest()
            except InputError as error:
                message = str(error)
        path, message = from_main((path, message), self.accelerator)
        if message:
            raise InputError(message)
        if path is not None:
            put_back(self._read_checkpoint(path), self.parts, self.config, self.accelerator)

    def _refuse_to_resume(self) -> None:
        if paths := self.checkpoints.paths():
            raise InputError(
                f"checkpoint.resume: 'never', and {paths[0]} is there. Resume with 'auto', or choose another output "
                "folder."
            )

    def _read_checkpoint(self, path: Path) -> Contents:
        contents, message = None, None
        try:
            contents = read(path)
        except DamagedError as error:
            message = f"{error} All ranks read it: nodes must share the file system of the output folder."
        if messages := [each for each in from_all(message, self.accelerator) if each]:
            raise InputError(messages[0])
        assert contents is not None
        return contents


def _steps(config: TrainConfig) -> int:
    for name, value in (
        ("steps", config.steps),
        ("accumulation_steps", config.accumulation_steps),
        ("log_interval", config.log_interval),
        ("checkpoint.keep", config.checkpoint.keep),
    ):
        if value is None or value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}.")
    assert config.steps is not None
    return config.steps


def _due(done: int, interval: int) -> bool:
    return interval > 0 and done % interval == 0


def _for_tracker(values: dict[str, Any]) -> dict[str, Any]:
    plain = (bool, int, float, str)
    return {name: value if isinstance(value, plain) else str(value) for name, value in values.items()}
