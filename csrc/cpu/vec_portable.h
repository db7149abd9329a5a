// vec_portable.h: the vector vocabulary on one float or one double, in plain C++: what the vectors are tested
// against. Knows no instruction set and no mathematics. A partial load or store of zero lanes touches no
// memory.

template <class R>
struct Scalar {
  using Real = R;
  static constexpr int width = 1;
  R v;
  Scalar() = default;
  template <class X>
  explicit Scalar(X x) : v(static_cast<R>(x)) {}
};

#define DISTIL_FAST_SCALAR \
  template <class R>       \
  inline

DISTIL_FAST_SCALAR Scalar<R> operator+(Scalar<R> a, Scalar<R> b) { return Scalar<R>(a.v + b.v); }
DISTIL_FAST_SCALAR Scalar<R> operator-(Scalar<R> a, Scalar<R> b) { return Scalar<R>(a.v - b.v); }
DISTIL_FAST_SCALAR Scalar<R> operator*(Scalar<R> a, Scalar<R> b) { return Scalar<R>(a.v * b.v); }
DISTIL_FAST_SCALAR Scalar<R> operator/(Scalar<R> a, Scalar<R> b) { return Scalar<R>(a.v / b.v); }
DISTIL_FAST_SCALAR Scalar<R> fma(Scalar<R> a, Scalar<R> b, Scalar<R> c) { return Scalar<R>(std::fma(a.v, b.v, c.v)); }
DISTIL_FAST_SCALAR Scalar<R> fms(Scalar<R> a, Scalar<R> b, Scalar<R> c) { return Scalar<R>(std::fma(a.v, b.v, -c.v)); }
DISTIL_FAST_SCALAR Scalar<R> abs(Scalar<R> a) { return Scalar<R>(std::fabs(a.v)); }
DISTIL_FAST_SCALAR Scalar<R> min(Scalar<R> a, Scalar<R> b) { return b.v < a.v ? b : a; }  // a nan in `a` stays
DISTIL_FAST_SCALAR Scalar<R> max(Scalar<R> a, Scalar<R> b) { return b.v > a.v ? b : a; }  // a nan in `a` stays
DISTIL_FAST_SCALAR Scalar<R> fraction(Scalar<R> a) { return Scalar<R>(a.v - std::floor(a.v)); }
DISTIL_FAST_SCALAR Scalar<R> exponent_in_range(Scalar<R> y) { return min(max(y, Scalar<R>(-127)), Scalar<R>(128)); }
DISTIL_FAST_SCALAR bool operator<(Scalar<R> a, Scalar<R> b) { return a.v < b.v; }
DISTIL_FAST_SCALAR bool is_number(Scalar<R> a) { return a.v == a.v; }
DISTIL_FAST_SCALAR bool is_zero(Scalar<R> a) { return a.v == R(0); }
DISTIL_FAST_SCALAR Scalar<R> select(bool m, Scalar<R> yes, Scalar<R> no) { return m ? yes : no; }
// x 2^floor(n); n < -126 gives 0
DISTIL_FAST_SCALAR Scalar<R> scale2(Scalar<R> x, Scalar<R> n) {
  if (n.v < R(-126)) return Scalar<R>(0);
  return Scalar<R>(n.v == n.v ? std::ldexp(x.v, static_cast<int>(std::floor(n.v))) : n.v);
}
DISTIL_FAST_SCALAR Scalar<R> exponent(Scalar<R> x) { return Scalar<R>(std::floor(std::log2(x.v * R(1.41421356)))); }
DISTIL_FAST_SCALAR R sum(Scalar<R> a) { return a.v; }
DISTIL_FAST_SCALAR R largest(Scalar<R> a) { return a.v; }

#undef DISTIL_FAST_SCALAR

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
  uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
  if (rest >= 0x7C00) return bit_cast<float>(sign | 0x7F800000 | (rest & 0x3FF) << 13);
  float magnitude = rest < 0x400 ? static_cast<float>(rest) * 0x1p-24f : bit_cast<float>((rest << 13) + (112u << 23));
  return sign ? -magnitude : magnitude;
}

// to nearest, ties to even; a nan stays a (quiet) nan
inline void narrow(float x, float* p) { *p = x; }
inline void narrow(double x, double* p) { *p = x; }
inline void narrow(float x, BFloat16* p) {
  uint32_t bits = bit_cast<uint32_t>(x);
  p->bits = static_cast<uint16_t>(x != x ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float x, Half* p) {
  uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
  if (rest > 0x7F800000) {
    p->bits = static_cast<uint16_t>(sign | 0x7E00);
  } else if (rest < 0x38800000) {  // below the smallest normal: the float adder rounds at 2^-24
    p->bits = static_cast<uint16_t>(sign | (bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3F000000));
  } else {
    uint32_t half = (rest + 0xFFF + ((rest >> 13) & 1) - (112u << 23)) >> 13;
    p->bits = static_cast<uint16_t>(sign | (half < 0x7C00 ? half : 0x7C00));
  }
}

template <class T>
inline auto load(const T* p) {
  return Scalar<decltype(widen(*p))>(widen(*p));
}
template <class T>
inline auto load(const T* p, int64_t k, double fill) {
  return k ? load(p) : decltype(load(p))(fill);
}
template <class T, class R>
inline void store(T* p, Scalar<R> a) {
  narrow(a.v, p);
}
template <class T, class R>
inline void store(T* p, Scalar<R> a, int64_t k) {
  if (k) store(p, a);
}
