// shares.h: each row's share in a term: what mask, denominator and reduction come to, in one number per row.
// The one home of these conventions on the CPU: a row whose share is 0 is not used, and never read.
// Knows nothing of logits. Next: row_call.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "../core.h"

namespace distil_fast {

template <class Real>
struct Mask {
  const void* data;  // null: every row
  bool is_bool;

  double operator[](int64_t row) const {
    if (!data) return 1.0;
    return is_bool ? static_cast<const bool*>(data)[row] : static_cast<const Real*>(data)[row];
  }
};

// What a row's mask is multiplied with: 1 / denominator for a mean, 0 where that is 0, else 1.
inline double scale_of(Reduction reduction, double given_count, double counted) {
  if (reduction != Reduction::mean) return 1.0;
  const double count = given_count >= 0 ? given_count : counted;
  return count > 0 ? 1.0 / count : 0.0;
}

// The mask's sum, or the first token weight that is negative or not finite.
template <class Real>
Fault count_mask(const Mask<Real>& mask, int64_t rows, double* counted) {
  *counted = static_cast<double>(rows);
  if (!mask.data) return {};
  *counted = 0.0;
  for (int64_t row = 0; row < rows; ++row) {
    const double weight = mask[row];
    if (!(weight >= 0.0) || std::isinf(weight)) return {FaultKind::mask, row, weight};
    *counted += weight;
  }
  return {};
}

// What each row counts in the hard term: 0 without a label, else 1, or its label's class weight.
template <class Real>
struct Labels {
  const int64_t* data;
  int64_t ignore_index;
  const Real* class_weights;  // [cols]; null: 1

  double operator[](int64_t row) const {
    if (data[row] == ignore_index) return 0.0;
    return class_weights ? class_weights[data[row]] : 1.0;
  }
};

// Their sum, or the first class weight that is negative or not finite, or the first label that is not a column.
template <class Real>
Fault count_labels(const Labels<Real>& labels, int64_t rows, int64_t cols, double* counted) {
  for (int64_t column = 0; labels.class_weights && column < cols; ++column) {
    const double weight = labels.class_weights[column];
    if (!(weight >= 0.0) || std::isinf(weight)) return {FaultKind::class_weight, column, weight};
  }
  *counted = 0.0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t label = labels.data[row];
    if (label == labels.ignore_index) continue;
    if (label < 0 || label >= cols) return {FaultKind::label, row, static_cast<double>(label)};
    *counted += labels[row];
  }
  return {};
}

// The unit that an fp16 gradient is stored in, from the largest weight of a row: a power of two, so that
// applying it later is exact. A row's gradient is mostly below its weight, so a unit 64 times smaller than
// the weight keeps small probabilities out of fp16's subnormals, and leaves room for gradients 1000 times
// larger (reverse KL).
inline double unit_of(double largest_weight) {
  if (!(largest_weight > 0.0) || std::isinf(largest_weight)) return 1.0;
  return std::exp2(std::ceil(std::log2(largest_weight)) - 6.0);
}

// The temperature of each row: one for all, or one per row.
template <class Real>
struct Temperatures {
  const void* data;  // null: `one`
  double one;

  double operator[](int64_t row) const { return data ? static_cast<const Real*>(data)[row] : one; }
};

// Bounds that keep 1 / T, T^2 and their products with a share inside a float.
inline bool valid_temperature(double t) { return t >= 1e-15 && t <= 1e15; }

}  // namespace distil_fast
