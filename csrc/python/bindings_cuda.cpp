// bindings_cuda.cpp: the doorway to the CUDA kernels: integers in, an exception or nothing out, the GIL released. It
// trusts its one caller, distil_fast/backends/cuda.py, with what the pointers are. Next: ../core.h.
#include "bindings_cuda.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "arguments.h"

namespace py = pybind11;

namespace distil_fast {
namespace {

using Quantity = std::pair<double, uintptr_t>;  // a number, or where it stands on the device

void set(double& number, const float*& device, const Quantity& q) {
  number = q.first;
  device = pointer<const float>(q.second);
}

template <class Call>
void launch(const char* (*function)(const Call&), const Call& call) {
  const char* error;
  {
    py::gil_scoped_release release;
    error = function(call);
  }
  if (error) throw std::runtime_error(std::string("distil_fast: CUDA: ") + error);
}

void row_loss(const Shape& shape, const MatrixArgs& student, const std::optional<MatrixArgs>& teacher,
              const std::optional<MatrixArgs>& grad, uintptr_t labels, uintptr_t soft_mask, bool mask_is_bool,
              uintptr_t class_weights, uintptr_t temperatures, const Quantity& temperature, const Quantity& soft_weight,
              const Quantity& hard_weight, const Quantity& soft_count, const Quantity& hard_count,
              const RowSettingsArgs& settings, uintptr_t upstream, uintptr_t loss, uintptr_t soft, uintptr_t hard,
              uintptr_t unit, uintptr_t fault, uintptr_t workspace, uintptr_t stream,
              const std::optional<TopKArgs>& topk) {
  CudaTopKLoss with_topk;
  CudaRowLoss& call = with_topk.rows;
  RowLoss& c = call.numbers;
  set_shape(c, shape);
  set_settings(c, settings);
  c.student = matrix(student), c.teacher = matrix(teacher), c.grad = matrix(grad);
  c.labels = pointer<const int64_t>(labels);
  c.soft_mask = pointer(soft_mask), c.mask_is_bool = mask_is_bool;
  c.class_weights = pointer(class_weights);
  c.temperatures = pointer(temperatures);
  set(c.temperature, call.temperature, temperature);
  set(c.soft_weight, call.soft_weight, soft_weight);
  set(c.hard_weight, call.hard_weight, hard_weight);
  set(c.soft_count, call.soft_count, soft_count);
  set(c.hard_count, call.hard_count, hard_count);
  c.upstream = pointer(upstream);
  c.loss = pointer(loss), c.soft = pointer(soft), c.hard = pointer(hard);
  call.unit = pointer<float>(unit), call.fault = pointer<double>(fault);
  call.workspace = pointer<float>(workspace), call.stream = pointer(stream);
  if (!topk) return launch(row_loss_cuda, call);
  set_topk(with_topk.teacher, *topk);
  launch(topk_loss_cuda, with_topk);
}

void rescale(const Shape& shape, const MatrixArgs& grad, uintptr_t grad_output, uintptr_t unit, uintptr_t stream) {
  CudaRescale call;
  set_shape(call.numbers, shape);
  call.numbers.grad = matrix(grad);
  call.grad_output = pointer<const float>(grad_output), call.unit = pointer<const float>(unit);
  call.stream = pointer(stream);
  launch(rescale_cuda, call);
}

void softmax(const Shape& shape, const MatrixArgs& logits, const MatrixArgs& out, bool logarithm,
             uintptr_t temperatures, const Quantity& temperature, uintptr_t stream) {
  CudaTemperature<Softmax> call;
  set_shape(call.numbers, shape);
  call.numbers.logits = matrix(logits), call.numbers.out = matrix(out), call.numbers.logarithm = logarithm;
  call.numbers.temperatures = pointer(temperatures);
  set(call.numbers.temperature, call.temperature, temperature);
  call.stream = pointer(stream);
  launch(softmax_cuda, call);
}

void softmax_backward(const Shape& shape, const MatrixArgs& out, const MatrixArgs& grad_out, const MatrixArgs& grad,
                      bool logarithm, uintptr_t temperatures, const Quantity& temperature, uintptr_t stream) {
  CudaTemperature<SoftmaxBackward> call;
  SoftmaxBackward& c = call.numbers;
  set_shape(c, shape);
  c.out = matrix(out), c.grad_out = matrix(grad_out), c.grad = matrix(grad), c.logarithm = logarithm;
  c.temperatures = pointer(temperatures);
  set(c.temperature, call.temperature, temperature);
  call.stream = pointer(stream);
  launch(softmax_backward_cuda, call);
}

void pair_loss(const Shape& shape, const MatrixArgs& student, const MatrixArgs& teacher,
               const std::optional<MatrixArgs>& grad, uintptr_t mask, bool mask_is_bool, int32_t kind, double scale,
               const Quantity& weight, const Quantity& count, int32_t reduction, uintptr_t upstream, uintptr_t loss,
               uintptr_t term, uintptr_t unit, uintptr_t fault, uintptr_t workspace, uintptr_t stream) {
  CudaPairLoss call;
  PairLoss& c = call.numbers;
  set_shape(c, shape);
  c.student = matrix(student), c.teacher = matrix(teacher), c.grad = matrix(grad);
  c.mask = pointer(mask), c.mask_is_bool = mask_is_bool;
  c.kind = static_cast<PairKind>(kind), c.scale = scale;
  set(c.weight, call.weight, weight);
  set(c.count, call.count, count);
  c.reduction = static_cast<Reduction>(reduction);
  c.upstream = pointer(upstream);
  c.loss = pointer(loss), c.term = pointer(term);
  call.unit = pointer<float>(unit), call.fault = pointer<double>(fault);
  call.workspace = pointer<float>(workspace), call.stream = pointer(stream);
  launch(pair_loss_cuda, call);
}

std::pair<int, std::string> devices() {
  const char* why = nullptr;
  const int count = devices_cuda(&why);
  return {count, why ? why : ""};
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_row_loss", &row_loss);
  m.def("cuda_row_workspace", &row_workspace_cuda);
  m.def("cuda_rescale", &rescale);
  m.def("cuda_softmax", &softmax);
  m.def("cuda_softmax_backward", &softmax_backward);
  m.def("cuda_pair_loss", &pair_loss);
  m.def("cuda_devices", &devices);
}

}  // namespace distil_fast
