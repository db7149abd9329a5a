// row_loss_bf16.cu: the row loss' kernels for students of bf16. Next: row_loss_kernels.h.
#include "row_loss_kernels.h"

namespace distil_fast::cuda {
DISTIL_FAST_ROW_LOSS_KERNELS(BFloat16)
}  // namespace distil_fast::cuda
