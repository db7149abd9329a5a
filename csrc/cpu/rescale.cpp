// rescale.cpp: multiplies a stored gradient by what only backward knows: grad_output, and the unit of an fp16
// gradient. Knows nothing of losses.
#include "dispatch.h"
#include "threads.h"

namespace distil_fast {
namespace {

template <class Real>
void rescale_rows(const Rescale& c) {
  auto sweep = table<Real>().rescale[index(c.grad.dtype)];
  constexpr int64_t block_cols = 16384;
  const int64_t blocks = (c.cols + block_cols - 1) / block_cols, size = size_of(c.grad.dtype);
  for_rows(c.outer * c.inner, c.cols, 64, [&](int64_t row, auto team, std::byte*) {
    char* values = row_at(c.grad, row, c.inner);
    team.each(blocks, [&](int64_t b) {
      const int64_t j = b * block_cols;
      sweep(values + j * size, c.cols - j < block_cols ? c.cols - j : block_cols, c.factor);
    });
  });
}

}  // namespace

void rescale_cpu(const Rescale& call) {
  call.grad.dtype == DType::f64 ? rescale_rows<double>(call) : rescale_rows<float>(call);
}

}  // namespace distil_fast
