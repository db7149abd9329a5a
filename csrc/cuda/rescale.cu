// rescale.cu: multiplies a stored gradient by what only backward knows: grad_output, and the unit of an fp16 gradient.
// Both are read on the device; where nothing remains to be applied, the gradient is not touched. Also: which devices there
// are. Next: slice.cuh.
#include "plan.h"

namespace distil_fast {
namespace cuda {
namespace {

constexpr int rescale_threads = 256, rescale_groups = 8 * rescale_threads;  // of a block at a time

struct RescaleArgs {
  int64_t rows = 0, inner = 0, cols = 0;
  Matrix grad;
  const float *grad_output = nullptr, *unit = nullptr;
};

template <class S>
DISTIL_FAST_KERNEL(rescale_threads, 4)
rescale_kernel(DISTIL_FAST_ARGS(RescaleArgs) a) {
  constexpr int W = group_size<S>;
  const float factor = *a.grad_output * (a.unit ? *a.unit : 1.0f);  // the unit is a power of two: nothing is rounded
  if (factor == 1.0f) return;
  const int64_t parts = over(a.cols + W - 1, static_cast<int64_t>(rescale_groups) * W);
  for (int64_t task = hw::block(); task < a.rows * parts; task += hw::blocks()) {
    char* row = const_cast<char*>(row_at(a.grad, static_cast<int>(task / parts), a.inner));
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(S));
    const Slice slice{0, static_cast<int>(a.cols), shift, static_cast<int>(over(a.cols + shift, W))};
    const Source<S, W> from(row, slice);
    const Sink<S> to(row, slice);
    const int first = static_cast<int>(task % parts) * rescale_groups;
    const int last = static_cast<int>(smaller(first + rescale_groups, slice.groups));
    for (int g = first + hw::thread(); g < last; g += hw::threads()) {
      float x[W];
      from.load(slice, g, x);
#pragma unroll
      for (int l = 0; l < W; ++l) x[l] *= factor;
      to.store(slice, g, x);
    }
  }
}

template <class S>
const char* launch(const hw::Device& device, const CudaRescale& call) {
  const Rescale& c = call.numbers;
  const RescaleArgs a{c.outer * c.inner, c.inner, c.cols, c.grad, call.grad_output, call.unit};
  const int64_t parts = over(c.cols + group_size<S> - 1, rescale_groups * group_size<S>);
  const int64_t blocks = smaller(a.rows * parts, 8 * static_cast<int64_t>(device.multiprocessors));
  return hw::Kernel<RescaleArgs>(rescale_kernel<S>, {static_cast<int>(blocks), rescale_threads, 1, 0, call.stream})
      .launch(a);
}

const char* launch(const CudaRescale& call) {
  const Rescale& c = call.numbers;
  if (const char* refusal = too_large(c.outer * c.inner, c.cols)) return refusal;
  hw::Device device;
  if (const char* error = hw::device(&device)) return error;
  if (c.grad.dtype == DType::f32) return launch<float>(device, call);
  return c.grad.dtype == DType::f16 ? launch<Half>(device, call) : launch<BFloat16>(device, call);
}

}  // namespace
}  // namespace cuda

const char* rescale_cuda(const CudaRescale& call) { return cuda::launch(call); }

int devices_cuda(const char** why) { return hw::devices(why); }

}  // namespace distil_fast
