// row_loss_f16.cu: the row loss' kernels for students of f16. Next: row_loss_kernels.h.
#include "row_loss_kernels.h"

namespace distil_fast::cuda {
DISTIL_FAST_ROW_LOSS_KERNELS(Half)
}  // namespace distil_fast::cuda
