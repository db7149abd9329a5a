// row_launch.h: what comes before and after the rows of a row loss, whatever its teacher: weights, the kernels' arguments,
// the rows' total. Host code; knows no kernel. Next: row_loss.cu and topk.cu, which launch the rows between.
#pragma once

#include "row_call.cuh"

namespace distil_fast::cuda {

inline constexpr bool centred_of[] = {DISTIL_FAST_DIVERGENCES(DISTIL_FAST_DIVERGENCE_CENTRED)};

inline WeighArgs weigh_args(const CudaRowLoss& call, const RowWeights& out) {
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

inline void set_row_args(const CudaRowLoss& call, const RowWeights& weights, RowLossArgs* args) {
  const RowLoss& c = call.numbers;
  RowLossArgs& a = *args;
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
}

// The total, where there is one, and the tale of the first row that was refused, where rows can be.
inline const char* launch_values(const CudaRowLoss& call, const RowWeights& weights, bool refuses) {
  const RowLoss& c = call.numbers;
  TotalArgs total{c.outer * c.inner, weights};
  if (refuses) total.fault = call.fault;
  if (c.reduction != Reduction::none) {
    total.loss = static_cast<float*>(c.loss), total.soft = static_cast<float*>(c.soft);
    total.hard = static_cast<float*>(c.hard);
  }
  return total.loss || total.fault ? launch_total(total, call.stream) : nullptr;
}

}  // namespace distil_fast::cuda
