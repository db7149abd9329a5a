"""The CPU's tests of transforms, forms of teacher, class weights and z-loss, on the CUDA kernels.

What is imported here is collected here, as in test_matrix.py. Next: test_conventions.py, what GPUs add to them.
"""

from __future__ import annotations

import pytest
import torch

from tests import calls, test_row_loss, test_row_loss_options
from tests.test_row_loss_options import (  # noqa: F401
    test_a_column_masked_in_the_student_alone,
    test_a_probability_of_zero_is_a_masked_column,
    test_a_small_logit_keeps_its_digits_under_a_large_cap,
    test_alpha_beta_where_one_probability_is_below_float32,
    test_infinite_logits_reach_the_cap,
    test_jsd_of_log_probabilities_below_float32,
    test_labels_of_weight_zero_are_unused_rows,
    test_masked_columns_stay_masked_under_a_softcap,
    test_rounding_is_no_error,
    test_the_same_transform_of_the_same_logits_has_no_divergence,
    test_z_loss_of_a_label_that_the_model_is_sure_of,
)


@pytest.mark.parametrize("dtype", test_row_loss_options.DTYPES[:3], ids=str)
def test_in_place_is_the_same_to_the_bit(instruction_set: str, dtype: torch.dtype) -> None:
    test_row_loss_options.test_in_place_is_the_same_to_the_bit(instruction_set, dtype)


@pytest.mark.parametrize("dtypes", test_row_loss.HALF_MIXES, ids=test_row_loss.name_of)
@pytest.mark.parametrize("option", test_row_loss_options.OPTIONS)
def test_matrix(instruction_set: str, option: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """On sm_90 every other case: each kind of logits with each pair of dtypes, at temperatures that take turns."""
    turn = list(test_row_loss_options.OPTIONS).index(option) + test_row_loss.HALF_MIXES.index(dtypes)
    chosen = slice(turn % 2, None, 2) if instruction_set == "sm_90" else slice(None)
    for where, student, teacher, labels, settings, truth in test_row_loss_options.matrix(option, dtypes)[chosen]:
        calls.by_backend(student, teacher, labels, **settings).check(truth, f"{instruction_set} {where}")
