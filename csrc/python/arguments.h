// arguments.h: a call's arguments as Python passes them, and as core.h takes them. Knows nothing of ops. Next:
// bindings.cpp and bindings_cuda.cpp, the two doorways.
#pragma once

#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "../core.h"

namespace distil_fast {

using Shape = std::tuple<int64_t, int64_t, int64_t>;                  // outer, inner, cols
using MatrixArgs = std::tuple<uintptr_t, int32_t, int64_t, int64_t>;  // pointer, dtype, outer stride, row stride

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Matrix matrix(const std::optional<MatrixArgs>& m) {
  if (!m) return {};
  return {pointer(std::get<0>(*m)), static_cast<DType>(std::get<1>(*m)), std::get<2>(*m), std::get<3>(*m)};
}

template <class Call>
void set_shape(Call& call, const Shape& shape) {
  std::tie(call.outer, call.inner, call.cols) = shape;
}

}  // namespace distil_fast
