// row_loss_kernels.h: the row loss' kernels by dtype, index of the divergence and kind; one translation unit per dtype of
// the student compiles them side by side. Next: row_loss.cuh.
#pragma once

#include "plan.h"
#include "row_loss.cuh"

namespace distil_fast::cuda {

using RowLossKernel = void (*)(const RowLossArgs);

// Which has no kernel of kind `again` for the divergences that came later: `any` serves their rows that no cluster keeps.
template <class S>
RowLossKernel row_loss_kernel_of(int divergence, Kind kind);

constexpr bool has_again(int divergence) { return divergence <= static_cast<int>(DivergenceIndex::jsd); }

#define DISTIL_FAST_ROW_LOSS_COLUMNS(name, D) kept_columns<D>,
inline constexpr int kept_columns_of[] = {DISTIL_FAST_DIVERGENCES(DISTIL_FAST_ROW_LOSS_COLUMNS)};

template <class S, class D, DivergenceIndex index>
RowLossKernel kernel_of_kind(Kind kind) {
  if (kind == Kind::kept) return row_loss_kernel<S, D, Kind::kept>;
  if constexpr (has_again(static_cast<int>(index))) return row_loss_kernel<S, D, Kind::again>;
  return nullptr;
}

#define DISTIL_FAST_ROW_LOSS_CASE(name, D) \
  if (static_cast<int>(DivergenceIndex::name) == divergence) return kernel_of_kind<S, D, DivergenceIndex::name>(kind);

// To be used once per Student.
#define DISTIL_FAST_ROW_LOSS_KERNELS(Student)                                   \
  template <>                                                                   \
  RowLossKernel row_loss_kernel_of<Student>(int divergence, Kind kind) {        \
    using S = Student;                                                          \
    if (kind == Kind::any) return row_loss_kernel<S, AnyDivergence, Kind::any>; \
    DISTIL_FAST_DIVERGENCES(DISTIL_FAST_ROW_LOSS_CASE)                          \
    return nullptr;                                                             \
  }

}  // namespace distil_fast::cuda
