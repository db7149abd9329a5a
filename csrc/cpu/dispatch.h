// dispatch.h: which instruction set's table serves, for float and for double. Next: table.h.
#pragma once

#include "table.h"

namespace distil_fast {

template <class Real>
const Table<Real>& table();

// The index of a dtype in a table for Real.
inline int index(DType dtype) { return dtype == DType::f64 ? 0 : static_cast<int>(dtype); }

inline int64_t size_of(DType dtype) {
  constexpr int64_t bytes[] = {4, 2, 2, 8};
  return bytes[static_cast<int>(dtype)];
}

// The start of a row of [outer, inner, cols].
inline char* row_at(const Matrix& m, int64_t row, int64_t inner) {
  return static_cast<char*>(m.data) + (row / inner * m.outer_stride + row % inner * m.row_stride) * size_of(m.dtype);
}

}  // namespace distil_fast
