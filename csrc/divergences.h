// divergences.h: THE MATHS. A divergence is (r, p, q) -> (f, g), with p the teacher's probability, q the student's and
// r = log q - log p; D = sum f, and g = df / dlog q up to c q, with c such that g = 0 where p = q.
// It knows nothing of softmax, temperature, dtype, vector width, labels or reduction. `V` is a vector of any width or a
// scalar; its vocabulary (select, abs, min, expm1, ...) belongs to V. `centred` says that g grows with r: it is then taken
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
  double unused, centre;
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
  double unused, centre;
  template <class V>
  DISTIL_FAST_FN Terms<V> operator()(V r, V p, V q) const {
    V far = times(q, r) + (p - q);
    return {select(abs(r) < V(0.5), q * expm1_tail(V(0) - r), far), times(q, r - V(centre))};
  }
};

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; g = (1 - beta) q (log q - log m).
struct JensenShannon {
  static constexpr bool centred = false;
  double beta, centre;
  template <class V>
  DISTIL_FAST_FN Terms<V> operator()(V r, V p, V q) const {
    V b = V(beta), c = V(1.0 - beta), far = V(80);            // beyond e^80 the other side has no weight left
    V log_p_m = V(0) - log1p(c * expm1(min(r, far)));         // log p - log m
    V log_q_m = V(0) - log1p(b * expm1(min(V(0) - r, far)));  // log q - log m
    V g = c * times(q, log_q_m);
    return {b * times(p, log_p_m) + g, g};
  }
};

// The table: its order is the index in the ABI, its names are those of reference.py.
#define DISTIL_FAST_DIVERGENCES(X) X(forward_kl, ForwardKL) X(reverse_kl, ReverseKL) X(jsd, JensenShannon)

}  // namespace distil_fast
