// softmax.cpp: softmax and log_softmax at a temperature, and their backward, over rows that stay in cache.
// Conducts sweeps of one block each; knows no instruction set. Next: softmax.h.
#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.h"
#include "shares.h"
#include "threads.h"

namespace distil_fast {
namespace {

constexpr int64_t block_cols = 1024;

template <class Call, class Real>
Fault check_temperatures(const Call& c, const Temperatures<Real>& t) {
  for (int64_t row = 0; row < c.outer * c.inner; ++row)
    if (!valid_temperature(t[row])) return {FaultKind::temperature, row, t[row]};
  return {};
}

template <class Real>
Fault softmax_rows(const Softmax& c) {
  const Temperatures<Real> temperature{c.temperatures, c.temperature};
  if (Fault fault = check_temperatures(c, temperature); fault.kind != FaultKind::nothing) return fault;
  const Table<Real>& sweeps = table<Real>();
  const int s = index(c.logits.dtype);
  const int64_t size = size_of(c.logits.dtype), blocks = (c.cols + block_cols - 1) / block_cols;
  const size_t es_bytes = blocks * block_cols * sizeof(Real);

  for_rows(c.outer * c.inner, c.cols, es_bytes + blocks * sizeof(Block<Real>),
           [&](int64_t row, auto team, std::byte* memory) {
             Real* es = reinterpret_cast<Real*>(memory);
             Block<Real>* block = reinterpret_cast<Block<Real>*>(memory + es_bytes);
             const char* logits = row_at(c.logits, row, c.inner);
             char* out = row_at(c.out, row, c.inner);
             const double t = temperature[row];
             const char* next = row_at(c.logits, row + 1 < c.outer * c.inner ? row + 1 : row, c.inner);
             const int quarters = c.logarithm ? 4 : 2;  // of the next row, fetched in each sweep that can
             auto ahead = [&](int64_t b, int first) {
               const int64_t at = (first * c.cols + quarters * b * block_cols) / 4;
               return Ahead{next + at * size, nullptr, quarters * size, 0};
             };
             auto size_at = [&](int64_t b) { return std::min(block_cols, c.cols - b * block_cols); };
             auto sweep = [&](int64_t b, double reference) {
               const int64_t j = b * block_cols;
               block[b] = Block<Real>{Real(reference), 0, 0, 0, 0};
               sweeps.rows.exponentiate_alone[s](logits + j * size, size_at(b), t, es + j, block + b, ahead(b, 0));
             };
             const double first = sweeps.rows.maximum[s](logits, size_at(0));
             team.each(blocks, [&](int64_t b) {
               sweep(b, first);
               if (!block[b].in_range()) sweep(b, sweeps.rows.maximum[s](logits + b * block_cols * size, size_at(b)));
             });
             double top = block[0].ref_s, z = 0.0;
             for (int64_t b = 1; b < blocks; ++b) top = std::max<double>(top, block[b].ref_s);
             auto fade = [&](int64_t b) { return std::exp((block[b].ref_s - top) / t); };
             for (int64_t b = 0; b < blocks; ++b) z += block[b].z_s * fade(b);
             if (z == 0.0) z = std::numeric_limits<double>::quiet_NaN();  // a row without a finite logit
             team.each(blocks, [&](int64_t b) {
               const int64_t j = b * block_cols;
               if (c.logarithm)
                 sweeps.softmax.log_probabilities[s](out + j * size, logits + j * size, size_at(b), top, 1.0 / t,
                                                     std::log(z));
               else
                 sweeps.rows.gradient_alone[s](out + j * size, nullptr, es + j, es + j, size_at(b),
                                               Combine{0.0, 0.0, fade(b) / z, 0.0, 0.0}, ahead(b, 2));
             });
           });
  return {};
}

template <class Real>
void softmax_backward_rows(const SoftmaxBackward& c) {
  const Temperatures<Real> temperature{c.temperatures, c.temperature};
  const SoftmaxSweeps<dtypes<Real>>& sweeps = table<Real>().softmax;
  const int s = index(c.out.dtype);
  const int64_t size = size_of(c.out.dtype), blocks = (c.cols + block_cols - 1) / block_cols;

  for_rows(c.outer * c.inner, c.cols, blocks * sizeof(double), [&](int64_t row, auto team, std::byte* memory) {
    double* sums = reinterpret_cast<double*>(memory);
    const char *out = row_at(c.out, row, c.inner), *upstream = row_at(c.grad_out, row, c.inner);
    char* grad = row_at(c.grad, row, c.inner);
    auto size_at = [&](int64_t b) { return std::min(block_cols, c.cols - b * block_cols); };
    team.each(blocks, [&](int64_t b) {
      const int64_t j = b * block_cols * size;
      sums[b] = sweeps.upstream_sum[s][c.logarithm](out + j, upstream + j, size_at(b));
    });
    double total = 0.0;
    for (int64_t b = 0; b < blocks; ++b) total += sums[b];
    team.each(blocks, [&](int64_t b) {
      const int64_t j = b * block_cols * size;
      sweeps.gradient[s][c.logarithm](grad + j, out + j, upstream + j, size_at(b), total, 1.0 / temperature[row]);
    });
  });
}

}  // namespace

Fault softmax_cpu(const Softmax& call) {
  return call.logits.dtype == DType::f64 ? softmax_rows<double>(call) : softmax_rows<float>(call);
}

void softmax_backward_cpu(const SoftmaxBackward& call) {
  call.out.dtype == DType::f64 ? softmax_backward_rows<double>(call) : softmax_backward_rows<float>(call);
}

}  // namespace distil_fast
