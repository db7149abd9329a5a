// bindings_shards.cpp: the doorway to the three calls on a shard of a vocabulary: integers in, nothing out, the GIL
// released. It trusts its one caller, distil_fast/backends/shards.py, with what the pointers are and what their values
// say. Next: ../core.h.
#include "bindings_shards.h"

#include "arguments.h"

namespace py = pybind11;

namespace distil_fast {
namespace {

using RowArgs = std::tuple<uintptr_t, uintptr_t, uintptr_t>;              // temperatures, soft weights, hard weights
using SettingsArgs = std::tuple<int32_t, std::array<double, 2>, double>;  // divergence, its parameters, smoothing

Shard shard(const Shape& shape, const MatrixArgs& student, const std::optional<MatrixArgs>& teacher,
            const RowArgs& rows, const SettingsArgs& settings) {
  Shard s;
  set_shape(s, shape);
  s.student = matrix(student);
  s.teacher = matrix(teacher);
  s.temperatures = pointer<const double>(std::get<0>(rows));
  s.soft_weights = pointer<const double>(std::get<1>(rows));
  s.hard_weights = pointer<const double>(std::get<2>(rows));
  s.divergence = std::get<0>(settings);
  std::copy_n(std::get<1>(settings).begin(), 2, s.parameters);
  s.label_smoothing = std::get<2>(settings);
  return s;
}

void statistics(const Shape& shape, const MatrixArgs& student, const std::optional<MatrixArgs>& teacher,
                const RowArgs& rows, const SettingsArgs& settings, bool of_teacher, uintptr_t maxima, uintptr_t sums) {
  const ShardStatistics call{shard(shape, student, teacher, rows, settings), of_teacher, pointer<double>(maxima),
                             pointer<ShardSums>(sums)};
  py::gil_scoped_release release;
  shard_statistics_cpu(call);
}

void divergence(const Shape& shape, const MatrixArgs& student, const std::optional<MatrixArgs>& teacher,
                const RowArgs& rows, const SettingsArgs& settings, uintptr_t totals, uintptr_t f_g) {
  const ShardDivergence call{shard(shape, student, teacher, rows, settings), pointer<const ShardTotals>(totals),
                             pointer<double>(f_g)};
  py::gil_scoped_release release;
  shard_divergence_cpu(call);
}

void gradient(const Shape& shape, const MatrixArgs& student, const std::optional<MatrixArgs>& teacher,
              const RowArgs& rows, const SettingsArgs& settings, uintptr_t totals, uintptr_t labels, int64_t vocabulary,
              const MatrixArgs& grad) {
  const ShardGradient call{shard(shape, student, teacher, rows, settings), pointer<const ShardTotals>(totals),
                           pointer<const int64_t>(labels), vocabulary, matrix(grad)};
  py::gil_scoped_release release;
  shard_gradient_cpu(call);
}

}  // namespace

void bind_shards(py::module_& m) {
  m.def("shard_statistics", &statistics);
  m.def("shard_divergence", &divergence);
  m.def("shard_gradient", &gradient);
  m.attr("SHARD_SUMS") = sizeof(ShardSums) / sizeof(double);
  m.attr("SHARD_TOTALS") = sizeof(ShardTotals) / sizeof(double);
}

}  // namespace distil_fast
