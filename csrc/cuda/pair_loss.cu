// pair_loss.cu: the launches of the losses that compare two tensors: of the cosine, norms where the gradient is fp16; then
// weights, rows, total. Next: pair.cuh and cosine.cuh.
#include "cosine.cuh"
#include "plan.h"

namespace distil_fast {
namespace cuda {
namespace {

const char* launch_norms(const hw::Device& device, const CudaPairLoss& call, int rows, float* norms) {
  const PairLoss& c = call.numbers;
  const NormArgs a{rows, c.inner, c.cols, c.student, c.mask, c.mask_is_bool, {c.weight, call.weight}, norms};
  const int64_t blocks = smaller(rows, 16 * static_cast<int64_t>(device.multiprocessors));
  return hw::Kernel<NormArgs>(norm_kernel, {static_cast<int>(blocks), 128, 1, stages_at, call.stream}).launch(a);
}

const char* weigh(const CudaPairLoss& call, int rows, const RowWeights& weights, const float* norms) {
  const PairLoss& c = call.numbers;
  WeighArgs a;
  a.rows = rows, a.cols = c.cols;
  a.has_soft = true;
  a.mask = c.mask, a.mask_is_bool = c.mask_is_bool;
  a.temperature = {1.0 / (pair_unit * c.scale), nullptr};  // what a gradient is divided by, where it has no norm
  a.soft_weight = {c.weight, call.weight}, a.soft_count = {c.count, call.count}, a.hard_count = {0.0, nullptr};
  a.mean = c.reduction == Reduction::mean;
  a.upstream = static_cast<const float*>(c.upstream);
  a.norms = norms, a.needs_unit = c.grad.data && c.grad.dtype == DType::f16;
  a.out = weights, a.unit = call.unit, a.fault = call.fault;
  return launch_weights(a, call.stream);
}

template <class S>
void (*kernel_of(PairKind kind))(const PairArgs) {
  switch (kind) {
#define DISTIL_FAST_PAIR_CASE(name, Pair) \
  case PairKind::name:                    \
    return entries_kernel<S, Pair>;
    DISTIL_FAST_PAIRS(DISTIL_FAST_PAIR_CASE)
#undef DISTIL_FAST_PAIR_CASE
    case PairKind::cosine:
      break;
  }
  return cosine_kernel<S>;
}

template <class S>
const char* launch_pairs(const hw::Device& device, const CudaPairLoss& call, const PairArgs& a) {
  constexpr int W = group_size<S>;
  Plan plan;
  plan_rows(device, a.cols, W, sizeof(S), size_of(a.teacher.dtype), 0, call.stream, &plan);
  return launch_rows<PairArgs>(kernel_of<S>(call.numbers.kind), plan, a);
}

const char* launch(const CudaPairLoss& call) {
  const PairLoss& c = call.numbers;
  hw::Device device;
  if (const char* error = hw::device(&device)) return error;
  const int rows = static_cast<int>(c.outer * c.inner);
  const RowWeights weights = RowWeights::at(call.workspace, rows);
  const bool needs_unit = c.grad.data && c.grad.dtype == DType::f16 && !c.upstream;
  // norms go to a vector that nobody uses until the rows are done
  float* norms = needs_unit && c.kind == PairKind::cosine ? weights.hard_value : nullptr;
  if (norms)
    if (const char* error = launch_norms(device, call, rows, norms)) return error;
  if (const char* error = weigh(call, rows, weights, norms)) return error;

  const bool none = c.reduction == Reduction::none;
  PairArgs a;
  a.rows = rows, a.inner = c.inner, a.cols = c.cols;
  a.student = c.student, a.teacher = c.teacher, a.grad = c.grad;
  a.scale = static_cast<float>(c.scale);
  a.values.weights = weights;
  if (none) a.values.loss = static_cast<float*>(c.loss), a.values.soft = static_cast<float*>(c.term);
  a.unit = needs_unit ? call.unit : nullptr;
  const char* error = c.student.dtype == DType::f32   ? launch_pairs<float>(device, call, a)
                      : c.student.dtype == DType::f16 ? launch_pairs<Half>(device, call, a)
                                                      : launch_pairs<BFloat16>(device, call, a);
  if (error || none) return error;
  const TotalArgs total{rows, weights, static_cast<float*>(c.loss), static_cast<float*>(c.term), nullptr};
  return launch_total(total, call.stream);
}

}  // namespace
}  // namespace cuda

const char* pair_loss_cuda(const CudaPairLoss& call) {
  const char* refusal = cuda::too_large(call.numbers.outer * call.numbers.inner, call.numbers.cols);
  return refusal ? refusal : cuda::launch(call);
}

}  // namespace distil_fast
