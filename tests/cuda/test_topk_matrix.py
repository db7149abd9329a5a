"""The tests of the CPU's top-k teacher on the CUDA kernels, and what GPUs add: faults that stop nothing, transforms.

What is imported here is collected here, as in test_matrix.py. Next: test_conventions.py, the same for whole teachers.
"""

from __future__ import annotations

from tests.test_topk import (  # noqa: F401
    test_a_bucket_that_the_student_leaves_empty,
    test_a_faint_tail_keeps_its_digits,
    test_all_columns_are_the_loss_of_the_whole_teacher,
    test_an_empty_row_is_nothing,
    test_columns_that_are_impossible,
    test_counts_replace_denominators,
    test_entries_with_any_strides,
    test_gradient_as_the_student_meets_the_teacher,
    test_leading_dimensions_are_rows,
    test_masses_that_rounding_lifted_above_1_leave_no_bucket,
    test_matrix,
    test_what_is_no_number_spoils_its_row_alone,
)
