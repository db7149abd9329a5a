// row_loss_f32.cu: the row loss' kernels for students of f32. Next: row_loss_kernels.h.
#include "row_loss_kernels.h"

namespace distil_fast::cuda {
DISTIL_FAST_ROW_LOSS_KERNELS(float)
}  // namespace distil_fast::cuda
