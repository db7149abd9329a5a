// row_loss.cu: the row losses' launches: weights, rows, total. Knows no kernel's inside. Next: row_loss.cuh.
#include "row_loss_kernels.h"

namespace distil_fast {
namespace cuda {
namespace {

WeighArgs weigh_args(const CudaRowLoss& call, const RowWeights& out) {
  const RowLoss& c = call.numbers;
  WeighArgs a;
  a.rows = c.outer * c.inner, a.cols = c.cols;
  a.has_soft = c.teacher.data, a.has_hard = c.labels;
  a.mask = c.soft_mask, a.mask_is_bool = c.mask_is_bool;
  a.labels = c.labels, a.ignore_index = c.ignore_index;
  a.class_weights = static_cast<const float*>(c.class_weights);
  a.temperatures = static_cast<const float*>(c.temperatures);
  a.temperature = {c.temperature, call.temperature};
  a.soft_weight = {c.soft_weight, call.soft_weight}, a.hard_weight = {c.hard_weight, call.hard_weight};
  a.soft_count = {c.soft_count, call.soft_count}, a.hard_count = {c.hard_count, call.hard_count};
  a.t_squared = c.t_squared, a.mean = c.reduction == Reduction::mean;
  a.upstream = static_cast<const float*>(c.upstream);
  a.needs_unit = c.grad.data && c.grad.dtype == DType::f16, a.slope = c.student_transform.scale;
  a.out = out, a.unit = call.unit, a.fault = call.fault;
  return a;
}

RowLossKernel kernel_of(DType dtype, int divergence, Kind kind) {
  if (dtype == DType::f32) return row_loss_kernel_of<float>(divergence, kind);
  return dtype == DType::f16 ? row_loss_kernel_of<Half>(divergence, kind)
                             : row_loss_kernel_of<BFloat16>(divergence, kind);
}

bool same(const Transform& t) { return t.scale == 1.0 && t.cap == 0.0; }

RowLossArgs row_args(const CudaRowLoss& call, const RowWeights& weights) {
  const RowLoss& c = call.numbers;
  RowLossArgs a;
  a.rows = static_cast<int>(c.outer * c.inner), a.inner = c.inner, a.cols = c.cols;
  a.student = c.student, a.teacher = c.teacher, a.grad = c.grad, a.labels = c.labels;
  a.values.weights = weights;
  if (c.reduction == Reduction::none) {
    a.values.loss = static_cast<float*>(c.loss);
    a.values.soft = static_cast<float*>(c.soft);
    a.values.hard = static_cast<float*>(c.hard);
  }
  a.unit = c.grad.data && c.grad.dtype == DType::f16 ? call.unit : nullptr;
  a.label_smoothing = static_cast<float>(c.label_smoothing), a.z_loss = static_cast<float>(c.z_loss);
  a.parameters[0] = c.parameters[0], a.parameters[1] = c.parameters[1];
  a.any.student = form_of(c.student_transform, TeacherForm::logits);
  a.any.teacher = form_of(c.teacher_transform, c.teacher_form);
  a.any.divergence = c.divergence, a.any.centred = centred_of[c.divergence];
  a.any.most = c.teacher.dtype == DType::f32 ? 1.001f : 1.01f;
  if (c.teacher.data && c.teacher_form != TeacherForm::logits) a.any.mass = weights.mass;
  return a;
}

const char* launch(const CudaRowLoss& call) {
  const RowLoss& c = call.numbers;
  const int64_t rows = c.outer * c.inner;
  const RowWeights weights = RowWeights::at(call.workspace, rows);
  if (const char* error = launch_weights(weigh_args(call, weights), call.stream)) return error;

  const RowLossArgs a = row_args(call, weights);
  hw::Device device;
  if (const char* error = hw::device(&device)) return error;
  const int size = size_of(c.student.dtype), second = c.teacher.data ? size_of(c.teacher.dtype) : 0;
  const bool plain = same(c.student_transform) && same(c.teacher_transform) && c.teacher_form == TeacherForm::logits;
  Plan plan;
  bool kept = plain && (!c.teacher.data || c.teacher.dtype == c.student.dtype);
  const int columns = kept_columns_of[c.divergence];
  kept = kept && plan_rows(device, c.cols, 16 / size, size, second, columns, call.stream, &plan);
  if (!kept) plan_rows(device, c.cols, 16 / size, size, second, 0, call.stream, &plan);
  const Kind kind = kept ? Kind::kept : plain && has_again(c.divergence) ? Kind::again : Kind::any;
  if (const char* error = launch_rows(kernel_of(c.student.dtype, c.divergence, kind), plan, a)) return error;
  TotalArgs total{rows, weights};
  if (a.any.mass) total.mass = a.any.mass, total.fault = call.fault;
  if (c.reduction != Reduction::none) {
    total.loss = static_cast<float*>(c.loss), total.soft = static_cast<float*>(c.soft);
    total.hard = static_cast<float*>(c.hard);
  }
  return total.loss || total.mass ? launch_total(total, call.stream) : nullptr;
}

}  // namespace
}  // namespace cuda

int64_t row_workspace_cuda(int64_t rows) { return cuda::RowWeights::ahead + cuda::RowWeights::vectors * rows; }

const char* row_loss_cuda(const CudaRowLoss& call) {
  const char* refusal = cuda::too_large(call.numbers.outer * call.numbers.inner, call.numbers.cols);
  return refusal ? refusal : cuda::launch(call);
}

}  // namespace distil_fast
