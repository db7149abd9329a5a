"""One shard's local steps, without processes: every instruction set, dtype pair and odd width against plain torch in
float64; the same bits on any number of threads; nothing touched beyond the rows.

What the steps come to when shards meet is parallel/test_losses.py's affair. Next: distil_fast/backends/shards.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distil_fast.backends import shards, shards_plain
from distil_fast.backends.settings import RowSettings
from distil_fast.backends.shards import SUMS, TOTALS, Shard
from distil_fast.parallel import rows
from tests import oracle
from tests.guarded import guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 2, 15, 17, 2047, 2049, 4100)


def a_shard(cols: int, student: torch.dtype, teacher: torch.dtype, kind: str = "plain", **settings: object) -> Shard:
    """Five rows: both terms at T = 1, 2 and 3.7, one term alone, none."""
    s, t = oracle.logit_pair(kind, 5, cols, oracle.generator(kind, cols, student, teacher))
    return Shard(
        s.to(student),
        t.to(teacher),
        torch.tensor([1.0, 2.0, 3.7, 1.5, 2.0], dtype=torch.float64),
        torch.tensor([1.0, 0.5, 2.0, 0.0, 0.0], dtype=torch.float64),
        torch.tensor([1.0, 0.5, 2.0, 0.5, 0.0], dtype=torch.float64),
        RowSettings(label_smoothing=0.1, z_loss=0.01)._replace(**settings),  # type: ignore[arg-type]
    )


def totals_of(shard: Shard) -> Tensor:
    """As if the shard were the whole vocabulary; made in float64, for both implementations alike."""
    maxima, sums = shards_plain.statistics(shard)
    columns = rows.to_largest(shard, sums, maxima, maxima)
    found, _ = rows.soft_totals(shard, columns, maxima)
    z = {name: columns[name] for name in ("z_s", "z_t", "z_h", "rest")}
    return rows.as_totals(**{**z, **found, "lse_slope": 0.02 * (maxima[:, 0] + columns["z_h"].log())})


def close(actual: Tensor, exact: Tensor, scale: Tensor, what: str) -> None:
    error = (actual - exact).abs()
    assert (error <= 4e-6 * scale).all(), (
        f"{what}: {error.max().item():.3g} where the scale is {scale.max().item():.3g}"
    )


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_statistics(instruction_set: str, divergence: str) -> None:
    for cols in WIDTHS:
        for student in DTYPES:
            for kind in ("plain", "close"):
                shard = a_shard(cols, student, torch.float32, kind, divergence=divergence)
                (top, sums), (exact_top, exact) = shards.statistics(shard), shards_plain.statistics(shard)
                assert torch.equal(top, exact_top)
                scales = exact.abs() + 1e-12
                scales[:, SUMS.index("gap")] = scales[:, SUMS.index("lean")] = 3.0 * exact[:, :2].max(-1).values
                scales[:, SUMS.index("shifted")] += cols
                for column, name in enumerate(SUMS):
                    weights = shard.hard_weights if name in ("z_h", "rest", "shifted") else shard.soft_weights
                    of = weights != 0, column
                    close(sums[of], exact[of], scales[of], f"{name} {cols} {student} {kind}")


@pytest.mark.parametrize("teacher", DTYPES)
def test_gradient(instruction_set: str, teacher: torch.dtype) -> None:
    for cols in WIDTHS:
        for student in DTYPES:
            for divergence in ("reverse_kl", "hellinger"):
                shard = a_shard(cols, student, teacher, divergence=divergence)
                totals, labels = totals_of(shard), torch.tensor([0, cols - 1, -1, cols // 2, 0])
                if divergence == "hellinger":
                    f_g, exact_f_g = shards.divergence(shard, totals), shards_plain.divergence(shard, totals)
                    close(f_g, exact_f_g, torch.ones_like(f_g), f"f, g {instruction_set} {cols}")
                    totals[:, TOTALS.index("g_sum")] = exact_f_g[:, 1]
                grad = torch.full_like(shard.student, 7.0)
                exact = torch.empty_like(shard.student, dtype=torch.float64)
                shards.gradient(shard, totals, labels, 3 * cols, grad)
                shards_plain.gradient(shard, totals, labels, 3 * cols, exact)
                rounding = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[student]
                error = (grad.double() - exact).norm(dim=-1)
                assert (error <= (6e-6 + rounding) * exact.norm(dim=-1) + 1e-6 * (cols > 1) + 4e-7).all(), (
                    cols,
                    student,
                )
                assert (grad[4] == 0).all()
                inplace = shard.student.clone()
                shards.gradient(shard._replace(student=inplace), totals, labels, 3 * cols, inplace)
                assert torch.equal(inplace, grad)


def test_the_slope_of_a_cap_that_is_reached() -> None:
    """In float64 1 - tanh(z)^2 has no digit left at z = 19; 1 / cosh(z)^2 has them all."""
    shard = a_shard(40, torch.float64, torch.float64)
    totals, labels = totals_of(shard), torch.tensor([0, 39, -1, 20, 0])
    z = torch.linspace(-300.0, 300.0, 40, dtype=torch.float64).expand(5, 40).clone()
    z[:, 7], z[:, 8] = 19.0, -torch.inf
    cap, scale = 5.0, 0.5
    capped = shard._replace(
        student=z * (cap / scale), settings=shard.settings._replace(transforms=(scale, cap, 1.0, 0.0))
    )
    plain = shard._replace(student=torch.where(z == -torch.inf, z, cap * z.tanh()))
    grad, of_logits = torch.empty_like(z), torch.empty_like(z)
    shards_plain.gradient(capped, totals, labels, 40, grad)
    shards_plain.gradient(plain, totals, labels, 40, of_logits)
    torch.testing.assert_close(grad, of_logits * scale * z.cosh() ** -2, rtol=1e-12, atol=0.0)
    assert (grad[0, z[0] != -torch.inf] != 0).all()


@pytest.mark.parametrize("rows_used", [1, 5])
def test_threads_do_not_change_the_bits(rows_used: int) -> None:
    """Few rows share out their blocks, many rows themselves."""
    shard = a_shard(70000, torch.float32, torch.bfloat16, divergence="jsd", parameters=(0.5, 0.0))
    shard = Shard(*(x[:rows_used] for x in shard[:5]), shard.settings)  # type: ignore[arg-type]
    totals, labels = totals_of(shard), torch.tensor([3, 69999, -1, 5, 0])[:rows_used]
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        grad = torch.empty_like(shard.student)
        shards.gradient(shard, totals, labels, 70000, grad)
        results.append((*shards.statistics(shard), shards.divergence(shard, totals), grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_beyond_the_rows_is_touched(instruction_set: str) -> None:
    """On pages that end, or begin, where the rows do; a byte too many would end the process."""
    for cols in (1, 7, 17, 2049):
        for dtype in DTYPES:
            for at_end in (True, False):
                shard = a_shard(cols, dtype, dtype)
                student, teacher = (guarded(x, at_end) for x in shard[:2])  # type: ignore[arg-type]
                grad = guarded(torch.zeros_like(student), at_end)
                there = shard._replace(student=student, teacher=teacher)
                for one, other in zip(shards.statistics(there), shards.statistics(shard), strict=True):
                    assert torch.equal(one, other)
                totals = totals_of(shard)
                shards.divergence(there, totals)
                shards.gradient(there, totals, torch.tensor([0, cols - 1, -1, 0, 0]), cols, grad)
                assert grad.isfinite().all()
