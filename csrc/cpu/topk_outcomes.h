// topk_outcomes.h: what a row comes to that compares k columns: its outcomes (the columns, and perhaps a bucket for all
// others) with their probabilities in both models, the divergence over them, and the slopes that a gradient is made of.
// Knows one row's k numbers and the student's mass outside: nothing of rows in memory, weights or labels. Next: topk.cpp;
// docs/math.md, "A top-k teacher".
#pragma once

#include <cmath>
#include <limits>

#include "row_scratch.h"

namespace distil_fast {

// Sum of the student's exponentials outside the ids, relative to a reference.
struct Outside {
  double z, ref;
};

template <class Real>
class Outcomes {
 public:
  // What is found: T times the gradient is slope(i) at an id, and of_tail times the column's exponential elsewhere.
  struct Found {
    int64_t n;     // entries that are no padding
    double p_sum;  // of their probabilities
    double of_q, of_tail;
  };

  Found* found;
  int64_t* ids;        // [k]
  double* logits;      // [k]
  double* block_sums;  // [blocks]: room for them

  static size_t bytes(int64_t cols, int64_t k) {
    return sizeof(Found) + (5 * k + blocks_of(cols)) * sizeof(double) + 3 * padded(k) * sizeof(Real) + 64;
  }
  // All threads of a row see the same memory.
  Outcomes(std::byte* memory, const TopKLoss& call, const Sweeps<Real>& table) : call_(call), table_(table) {
    const int64_t k = call.k;
    found = reinterpret_cast<Found*>(memory);
    ids = reinterpret_cast<int64_t*>(found + 1);
    logits = reinterpret_cast<double*>(ids + k);
    log_p_ = logits + k;
    exp_q_ = log_p_ + k;
    exp_p_ = exp_q_ + k;
    block_sums = exp_p_ + k;
    p_ = reinterpret_cast<Real*>(block_sums + blocks_of(call.row.cols));
    q_ = p_ + padded(k);
    g_ = q_ + padded(k);
  }

  void add(int64_t id, double logit, double log_probability) {
    const int64_t i = found->n++;
    ids[i] = id;
    logits[i] = logit;
    log_p_[i] = log_probability;
    found->p_sum += exp_p_[i] = std::exp(log_probability);
  }

  // Tails that compare the student's own distribution, over all columns.
  double against_all(double t, double ref, const Outside& outside) {
    const double apart = outside.ref == ref ? 0.0 : (outside.ref - ref) / t;
    const double z_ids = exponentiate_ids(t, ref);
    const double z_tail = outside.z * (apart == 0.0 ? 1.0 : std::exp(apart));
    const double z = z_ids + z_tail > 0.0 ? z_ids + z_tail : nan, q_ids = z_ids / z, q_tail = z_tail / z;
    outcomes(t, ref, z, 0.0, 1.0);
    double value, of_tail;
    if (call_.tail == Tail::bucket) {
      const double missing = 1.0 - found->p_sum;
      const double p_tail = missing > 0.0 && !(outside.z == 0.0 && missing <= negligible) ? missing : 0.0;
      const double log_p = found->p_sum < 0.5 ? std::log1p(-found->p_sum) : std::log(p_tail);
      outcome(found->n, p_tail, q_tail, std::log(outside.z) + apart - std::log(z) - log_p);
      const Sums over = diverge(found->n + 1);
      value = over.f - call_.shift * (missing - p_tail);  // 0 unless `missing` is below 0 or negligible
      found->of_q = over.g;
      of_tail = g_[found->n] - q_tail * over.g;
    } else {
      const Sums over = diverge(found->n);
      const double added = call_.shift - over.centre;  // to g, in units of q
      value = over.f - call_.shift * (q_ids - found->p_sum);
      found->of_q = over.g + added * q_tail;
      of_tail = -q_tail * (over.g - added * q_ids);
    }
    found->of_tail = outside.z == 0.0 ? 0.0 : of_tail / outside.z;
    return value;
  }

  // Both models over the ids alone.
  double renormalised(double t) {
    if (found->n == 0) return 0.0;
    double ref = -infinity, ref_p = -infinity, z_p = 0.0;
    for (int64_t i = 0; i < found->n; ++i) {
      ref = std::max(ref, logits[i]);
      ref_p = std::max(ref_p, log_p_[i]);
    }
    for (int64_t i = 0; i < found->n; ++i) z_p += exp_p_[i] = std::exp(log_p_[i] - ref_p);
    outcomes(t, ref, exponentiate_ids(t, ref), ref_p, z_p);
    const Sums over = diverge(found->n);
    found->of_q = over.g;
    return over.f;
  }

  double slope(int64_t i) const { return g_[i] - q_[i] * found->of_q; }

  // Room of 8 bytes for each entry, once the values are known.
  std::byte* room(int64_t i) { return reinterpret_cast<std::byte*>(exp_p_ + i); }

 private:
  static constexpr double infinity = std::numeric_limits<double>::infinity();
  static constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  static constexpr double negligible = 1e-2;  // of mass missing to 1, where the student has none outside: rounding

  struct Sums {
    double f, g, centre;
  };

  static int64_t padded(int64_t k) { return Scratch<Real>::padded(k + 1); }

  // Where probabilities of 0 make a vector's rest harmless.
  void pad(int64_t n) {
    for (int64_t i = n; i < Scratch<Real>::padded(n); ++i) p_[i] = q_[i] = g_[i] = 0;
  }

  // Exponentials of the entries' logits at temperature t, and their sum.
  double exponentiate_ids(double t, double ref) {
    double z = 0.0;
    for (int64_t i = 0; i < found->n; ++i) z += exp_q_[i] = std::exp((logits[i] - ref) / t);
    return z;
  }

  // One outcome: its probabilities, and r = log q - log p.
  void outcome(int64_t i, double p, double q, double r) {
    p_[i] = Real(p);
    q_[i] = Real(q);
    g_[i] = p == 0.0 && q == 0.0 ? Real(0) : Real(r);
  }

  // The ids', of exponentials that sum to z_q and z_p over the distribution.
  void outcomes(double t, double ref_q, double z_q, double ref_p, double z_p) {
    const double rho = std::log(z_q) - (ref_p + std::log(z_p));
    for (int64_t i = 0; i < found->n; ++i)
      outcome(i, exp_p_[i] / z_p, exp_q_[i] / z_q, (logits[i] - ref_q) / t - log_p_[i] - rho);
  }

  // The divergence over n outcomes; r makes room for g.
  Sums diverge(int64_t n) {
    pad(n);
    double centre = table_.centred[call_.row.divergence] ? table_.weighted_difference(q_, g_, n) : 0.0;
    if (!std::isfinite(centre)) centre = 0.0;
    const Divide by{1.0, 1.0, 1.0, 0.0, call_.row.parameters[0], call_.row.parameters[1], centre};
    Sums sums{0.0, 0.0, centre};
    table_.diverge[call_.row.divergence](q_, p_, g_, n, by, &sums.f, &sums.g, Ahead{});
    return sums;
  }

  double *log_p_, *exp_q_, *exp_p_;  // [k]; exponentials relative to references of their own
  Real *p_, *q_, *g_;                // [k + 1]; g begins as r
  const TopKLoss& call_;
  const Sweeps<Real>& table_;
};

}  // namespace distil_fast
