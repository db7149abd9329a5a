// arguments.h: a call's arguments as Python passes them, and as core.h takes them. Knows nothing of ops. Next:
// bindings.cpp and bindings_cuda.cpp, the two doorways.
#pragma once

#include <pybind11/stl.h>

#include <array>
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

// What the row losses of every device and teacher share: distil_fast/backends/settings.py's numbers, in this order.
using RowSettingsArgs =
    std::tuple<int64_t, int32_t, std::array<double, 2>, bool, double, double, int32_t, std::array<double, 4>, int32_t>;

template <class Call>
void set_settings(Call& c, const RowSettingsArgs& args) {
  std::array<double, 2> parameters;
  std::array<double, 4> transforms;
  int32_t form, reduction;
  std::tie(c.ignore_index, c.divergence, parameters, c.t_squared, c.label_smoothing, c.z_loss, form, transforms,
           reduction) = args;
  c.parameters[0] = parameters[0], c.parameters[1] = parameters[1];
  c.teacher_form = static_cast<TeacherForm>(form);
  c.student_transform = {transforms[0], transforms[1]};
  c.teacher_transform = {transforms[2], transforms[3]};
  c.reduction = static_cast<Reduction>(reduction);
}

// What a top-k teacher adds: k, ids, log-probabilities, tolerance, tail, shift.
using TopKArgs = std::tuple<int64_t, uintptr_t, uintptr_t, double, int32_t, double>;

inline void set_topk(TopKLoss& c, const TopKArgs& args) {
  uintptr_t ids, log_probs;
  int32_t tail;
  std::tie(c.k, ids, log_probs, c.tolerance, tail, c.shift) = args;
  c.ids = pointer<const int64_t>(ids);
  c.log_probs = pointer(log_probs);
  c.tail = static_cast<Tail>(tail);
}

template <class Call>
void set_shape(Call& call, const Shape& shape) {
  std::tie(call.outer, call.inner, call.cols) = shape;
}

}  // namespace distil_fast
