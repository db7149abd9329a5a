"""The suite of a newcomer: what their own machine would gain, in under two minutes on two cores.

The loss in both precisions, Jensen-Shannon as TRL writes it, a fused head and a small training step, each as large as
the memory allows. It knows neither formulae nor tables. Next: gains.py, its last lines.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

from distil_fast.bench import cases, measure, results, room, suite, train_cases
from distil_fast.bench.cases import BF16, FP32, PRODUCTS, Case
from distil_fast.bench.results import Results
from distil_fast.bench.suite import NO_PEAK, Note

ROWS, FEWEST_ROWS = {"cpu": 256, "cuda": 8192}, 32  # on a CPU most of the time goes into the float64 answers
COLS, WIDTH = 30522, 384
STEP_BATCH = 4  # half that of train_cases.TRAIN[0], whose original takes three seconds a step
STEP_BYTES = 2 * room.GIB  # of it, by the original
STEP = ("original", "modern eager", "ours")


def fitted(case: Case, free: int) -> Case:
    """The case with half its rows, as often as it takes to fit."""
    while room.needed_bytes(case) > free and case.rows > FEWEST_ROWS:
        case = replace(case, rows=case.rows // 2)
    return case


def losses(device: str) -> list[Case]:
    """The cases before the training step, sized to the memory."""
    rows, free = ROWS[device], room.available_bytes(device)
    wanted = [
        Case("KL+CE", rows, COLS, FP32, temperature=2.0, device=device),
        Case("KL+CE", rows, COLS, BF16, temperature=2.0, device=device),
        Case("JSD", rows // 2, COLS, FP32, contenders=("eager", "ours"), device=device),
        Case("linear KL+CE", rows, COLS, FP32, contenders=(PRODUCTS, "eager", "ours"), width=WIDTH, device=device),
    ]
    return [fitted(case, free) for case in wanted]


def run(device: str, containing: str, *, processes: int, command: str, note: Note) -> Results:
    """Measures those whose name contains a text.

    Raises:
        ValueError: no case's name does, or nothing fits into memory.
    """
    chosen, left_out = room.fitting(cases.select(losses(device), containing=containing))
    step = replace(train_cases.TRAIN[0], batch=STEP_BATCH, contenders=STEP)
    reason = _no_step(device)
    steps = [step] if containing in step.name else []
    if steps and reason:
        left_out[step.name] = reason
        steps = []
    if not chosen and not steps:
        why = "; ".join(f"{name}: {text}" for name, text in left_out.items())
        raise ValueError(why or f"no case's name contains {containing!r}")
    how: dict[str, Any] = {"processes": processes, "command": command, "note": note}
    found = []
    if chosen:
        found.append(suite.run(chosen, (), measure.QUICK, without_peak=(*NO_PEAK, "compiled"), **how))
    if steps:
        from distil_fast.bench import train

        found.append(train.run(steps, measure.QUICK, **how))
    return replace(found[0] if len(found) == 1 else results.joined(*found), left_out=left_out)


def _no_step(device: str) -> str | None:
    """Why there is no training step; None if there is one."""
    if device != "cpu":
        return "on a GPU, ask distil-fast bench train-gpu"
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install 'distil-fast[train]'"
    if room.available_bytes(device) < STEP_BYTES:
        return (
            f"it may take {STEP_BYTES / room.GIB:.1f} GiB, and {room.available_bytes(device) / room.GIB:.1f} are free"
        )
    return None
