// bindings.cpp: the doorway: integers in, a fault or nothing out, the GIL released. Knows Python, and what a
// call looks like. It trusts its one caller, distil_fast/backends/native.py, with what the pointers are. Next:
// ../core.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/buffers.h"
#include "../divergences.h"
#include "arguments.h"
#include "bindings_cuda.h"
#include "bindings_shards.h"

namespace py = pybind11;
using namespace distil_fast;

namespace {

using Result = std::tuple<int32_t, int64_t, double, double>;  // kind (0: nothing wrong), row, value; unit

Result result(const Fault& fault, double unit = 1.0) {
  return {static_cast<int32_t>(fault.kind), fault.row, fault.value, unit};
}

Result row_loss(const Shape& shape, const MatrixArgs& student, const std::optional<MatrixArgs>& teacher,
                const std::optional<MatrixArgs>& grad, uintptr_t labels, uintptr_t soft_mask, bool mask_is_bool,
                uintptr_t class_weights, uintptr_t temperatures, double temperature, double soft_weight,
                double hard_weight, double soft_count, double hard_count, const RowSettingsArgs& settings,
                uintptr_t upstream, uintptr_t loss, uintptr_t soft, uintptr_t hard,
                const std::optional<TopKArgs>& topk) {
  TopKLoss with_topk;
  RowLoss& call = with_topk.row;
  set_shape(call, shape);
  set_settings(call, settings);
  call.student = matrix(student);
  call.teacher = matrix(teacher);
  call.grad = matrix(grad);
  call.labels = pointer<const int64_t>(labels);
  call.soft_mask = pointer(soft_mask);
  call.mask_is_bool = mask_is_bool;
  call.class_weights = pointer(class_weights);
  call.temperatures = pointer(temperatures);
  call.temperature = temperature;
  call.soft_weight = soft_weight;
  call.hard_weight = hard_weight;
  call.soft_count = soft_count;
  call.hard_count = hard_count;
  call.upstream = pointer(upstream);
  call.loss = pointer(loss);
  call.soft = pointer(soft);
  call.hard = pointer(hard);
  if (topk) set_topk(with_topk, *topk);
  py::gil_scoped_release release;
  double unit = 1.0;
  call.unit = &unit;
  const Fault fault = topk ? topk_loss_cpu(with_topk) : row_loss_cpu(call);
  return result(fault, unit);
}

void rescale(const Shape& shape, const MatrixArgs& grad, double factor) {
  Rescale call;
  set_shape(call, shape);
  call.grad = matrix(grad);
  call.factor = factor;
  py::gil_scoped_release release;
  rescale_cpu(call);
}

Result softmax(const Shape& shape, const MatrixArgs& logits, const MatrixArgs& out, bool logarithm,
               uintptr_t temperatures, double temperature) {
  Softmax call;
  set_shape(call, shape);
  call.logits = matrix(logits);
  call.out = matrix(out);
  call.logarithm = logarithm;
  call.temperatures = pointer(temperatures);
  call.temperature = temperature;
  py::gil_scoped_release release;
  return result(softmax_cpu(call));
}

void softmax_backward(const Shape& shape, const MatrixArgs& out, const MatrixArgs& grad_out, const MatrixArgs& grad,
                      bool logarithm, uintptr_t temperatures, double temperature) {
  SoftmaxBackward call;
  set_shape(call, shape);
  call.out = matrix(out);
  call.grad_out = matrix(grad_out);
  call.grad = matrix(grad);
  call.logarithm = logarithm;
  call.temperatures = pointer(temperatures);
  call.temperature = temperature;
  py::gil_scoped_release release;
  softmax_backward_cpu(call);
}

Result pair_loss(const Shape& shape, const MatrixArgs& student, const MatrixArgs& teacher,
                 const std::optional<MatrixArgs>& grad, uintptr_t mask, bool mask_is_bool, int32_t kind, double scale,
                 double weight, double count, int32_t reduction, uintptr_t upstream, uintptr_t loss, uintptr_t term) {
  PairLoss call;
  set_shape(call, shape);
  call.student = matrix(student);
  call.teacher = matrix(teacher);
  call.grad = matrix(grad);
  call.mask = pointer(mask);
  call.mask_is_bool = mask_is_bool;
  call.kind = static_cast<PairKind>(kind);
  call.scale = scale;
  call.weight = weight;
  call.count = count;
  call.reduction = static_cast<Reduction>(reduction);
  call.upstream = pointer(upstream);
  call.loss = pointer(loss);
  call.term = pointer(term);
  py::gil_scoped_release release;
  double unit = 1.0;
  call.unit = &unit;
  const Fault fault = pair_loss_cpu(call);
  return result(fault, unit);
}

// A gradient's memory as an object with Python's buffer protocol: a tensor made from it gives it back when it
// dies.
struct Buffer {
  explicit Buffer(size_t size) : bytes(size), data(acquire_buffer(size)) {}
  ~Buffer() { release_buffer(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  size_t bytes;
  void* data;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "distil_fast's native core; see csrc/core.h. Call it through distil_fast.backends.native.";
  py::class_<Buffer>(m, "Buffer", py::buffer_protocol()).def(py::init<size_t>()).def_buffer([](Buffer& b) {
    return py::buffer_info(b.data, 1, py::format_descriptor<unsigned char>::format(),
                           static_cast<py::ssize_t>(b.bytes));
  });
  m.def("row_loss", &row_loss);
  m.def("rescale", &rescale);
  m.def("softmax", &softmax);
  m.def("softmax_backward", &softmax_backward);
  m.def("pair_loss", &pair_loss);
  bind_shards(m);
  m.def("instruction_set", &instruction_set);
  m.def("use_instruction_set", &use_instruction_set);
#define DISTIL_FAST_NAME(name, Functor) #name,
  m.attr("DIVERGENCES") = std::vector<std::string>{DISTIL_FAST_DIVERGENCES(DISTIL_FAST_NAME)};
#undef DISTIL_FAST_NAME
#ifdef DISTIL_FAST_HAS_CUDA
  bind_cuda(m);
#endif
}
