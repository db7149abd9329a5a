// softmax.cu: the launches of softmax.cuh, one kernel each. Next: softmax.cuh.
#include "plan.h"
#include "softmax.cuh"

namespace distil_fast {
namespace cuda {
namespace {

template <class S>
const char* launch(const hw::Device& device, void* stream, const SoftmaxArgs& a) {
  constexpr int W = group_size<S>;
  const bool backward = a.grad_out.data;
  Plan plan;
  plan_rows(device, a.cols, W, sizeof(S), backward ? sizeof(S) : 0, 0, stream, &plan);
  return launch_rows<SoftmaxArgs>(
      backward ? softmax_kernel<SoftmaxBackwardRows<S>, W> : softmax_kernel<SoftmaxForward<S>, W>, plan, a);
}

template <class Call>
const char* launch(const CudaTemperature<Call>& call, const Matrix& in, const Matrix& grad_out, const Matrix& out) {
  const Call& c = call.numbers;
  if (const char* refusal = too_large(c.outer * c.inner, c.cols)) return refusal;
  SoftmaxArgs a;
  a.rows = static_cast<int>(c.outer * c.inner), a.inner = c.inner, a.cols = c.cols;
  a.in = in, a.grad_out = grad_out, a.out = out;
  a.logarithm = c.logarithm;
  a.temperatures = static_cast<const float*>(c.temperatures);
  a.temperature = call.temperature, a.number = static_cast<float>(c.temperature);
  hw::Device device;
  if (const char* error = hw::device(&device)) return error;
  if (in.dtype == DType::f32) return launch<float>(device, call.stream, a);
  return in.dtype == DType::f16 ? launch<Half>(device, call.stream, a) : launch<BFloat16>(device, call.stream, a);
}

}  // namespace
}  // namespace cuda

const char* softmax_cuda(const CudaTemperature<Softmax>& call) {
  return cuda::launch(call, call.numbers.logits, {}, call.numbers.out);
}

const char* softmax_backward_cuda(const CudaTemperature<SoftmaxBackward>& call) {
  return cuda::launch(call, call.numbers.out, call.numbers.grad_out, call.numbers.grad);
}

}  // namespace distil_fast
