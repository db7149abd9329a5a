"""The tests of the CPU's kernels, on the CUDA kernels: every divergence, dtype pair, size, argument and odd value.

What is imported here is collected here, and conftest.py sees to it that the emulated kernels serve. Left out is what is
about the CPU itself: threads, float64, memory, and the order of sums that makes all layouts give the same bits there.
Next: test_conventions.py, what GPUs add.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests import (
    calls,
    oracle,
    test_cosine,
    test_pairs,
    test_row_loss,
    test_row_loss_memory,
    test_row_loss_values,
    test_softmax,
)
from tests.test_cosine import (  # noqa: F401
    test_count_replaces_the_denominator,
    test_exact_as_the_student_meets_the_teacher,
    test_fp16_gradients_of_short_vectors_do_not_overflow,
    test_one_column,
    test_same_direction,
    test_unused_rows_reach_nothing,
    test_value_is_torchs,
    test_vectors_of_length_zero_and_nearly_so,
)
from tests.test_pairs import (  # noqa: F401
    test_entries_masked_in_both_count_nothing,
    test_fp16_units_hold_large_gradients,
    test_rows_that_are_not_normalised,
    test_tiny_probabilities,
    test_values_are_torchs,
    test_what_is_no_probability,
    test_where_a_probability_is_zero,
)
from tests.test_pairs import test_unused_rows_reach_nothing as test_unused_rows_reach_no_pair  # noqa: F401
from tests.test_row_loss import (  # noqa: F401
    test_a_student_that_is_surer_than_its_teacher,
    test_fp16_gradient_survives_a_mean_over_many_rows,
    test_grad_output_of_a_scalar_loss,
    test_gradient_of_a_label_that_the_model_is_sure_of,
    test_gradient_stays_exact_as_the_student_meets_the_teacher,
    test_models_that_are_sure_of_the_same_column,
    test_modules_of_one_term_are_the_same_kernel,
    test_same_logits_have_no_divergence_and_no_gradient,
)
from tests.test_row_loss_memory import (  # noqa: F401
    test_expanded_tensors,
    test_no_rows,
)
from tests.test_row_loss_values import (  # noqa: F401
    test_columns_masked_in_both_do_not_exist,
    test_columns_masked_in_one,
    test_cross_entropy_with_a_masked_vocabulary,
    test_extreme_temperatures,
    test_finite_masks_are_as_good_as_infinite_ones,
    test_huge_logits,
    test_huge_logits_reverse_kl,
    test_jsd_of_models_without_a_column_in_common,
    test_label_smoothing_with_a_masked_vocabulary,
    test_rows_whose_blocks_differ,
    test_subnormal_logits_and_probabilities_count_as_zero,
)
from tests.test_softmax import (  # noqa: F401
    test_expanded_upstream,
    test_extremes,
    test_shapes,
    test_temperature_per_row,
)

HALVES = [torch.float32, torch.bfloat16, torch.float16]
half_precisions = pytest.mark.parametrize("dtype", HALVES, ids=str)
both = pytest.mark.parametrize("name", test_softmax.FUNCTIONS)


@pytest.mark.parametrize("filler", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_what_no_term_uses_reaches_nothing(
    instruction_set: str, reduction: str, filler: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_row_loss_memory, "DTYPES", HALVES)
    test_row_loss_memory.test_what_no_term_uses_reaches_nothing(instruction_set, reduction, filler)


@half_precisions
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("argument", test_row_loss.ARGUMENTS)
def test_arguments(argument: str, reduction: str, dtype: torch.dtype) -> None:
    test_row_loss.test_arguments(argument, reduction, dtype)


@pytest.mark.parametrize("dtypes", test_row_loss.HALF_MIXES, ids=test_row_loss.name_of)
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_matrix(instruction_set: str, divergence: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """On sm_90 every other case: each kind of logits with each pair of dtypes, at temperatures that take turns."""
    turn = list(oracle.DIVERGENCES).index(divergence) + test_row_loss.HALF_MIXES.index(dtypes)
    chosen = slice(turn % 2, None, 2) if instruction_set == "sm_90" else slice(None)
    for where, student, teacher, labels, settings, truth in test_row_loss.matrix(divergence, dtypes)[chosen]:
        calls.by_backend(student, teacher, labels, **settings).check(truth, f"{instruction_set} {where}")


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf], ids=str)
def test_a_bad_row_is_bad_alone(instruction_set: str, value: float, divergence: str) -> None:
    """Dtypes take turns: each with every divergence, and with every value."""
    turn = list(oracle.DIVERGENCES).index(divergence) + (0 if math.isnan(value) else 1 if value < 0 else 2)
    test_row_loss_values.test_a_bad_row_is_bad_alone(instruction_set, value, divergence, HALVES[turn % 3])


@half_precisions
@both
def test_softmax_values(instruction_set: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_softmax, "SIZES", [1, 2, 7, 17, 1000, 3000])
    test_softmax.test_values(instruction_set, name, dtype)


@half_precisions
@both
def test_softmax_gradients(
    instruction_set: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_softmax, "SIZES", [1, 2, 7, 17, 1000, 3000])
    test_softmax.test_gradients(instruction_set, name, dtype)


@half_precisions
def test_softmax_of_infinities_and_nan(instruction_set: str, dtype: torch.dtype) -> None:
    test_softmax.test_infinities_and_nan(instruction_set, dtype)


@pytest.mark.parametrize("mix", test_row_loss.HALF_MIXES, ids=test_row_loss.name_of)
def test_cosine_values_and_gradients(instruction_set: str, mix: tuple[torch.dtype, torch.dtype]) -> None:
    test_cosine.test_values_and_gradients(instruction_set, mix)


@half_precisions
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mask", test_cosine.MASKS)
def test_cosine_masks_and_reductions(mask: str, reduction: str, dtype: torch.dtype) -> None:
    test_cosine.test_masks_and_reductions(mask, reduction, dtype)


@half_precisions
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_bad_vector_is_bad_alone(instruction_set: str, value: float, dtype: torch.dtype) -> None:
    test_cosine.test_a_bad_row_is_bad_alone(instruction_set, value, dtype)


@pytest.mark.parametrize("kind", test_pairs.KINDS)
@pytest.mark.parametrize("mix", test_row_loss.HALF_MIXES, ids=test_row_loss.name_of)
def test_pair_values_and_gradients(instruction_set: str, mix: tuple[torch.dtype, torch.dtype], kind: str) -> None:
    test_pairs.test_pair_values_and_gradients(instruction_set, mix, kind)


@half_precisions
@pytest.mark.parametrize("kind", test_pairs.KINDS)
def test_the_same_in_both(instruction_set: str, kind: str, dtype: torch.dtype) -> None:
    test_pairs.test_the_same_in_both(instruction_set, kind, dtype)


@half_precisions
@pytest.mark.parametrize("kind", test_pairs.KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mask", test_cosine.MASKS)
def test_pair_masks_and_reductions(mask: str, reduction: str, dtype: torch.dtype, kind: str) -> None:
    test_pairs.test_masks_and_reductions(mask, reduction, dtype, kind)


@half_precisions
@pytest.mark.parametrize("kind", test_pairs.KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_bad_pair_is_bad_alone(instruction_set: str, value: float, dtype: torch.dtype, kind: str) -> None:
    test_pairs.test_a_bad_row_is_bad_alone(instruction_set, 32, value, dtype, kind)


@pytest.mark.parametrize("size", [2049, 4111, 30522])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)],
    ids=test_row_loss.name_of,
)
def test_vocabularies(instruction_set: str, dtypes: tuple[torch.dtype, torch.dtype], size: int) -> None:
    test_row_loss.test_vocabularies(instruction_set, dtypes, size)
