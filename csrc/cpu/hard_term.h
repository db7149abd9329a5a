// hard_term.h: the hard term of one row: cross-entropy with its label, label smoothing and z-loss, and what the gradient
// is at the label, without the subtraction of 1 from a probability near it. All at temperature 1.
// Knows one row: nothing of weights, masks or threads. Next: row_loss.cpp; docs/math.md, "The two terms".
#pragma once

#include "row_scratch.h"

namespace distil_fast {

template <class Real>
class HardTerm {
 public:
  // A label of -1: the row has no hard term.
  HardTerm(const Sweeps<Real>& table, const RowLoss& call, Logits student, int64_t label, const Row& sums,
           const Scratch<Real>& w, double t, Hard kind)
      : table_(table), student_(student), label_(label), cols_(call.cols), sums_(sums), w_(w) {
    if (label < 0) return;
    smoothing_ = call.label_smoothing;
    z_loss_ = call.z_loss;
    lse_ = std::log(sums.z_h) + sums.ref_s;
    shifted_ = table.shifted_sum[student.dtype](student.at(label), 1, 0.0) - sums.ref_s;
    own_ = std::exp(shifted_);
    rest_ = all_but_own(kind == Hard::linear ? t : 1.0);
  }

  double value() const {
    const double nll = own_ > rest_ ? std::log1p(rest_ / own_) : std::log(sums_.z_h) - shifted_;
    const double penalty = z_loss_ == 0.0 ? 0.0 : z_loss_ * lse_ * lse_;
    return smoothing_ == 0.0 ? nll + penalty : (1.0 - smoothing_) * nll + smoothing_ * uniform() + penalty;
  }

  // The gradient: of_softmax() softmax_k + constant() at every column, at_label() at the label's.
  double of_softmax() const { return label_ < 0 ? 0.0 : 1.0 + z_slope(); }
  double constant() const { return label_ < 0 ? 0.0 : -smoothing_ / static_cast<double>(cols_); }
  double at_label() const { return smoothing_ + constant() + (z_slope() * own_ - rest_) / sums_.z_h; }

 private:
  double z_slope() const { return z_loss_ == 0.0 ? 0.0 : 2.0 * z_loss_ * lse_; }

  // Sum of the exponentials of all columns but the label's, relative to the row's reference. By subtraction, unless the
  // label has most of the mass: then its block is summed anew, because 1 - p would have lost its digits.
  double all_but_own(double t) const {
    if (!(own_ > 0.5 * sums_.z_h)) return sums_.z_h - own_;
    double rest = 0.0;
    for (int64_t b = 0; b < blocks_of(cols_); ++b) {
      const int64_t from = block_start(b), to = from + block_size(cols_, b);
      if (label_ < from || label_ >= to) {
        rest += w_.blocks[b].z_h * fade(w_.blocks[b].ref_s, sums_.ref_s, t);
      } else {
        auto sum = table_.exponential_sum[student_.dtype];
        rest += sum(student_.at(from), label_ - from, sums_.ref_s);
        rest += sum(student_.at(label_ + 1), to - label_ - 1, sums_.ref_s);
      }
    }
    return rest;
  }

  // Cross-entropy with the uniform distribution.
  double uniform() const {
    double total = 0.0;
    for (int64_t b = 0; b < blocks_of(cols_); ++b)
      total += table_.shifted_sum[student_.dtype](student_.at(block_start(b)), block_size(cols_, b), sums_.ref_s);
    return std::log(sums_.z_h) - total / static_cast<double>(cols_);
  }

  const Sweeps<Real>& table_;
  const Logits student_;
  const int64_t label_, cols_;
  const Row& sums_;
  const Scratch<Real>& w_;
  double smoothing_ = 0.0, z_loss_ = 0.0;
  double lse_ = 0.0, shifted_ = 0.0, own_ = 0.0, rest_ = 0.0;
};

}  // namespace distil_fast
