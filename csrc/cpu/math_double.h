// math_double.h: math.h for doubles, by the C library: the precision in which gradcheck and the fp64 oracle
// work. Knows no vectors: doubles run one at a time.

using Double = Scalar<double>;

template <>
struct Exponential<Double> {
  double temperature;
  explicit Exponential(double t) : temperature(t) {}
  Double operator()(Double d) const { return Double(std::exp(d.v / temperature)); }
};

// The series: expm1(x) - x would lose all digits of a small x in a double too.
inline Double expm1_tail(Double x) {
  double term = x.v * x.v / 2, total = term;
  for (int n = 3; n <= 16; ++n) total += term *= x.v / n;
  return Double(total);
}

inline Double exp(Double x) { return Double(std::exp(x.v)); }
inline Double log(Double x) { return Double(std::log(x.v)); }
inline Double log_and(Double y, Double correction) { return Double(std::log(y.v) + correction.v); }
inline Double expm1(Double x) { return Double(std::expm1(x.v)); }
inline Double log1p(Double x) { return Double(std::log1p(x.v)); }

// The series, for |x| <= 1/4: log1p(x) - x would lose all digits of a small x.
inline Double log1p_tail(Double x) {
  double series = 0.0;
  for (int n = 27; n >= 2; --n) series = 1.0 / n - x.v * series;
  return Double(-x.v * x.v * series);
}
