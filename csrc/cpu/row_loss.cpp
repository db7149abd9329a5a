// row_loss.cpp: the row losses of teachers with a number for each column, in either precision. Next: row_loss.h.
#include "row_loss.h"

namespace distil_fast {

Fault row_loss_cpu(const RowLoss& call) {
  if (call.student.dtype == DType::f64) return RowLossCall<double>(call).run();
  return RowLossCall<float>(call).run();
}

}  // namespace distil_fast
