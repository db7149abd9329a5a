// row_loss.cu: the row losses' launches: weights, rows, total. Knows no kernel's inside. Next: row_loss.cuh.
#include "row_launch.h"
#include "row_loss_kernels.h"

namespace distil_fast {
namespace cuda {
namespace {

RowLossKernel kernel_of(DType dtype, int divergence, Kind kind) {
  if (dtype == DType::f32) return row_loss_kernel_of<float>(divergence, kind);
  return dtype == DType::f16 ? row_loss_kernel_of<Half>(divergence, kind)
                             : row_loss_kernel_of<BFloat16>(divergence, kind);
}

bool same(const Transform& t) { return t.scale == 1.0 && t.cap == 0.0; }

const char* launch(const CudaRowLoss& call) {
  const RowLoss& c = call.numbers;
  const int64_t rows = c.outer * c.inner;
  const RowWeights weights = RowWeights::at(call.workspace, rows);
  if (const char* error = launch_weights(weigh_args(call, weights), call.stream)) return error;

  RowLossArgs a;
  set_row_args(call, weights, &a);
  a.any.checked = c.teacher.data && c.teacher_form != TeacherForm::logits;
  a.any.most = static_cast<float>(mass_limit(c.teacher.dtype));
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
  return launch_values(call, weights, a.any.checked);
}

}  // namespace
}  // namespace cuda

int64_t row_workspace_cuda(int64_t rows) { return cuda::RowWeights::ahead + cuda::RowWeights::vectors * rows; }

const char* row_loss_cuda(const CudaRowLoss& call) {
  const char* refusal = cuda::too_large(call.numbers.outer * call.numbers.inner, call.numbers.cols);
  return refusal ? refusal : cuda::launch(call);
}

}  // namespace distil_fast
