// topk.cu: the launch of the row loss with a top-k teacher, between what all row losses have before and after. Knows no
// kernel's inside. Next: topk.cuh.
#include "topk.cuh"

#include "plan.h"
#include "row_launch.h"

namespace distil_fast {
namespace cuda {
namespace {

using TopKLossKernel = void (*)(const TopKLossArgs);

TopKLossKernel kernel_of(DType dtype) {
  if (dtype == DType::f32) return topk_loss_kernel<float>;
  return dtype == DType::f16 ? topk_loss_kernel<Half> : topk_loss_kernel<BFloat16>;
}

// The columns' bits lie behind the stages, and are taken off what stages may use.
bool plan_topk(hw::Device device, const RowLoss& c, void* stream, Plan* plan, TopKLossArgs* args) {
  const int64_t scratch = over(topk_scratch(c.cols), 128) * 128;
  if (scratch > device.shared_per_block - stages_at) return false;
  device.shared_per_block -= static_cast<int>(scratch);
  const int size = size_of(c.student.dtype);
  plan_rows(device, c.cols, 16 / size, size, 0, 0, stream, plan);
  args->scratch_at = plan->launch.shared;
  plan->launch.shared += static_cast<int>(scratch);
  return true;
}

const char* launch(const CudaTopKLoss& call) {
  CudaRowLoss rows = call.rows;
  RowLoss& c = rows.numbers;
  c.teacher.data = const_cast<void*>(call.teacher.log_probs);  // there is a soft term
  const RowWeights weights = RowWeights::at(rows.workspace, c.outer * c.inner);
  TopKLossArgs a;
  set_row_args(rows, weights, &a);
  a.k = static_cast<int>(call.teacher.k), a.ids = call.teacher.ids;
  a.log_probs = static_cast<const float*>(call.teacher.log_probs);
  a.tolerance = static_cast<float>(call.teacher.tolerance);
  a.tail = call.teacher.tail, a.shift = static_cast<float>(call.teacher.shift);
  hw::Device device;
  if (const char* error = hw::device(&device)) return error;
  Plan plan;
  if (!plan_topk(device, c, rows.stream, &plan, &a)) return "more columns in a row than shared memory has bits";
  if (const char* error = launch_weights(weigh_args(rows, weights), rows.stream)) return error;
  if (const char* error = launch_rows(kernel_of(c.student.dtype), plan, a)) return error;
  return launch_values(rows, weights, true);
}

}  // namespace
}  // namespace cuda

const char* topk_loss_cuda(const CudaTopKLoss& call) {
  const RowLoss& c = call.rows.numbers;
  if (call.teacher.k > (1 << 30)) return "more than 2^30 entries in a row";
  const char* refusal = cuda::too_large(c.outer * c.inner, c.cols);
  return refusal ? refusal : cuda::launch(call);
}

}  // namespace distil_fast
