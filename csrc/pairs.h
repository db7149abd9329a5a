// pairs.h: THE MATHS of losses that compare two tensors entry by entry, one functor each: (s, t) -> {f, first, g}, with
// the row's value = sum f + sum first, and g its derivative by s. `first` is what is of first order in s - t and cancels
// over the row: its sum is to be exact. Knows nothing of rows, scales, dtypes or vector width; `V` is a vector of any
// width or a scalar, as in divergences.h. Derivations and limits: docs/math.md, section 9.
#pragma once

#ifndef DISTIL_FAST_FN
#define DISTIL_FAST_FN inline
#endif

namespace distil_fast {

template <class V>
struct PairTerms {
  V f, first, g;
};

// (s - t)^2; an entry that is -inf in both counts 0.
struct SquaredDifference {
  static constexpr bool has_first = false;
  template <class V>
  DISTIL_FAST_FN PairTerms<V> operator()(V s, V t) const {
    constexpr double lowest = sizeof(typename V::Real) == sizeof(double) ? -__DBL_MAX__ : -__FLT_MAX__;
    V e = select(select(s < V(lowest), t, V(0)) < V(lowest), V(0), s - t);
    return {e * e, V(0), e + e};
  }
};

// p (log p - log q), p the teacher's probability and q the student's. With x = (q - p) / p that is p (x - log1p(x)), of
// second order in x, plus p - q, which is exact where x is small. Where it is not, nothing cancels: all of it is in f.
struct ProbabilityKL {
  static constexpr bool has_first = true;

  template <class V>
  DISTIL_FAST_FN PairTerms<V> operator()(V s, V t) const {
    V q = probability(s), p = probability(t), x = (q - p) / p;
    auto close = abs(x) < V(0.25);
    V f = select(close, V(0) - log1p_tail(x), log_ratio(p, q));
    auto none = is_zero(p);  // then it does not matter what q is
    return {select(none, V(0), p * f), select(close, p - q, V(0)), select(none, V(0), V(0) - p / q)};
  }

  // nan for what is no probability. The upper bound is generous; it keeps the quotient of `log_ratio` in range.
  template <class V>
  DISTIL_FAST_FN static V probability(V x) {
    return select(x < V(0), V(__builtin_nan("")), select(V(0x1p40) < x, V(__builtin_nan("")), x));
  }

  // log p - log q by one quotient. What is below 2^-63 is taken 2^64 times larger, so that the quotient is a normal
  // number even of subnormal ones.
  template <class V>
  DISTIL_FAST_FN static V log_ratio(V p, V q) {
    constexpr double small = 0x1p-63, times = 0x1p64, log_times = 44.3614195558365;
    auto small_p = p < V(small), small_q = q < V(small);
    V ratio = select(small_p, p * V(times), p) / select(small_q, q * V(times), q);
    V shift = select(small_q, V(log_times), V(0)) - select(small_p, V(log_times), V(0));
    return select(is_zero(q), V(__builtin_inf()), log(ratio) + shift);
  }
};

// The table: its order is that of PairKind, after cosine.
#define DISTIL_FAST_PAIRS(X) X(squared, SquaredDifference) X(kl, ProbabilityKL)

}  // namespace distil_fast
