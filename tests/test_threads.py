"""Threads: as many as torch says, the same numbers from any number of them, Python's own threads, and forked children.

What ends a process or forks it runs in a process of its own. It knows no formula. Next: csrc/cpu/threads.h.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import distil_fast
from tests.batch import CALLS, as_double, assert_identical, make_batch, run

COUNTS = (1, 2, 3, 5)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def in_a_process(script: str, timeout: float = 90.0) -> list[str]:
    """The lines that a script prints; a hang or a crash is a failure that says so."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stdout}{done.stderr[-3000:]}"
    return done.stdout.split("\n")[:-1]


# rows for every thread; fewer rows than threads, whose columns are shared; one row; too little for a second thread
@pytest.mark.parametrize(
    ("rows", "cols"), [(97, 5003), (4, 40001), (2, 70000), (1, 131072), (3, 11)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_numbers_do_not_depend_on_the_threads(rows: int, cols: int, dtype: torch.dtype) -> None:
    batch = make_batch(rows, cols=cols, hidden=cols, dtype=dtype)
    for name in ("everything-mean", "distillation-none", "cosine-mean", "softmax", "log_softmax"):
        results = []
        for count in COUNTS:
            torch.set_num_threads(count)
            results.append(run(lambda b, name=name: CALLS[name](distil_fast, b), batch))
        for other in results[1:]:
            assert_identical(other, results[0])


def test_float64_too() -> None:
    batch = as_double(make_batch(2, cols=70000))
    results = []
    for count in COUNTS:
        torch.set_num_threads(count)
        results.append(run(lambda b: CALLS["everything-mean"](distil_fast, b), batch))
    for other in results[1:]:
        assert_identical(other, results[0])


def test_the_callers_settings_survive() -> None:
    """Subnormal numbers count as zero inside a kernel, and nowhere else."""
    tiny = torch.tensor([2.0**-140])
    torch.set_num_threads(2)
    run(lambda b: CALLS["everything-mean"](distil_fast, b), make_batch(64, cols=2000))
    assert torch.get_num_threads() == 2
    assert (tiny * 1.0).item() == 2.0**-140
    assert (torch.full((100000,), 2.0**-140) * 1.0).eq(2.0**-140).all()


FOLLOWS = """
import os, time, torch, distil_fast
def tasks():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
student, teacher = torch.full((64, 30000), 0.5), torch.zeros(64, 30000)
alone = tasks()
for count, call in ((1, distil_fast.divergence_loss), (3, distil_fast.divergence_loss), (3, torch.add),
                    (5, torch.add), (5, distil_fast.divergence_loss), (2, distil_fast.divergence_loss)):
    torch.set_num_threads(count)
    call(student, teacher)
    patience = time.monotonic() + 3.0
    while tasks() != alone + count - 1 and time.monotonic() < patience:
        time.sleep(0.01)  # a helper that is no longer needed takes a moment to end
    print(count, 1 + tasks() - alone)
"""


def test_threads_follow_torch_set_num_threads() -> None:
    """OpenMP keeps one pool for torch and for us: n threads for n, whoever asks."""
    lines = [line.split() for line in in_a_process(FOLLOWS)]
    assert len(lines) == 6
    for asked, running in lines:
        assert running == asked


FORK = """
import hashlib, os, signal, sys, torch, distil_fast
torch.set_num_threads(2)
def loss():
    g = torch.Generator().manual_seed(0)
    s = torch.randn(64, 30000, generator=g).requires_grad_()
    out = distil_fast.distillation_loss(s, torch.randn(64, 30000, generator=g), torch.arange(64)).loss
    out.backward()
    return out.item(), hashlib.sha256(s.grad.numpy().tobytes()).hexdigest()  # torch sums by threads
expected = loss()
"""

OS_FORK = (
    FORK
    + """
def child():
    signal.alarm(30)
    torch.set_num_threads(1)  # torch's own ops would hang with more
    os._exit(0 if loss() == expected else 3)
pid = os.fork()
if pid == 0:
    child()
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(status, loss() == expected)
"""
)

OURS_ALONE = (
    FORK
    + """
s, t = torch.full((64, 30000), 0.5), torch.zeros(64, 30000)
t[:, 0] = 3.0
value = distil_fast.divergence_loss(s, t).item()
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    os._exit(0 if distil_fast.divergence_loss(s, t).item() == value else 3)  # set_num_threads still says 2
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), distil_fast.divergence_loss(s, t).item() == value)
"""
)

MULTIPROCESSING = (
    FORK
    + """
import multiprocessing
def work(queue):
    signal.alarm(30)
    torch.set_num_threads(1)
    queue.put(loss())
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
workers = [context.Process(target=work, args=(queue,)) for _ in range(2)]
for worker in workers:
    worker.start()
results = [queue.get() for _ in workers]
for worker in workers:
    worker.join()
print([worker.exitcode for worker in workers], all(result == expected for result in results))
"""
)


@pytest.mark.parametrize(
    ("script", "line"),
    [(OS_FORK, "0 True"), (OURS_ALONE, "0 True"), (MULTIPROCESSING, "[0, 0] True")],
    ids=["os.fork", "os.fork, threads unchanged", "multiprocessing"],
)
def test_a_forked_child_completes_a_loss(script: str, line: str) -> None:
    """The child's copy of OpenMP's pool has no threads: who waits for them, waits for ever."""
    assert in_a_process(script)[-1] == line


@pytest.mark.parametrize("count", [1, 2])
def test_calls_from_several_python_threads(count: int) -> None:
    torch.set_num_threads(count)
    batches = [make_batch(rows, cols=4001, hidden=300) for rows in (3, 40, 17, 64, 29, 5)]
    names = ["everything-mean", "triple", "softmax", "cosine-none", "divergence-sum", "cross_entropy-none"]
    jobs = [(name, batch) for name in names for batch in batches]

    def job(name_and_batch: Any) -> Any:
        torch.set_num_threads(count)
        return run(lambda b: CALLS[name_and_batch[0]](distil_fast, b), name_and_batch[1])

    expected = [job(j) for j in jobs]
    with ThreadPoolExecutor(4) as pool:
        for actual, alone in zip(pool.map(job, jobs), expected, strict=True):
            assert_identical(actual, alone)


def test_backward_on_another_thread() -> None:
    batch = make_batch(40, cols=4001)
    expected = run(lambda b: CALLS["distillation-mean"](distil_fast, b), batch)
    loss = CALLS["distillation-mean"](distil_fast, batch).loss
    with ThreadPoolExecutor(1) as pool:
        pool.submit((2.0 * loss).backward).result()
    assert batch.student_logits.grad is not None
    upstream = expected.grads[0].norm() / batch.student_logits.grad.norm()
    assert torch.allclose(upstream * batch.student_logits.grad, expected.grads[0], rtol=1e-5, atol=1e-12)


def test_the_gil_is_free_while_a_kernel_runs() -> None:
    """A thread that yields at every step makes one step a call where the GIL is held, and thousands where it is not."""
    torch.set_num_threads(1)
    student, teacher = torch.full((1024, 20000), 0.5), torch.zeros(1024, 20000)
    steps, done = 0, False

    def step() -> None:
        nonlocal steps
        while not done:
            steps += 1
            time.sleep(0)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(step)
        before = steps
        for _ in range(3):
            distil_fast.divergence_loss(student, teacher)
        after = steps
        done = True
        waiting.result()
    assert after - before > 100
