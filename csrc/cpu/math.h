// math.h: exp, expm1, log1p on any Vec: reduce, approximate, reconstruct. Knows no instruction set.
// Polynomials are minimax fits; bounds are those of tests/cpp/math_test.cpp, in units in the last place of a
// float. Next: sweeps.h, which uses them; math_double.h, the same for doubles.

// exp(d / temperature) for d <= 80 temperature, as 2^y with y = d log2(e) / temperature. At most 2 ulp for
// the rounded y, whose own rounding adds |y| / 3 ulp; exactly 0 below 2^-126, so that no subnormal ever slows
// a sweep down. Polynomials are evaluated in pairs (Estrin), which halves the latency that bounds these
// loops.
template <class V>
struct Exponential {
  V k;
  explicit Exponential(double temperature) : k(1.4426950408889634 / temperature) {}
  V operator()(V d) const {
    V y = exponent_in_range(d * k);
    V f = fraction(y), f2 = f * f;
    V low = fma(V(0.6931513), f, V(1)), middle = fma(V(0.055799913), f, V(0.24016444));
    V high = fma(V(0.0018671302), f, V(0.00901703));
    return scale2(fma(fma(high, f2, middle), f2, low), y);
  }
};

// expm1(x) - x for |x| <= 1/2: x^2 times a polynomial; its error relative to expm1(x) is 1.2e-7.
template <class V>
inline V expm1_tail(V x) {
  V x2 = x * x;
  V low = fma(V(0.16666135), x, V(0.49999982)), middle = fma(V(0.008402393), x, V(0.04166897));
  return x2 * fma(fma(V(0.0013875746), x2, middle), x2, low);
}

// expm1(x) for x <= 80. At most 3 ulp.
template <class V>
inline V expm1(V x) {
  return select(abs(x) < V(0.5), x + expm1_tail(x), Exponential<V>(1.0)(x) - V(1));
}
template <class V>
inline V exp(V x) {
  return Exponential<V>(1.0)(x);
}

// log(y) + correction for normal y > 0, where the correction is what y's own rounding lost. Without one, which is log,
// at most 1 ulp.
template <class V>
inline V log_and(V y, V correction) {
  V e = exponent(y), z = scale2(y, V(0) - e) - V(1);  // y = 2^e (1 + z), z in [sqrt(1/2) - 1, sqrt(2) - 1)
  V p = fma(V(-0.07634438), z, V(0.12761563));
  p = fma(p, z, V(-0.13160197));
  p = fma(p, z, V(0.1420176));
  p = fma(p, z, V(-0.16623355));
  p = fma(p, z, V(0.20001227));
  p = fma(p, z, V(-0.25000823));
  p = fma(p, z, V(0.3333333));
  V tail = fma(p * z, z * z, V(-0.5) * z * z);
  return fma(e, V(0.6931471805599453), z + (tail + correction));
}
template <class V>
inline V log(V x) {
  return log_and(x, V(0));
}

// log(1 + x) for -1 < x, finite. At most 3 ulp.
template <class V>
inline V log1p(V x) {
  V y = max(V(1) + x, V(1e-30));
  return log_and(y, (x - (y - V(1))) / y);
}
