// cosine.cu: the cosine loss' launches: norms where the gradient is fp16, weights, rows, total. Next: cosine.cuh.
#include "cosine.cuh"
#include "plan.h"

namespace distil_fast {
namespace cuda {
namespace {

const char* launch_norms(const hw::Device& device, const CudaCosineLoss& call, int rows, float* norms) {
  const CosineLoss& c = call.numbers;
  const NormArgs a{rows, c.inner, c.cols, c.student, c.mask, c.mask_is_bool, {c.weight, call.weight}, norms};
  const int64_t blocks = smaller(rows, 16 * static_cast<int64_t>(device.multiprocessors));
  return hw::Kernel<NormArgs>(norm_kernel, {static_cast<int>(blocks), 128, 1, stages_at, call.stream}).launch(a);
}

const char* weigh(const CudaCosineLoss& call, int rows, const RowWeights& weights, const float* norms) {
  const CosineLoss& c = call.numbers;
  WeighArgs a;
  a.rows = rows, a.cols = c.cols;
  a.has_soft = true;
  a.mask = c.mask, a.mask_is_bool = c.mask_is_bool;
  a.temperature = {1.0, nullptr};
  a.soft_weight = {c.weight, call.weight}, a.soft_count = {c.count, call.count}, a.hard_count = {0.0, nullptr};
  a.mean = c.reduction == Reduction::mean;
  a.upstream = static_cast<const float*>(c.upstream);
  a.norms = norms, a.needs_unit = norms;
  a.out = weights, a.unit = call.unit, a.fault = call.fault;
  return launch_weights(a, call.stream);
}

template <class S>
const char* launch_cosine(const hw::Device& device, void* stream, const CosineArgs& a) {
  constexpr int W = group_size<S>;
  Plan plan;
  plan_rows(device, a.cols, W, sizeof(S), size_of(a.teacher.dtype), 0, stream, &plan);
  return launch_rows<CosineArgs>(cosine_kernel<S>, plan, a);
}

const char* launch(const CudaCosineLoss& call) {
  const CosineLoss& c = call.numbers;
  hw::Device device;
  if (const char* error = hw::device(&device)) return error;
  const int rows = static_cast<int>(c.outer * c.inner);
  const RowWeights weights = RowWeights::at(call.workspace, rows);
  const bool needs_unit = c.grad.data && c.grad.dtype == DType::f16 && !c.upstream;
  float* norms = needs_unit ? weights.hard_value : nullptr;  // a vector that nobody uses until the rows are done
  if (norms)
    if (const char* error = launch_norms(device, call, rows, norms)) return error;
  if (const char* error = weigh(call, rows, weights, norms)) return error;

  const bool none = c.reduction == Reduction::none;
  CosineArgs a;
  a.rows = rows, a.inner = c.inner, a.cols = c.cols;
  a.student = c.student, a.teacher = c.teacher, a.grad = c.grad;
  a.values.weights = weights;
  if (none) a.values.loss = static_cast<float*>(c.loss), a.values.soft = static_cast<float*>(c.term);
  a.unit = needs_unit ? call.unit : nullptr;
  const char* error = c.student.dtype == DType::f32   ? launch_cosine<float>(device, call.stream, a)
                      : c.student.dtype == DType::f16 ? launch_cosine<Half>(device, call.stream, a)
                                                      : launch_cosine<BFloat16>(device, call.stream, a);
  if (error || none) return error;
  const TotalArgs total{rows, weights, static_cast<float*>(c.loss), static_cast<float*>(c.term), nullptr};
  return launch_total(total, call.stream);
}

}  // namespace
}  // namespace cuda

const char* cosine_loss_cuda(const CudaCosineLoss& call) {
  const char* refusal = cuda::too_large(call.numbers.outer * call.numbers.inner, call.numbers.cols);
  return refusal ? refusal : cuda::launch(call);
}

}  // namespace distil_fast
