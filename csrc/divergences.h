// divergences.h: THE MATHS. A divergence is (r, p, q) -> (f, g), with p the teacher's probability, q the student's and
// r = log q - log p; D = sum f, and g = df / dlog q up to c q, with c such that g = 0 where p = q.
// It knows nothing of softmax, temperature, dtype, vector width, labels or reduction. `V` is a vector of any width or a
// scalar; its vocabulary (select, abs, min, exp, log_and, expm1, ...) belongs to V. `centred` says that g grows with r: it is then taken
// relative to `centre`, the row's estimate of D, so that nothing cancels later. Derivations: docs/math.md.
#pragma once

#ifndef DISTIL_FAST_FN
#define DISTIL_FAST_FN inline
#endif

namespace distil_fast {

template <class V>
struct Terms {
  V f, g;
};

// weight * factor, where a weight of 0 wins over an infinite or undefined factor: 0 log 0 = 0.
template <class V>
DISTIL_FAST_FN V times(V weight, V factor) {
  return select(is_zero(weight), V(0), weight * factor);
}

// KL(p || q): f = p (expm1(r) - r), g = q - p. As r -> 0 both are computed from r alone, without
// cancellation.
struct ForwardKL {
  static constexpr bool centred = false;
  double unused, also_unused, centre;
  template <class V>
  DISTIL_FAST_FN Terms<V> operator()(V r, V p, V q) const {
    V tail = expm1_tail(r);  // expm1(r) - r
    V gap = q - p;
    auto close = abs(r) < V(0.5);
    return {select(close, p * tail, gap - times(p, r)), select(close, p * (r + tail), gap)};
  }
};

// KL(q || p): f = q (r + expm1(-r)), g = q (r - centre).
struct ReverseKL {
  static constexpr bool centred = true;
  double unused, also_unused, centre;
  template <class V>
  DISTIL_FAST_FN Terms<V> operator()(V r, V p, V q) const {
    V far = times(q, r) + (p - q);
    return {select(abs(r) < V(0.5), q * expm1_tail(V(0) - r), far), times(q, r - V(centre))};
  }
};

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; g = (1 - beta) q (log q - log m).
struct JensenShannon {
  static constexpr bool centred = false;
  double beta, unused, centre;
  template <class V>
  DISTIL_FAST_FN Terms<V> operator()(V r, V p, V q) const {
    V b = V(beta), c = V(1.0 - beta), far = V(80);            // beyond e^80 the other side has no weight left
    V log_p_m = V(0) - log1p(c * expm1(min(r, far)));         // log p - log m
    V log_q_m = V(0) - log1p(b * expm1(min(V(0) - r, far)));  // log q - log m
    V g = c * times(q, log_q_m);
    return {b * times(p, log_p_m) + g, g};
  }
};

// q - p, from r alone as r -> 0.
template <class V>
DISTIL_FAST_FN V gap_of(V r, V p, V q) {
  return select(abs(r) < V(0.5), p * (r + expm1_tail(r)), q - p);
}

// sum |p - q| / 2: g = q sign(q - p) / 2.
struct TotalVariation {
  static constexpr bool centred = false;
  double unused, also_unused, centre;
  template <class V>
  DISTIL_FAST_FN Terms<V> operator()(V r, V p, V q) const {
    V gap = gap_of(r, p, q), half = V(0.5) * q;
    V g = select(V(0) < gap, half, select(gap < V(0), V(0) - half, V(0) * gap));  // nan stays nan
    return {V(0.5) * abs(gap), g};
  }
};

// Of a mixture m = weight a + (1 - weight) b, from r = log b - log a: b / a, m / a - 1, m / a and log(m / a). Where b is
// the smaller and m / a - 1 near -1, m / a is summed from its two parts, which are positive.
template <class V>
struct Mixture {
  V ratio, excess, mixed, logarithm;
};

template <class V>
DISTIL_FAST_FN Mixture<V> mixture(double weight, V r) {
  V other = V(1.0 - weight), bounded = min(r, V(80));  // beyond e^80 the other side has no weight left
  V ratio = exp(bounded), excess = other * expm1(bounded);
  auto cancels = excess < V(-0.5);
  V mixed = max(select(cancels, V(weight) + other * ratio, V(1) + excess), V(1e-30));
  V lost = select(cancels, V(0), (excess - (mixed - V(1))) / mixed);
  return {ratio, excess, mixed, log_and(mixed, lost)};
}

// KL(p || m), m = alpha p + (1 - alpha) q: f = p (expm1(l) - l) with l = log m - log p,
// g = (1 - alpha)^2 (q - p) q / m.
struct SkewedKL {
  static constexpr bool centred = false;
  double alpha, unused, centre;
  template <class V>
  DISTIL_FAST_FN Terms<V> operator()(V r, V p, V q) const {
    V c = V(1.0 - alpha), gap = gap_of(r, p, q);
    Mixture<V> m = mixture(alpha, r);
    V l = m.logarithm, f = select(abs(l) < V(0.5), p * expm1_tail(l), c * gap - times(p, l));
    return {f, times(c * c * gap, m.ratio / m.mixed)};
  }
};

// KL(q || m), m = alpha q + (1 - alpha) p: f = q (expm1(l) - l) with l = log m - log q,
// g = q (alpha (1 - q / m) - l).
struct SkewedReverseKL {
  static constexpr bool centred = false;
  double alpha, unused, centre;
  template <class V>
  DISTIL_FAST_FN Terms<V> operator()(V r, V p, V q) const {
    V c = V(1.0 - alpha);
    Mixture<V> m = mixture(alpha, V(0) - r);
    V l = m.logarithm, from_m = m.excess / m.mixed;  // 1 - q / m
    auto close = abs(l) < V(0.5);
    V slope = select(close, V(0) - expm1_tail(V(0) - l) - c * from_m, V(alpha) * from_m - l);
    return {select(close, q * expm1_tail(l), c * (p - q) - times(q, l)), times(q, slope)};
  }
};

// The alpha-beta divergence: f = (a/(a+b) p^(a+b) + b/(a+b) q^(a+b) - p^a q^b) / (a b), g = (q^(a+b) - p^a q^b) / a.
// The larger probability's power a + b is a factor of both; what is left is exponentials of |r|, and the smaller
// probability need not be a float.
struct AlphaBeta {
  static constexpr bool centred = false;
  double alpha, beta, centre;
  template <class V>
  DISTIL_FAST_FN Terms<V> operator()(V r, V p, V q) const {
    V top = max(p, q), d = abs(r), both = V(alpha + beta);
    auto nothing = is_zero(top);
    auto q_larger = V(0) < r;
    V power = exp(both * log(select(nothing, V(1), top)));
    V u = select(q_larger, V(alpha), V(beta)),
      v = select(q_larger, V(beta), V(alpha));  // exponents of the smaller, the larger
    V per_u = select(q_larger, V(1.0 / alpha), V(1.0 / beta)), per_v = select(q_larger, V(1.0 / beta), V(1.0 / alpha));
    V x = V(0) - u * d, y = V(0) - v * d, e = expm1(x);
    V of_x = e * per_u, of_y = exp(x) * expm1(y) * per_v;
    V near = (V(1) + e) * expm1_tail(y) * per_v - expm1_tail(x) * per_u - d * e;
    V f = V(1.0 / (alpha + beta)) * select(both * d < V(0.5), near, of_y - of_x);
    V g = select(q_larger, V(0) - of_x, of_y);
    return {select(nothing, V(0), power * f), select(nothing, V(0), power * g)};
  }
};

// The squared Hellinger distance sum (sqrt p - sqrt q)^2 / 2: g = sqrt q (sqrt q - sqrt p) / 2.
struct Hellinger {
  static constexpr bool centred = false;
  double unused, also_unused, centre;
  template <class V>
  DISTIL_FAST_FN Terms<V> operator()(V r, V p, V q) const {
    auto q_larger = V(0) < r;
    V h = V(-0.5) * abs(r), less = expm1(h);  // the smaller root is e^h of the larger
    V half = V(0.5) * select(q_larger, q, p);
    return {times(half, less * less), times(half, select(q_larger, V(0) - less, less * exp(h)))};
  }
};

// -sum p log q: the forward KL and the teacher's entropy, which has no gradient.
struct SoftCrossEntropy {
  static constexpr bool centred = false;
  double unused, also_unused, centre;
  template <class V>
  DISTIL_FAST_FN Terms<V> operator()(V r, V p, V q) const {
    Terms<V> kl = ForwardKL{unused, also_unused, centre}(r, p, q);
    return {kl.f - times(p, log(select(is_zero(p), V(1), p))), kl.g};
  }
};

// The table: its order is the index in the ABI, its names are those of reference.py.
#define DISTIL_FAST_DIVERGENCES(X)      \
  X(forward_kl, ForwardKL)              \
  X(reverse_kl, ReverseKL)              \
  X(jsd, JensenShannon)                 \
  X(total_variation, TotalVariation)    \
  X(skewed_kl, SkewedKL)                \
  X(skewed_reverse_kl, SkewedReverseKL) \
  X(alpha_beta, AlphaBeta)              \
  X(hellinger, Hellinger)               \
  X(soft_cross_entropy, SoftCrossEntropy)

}  // namespace distil_fast
