// row_loss_kernels.h: the row loss' kernels by dtype, index of the divergence and kind; one translation unit per dtype of the student
// compiles them side by side. Next: row_loss.cuh.
#pragma once

#include "plan.h"
#include "row_loss.cuh"

namespace distil_fast::cuda {

using RowLossKernel = void (*)(const RowLossArgs);

template <class S>
RowLossKernel row_loss_kernel_of(int divergence, bool kept);

#define DISTIL_FAST_ROW_LOSS_INDEX(name, D) name,
#define DISTIL_FAST_ROW_LOSS_COLUMNS(name, D) kept_columns<D>,
#define DISTIL_FAST_ROW_LOSS_CASE(name, D)                   \
  if (static_cast<int>(DivergenceIndex::name) == divergence) \
    return kept ? row_loss_kernel<S, D, true> : row_loss_kernel<S, D, false>;

enum class DivergenceIndex { DISTIL_FAST_DIVERGENCES(DISTIL_FAST_ROW_LOSS_INDEX) };

inline constexpr int kept_columns_of[] = {DISTIL_FAST_DIVERGENCES(DISTIL_FAST_ROW_LOSS_COLUMNS)};

// To be used once per Student.
#define DISTIL_FAST_ROW_LOSS_KERNELS(Student)                            \
  template <>                                                            \
  RowLossKernel row_loss_kernel_of<Student>(int divergence, bool kept) { \
    using S = Student;                                                   \
    DISTIL_FAST_DIVERGENCES(DISTIL_FAST_ROW_LOSS_CASE)                   \
    return nullptr;                                                      \
  }

}  // namespace distil_fast::cuda
