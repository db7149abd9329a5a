// math_test.cpp: how exact math.h is on one instruction set: the largest error of each function over millions
// of floats, against long double, as a table; exits with 1 where one is above the bound that math.h states,
// with 77 where the processor lacks the instructions. DISTIL_FAST_VEC is the header of the vectors. Calls no
// sweep. Next: ../test_cpp.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "table.h"

namespace distil_fast {
namespace {
#include "bits.h"
#include DISTIL_FAST_VEC
#include "math.h"
#ifdef DISTIL_FAST_DOUBLE
#include "math_double.h"
#endif
#include "sweeps.h"
#include "prepare.h"
#ifdef DISTIL_FAST_DOUBLE
using V = Double;
using Real = double;
#elif defined(DISTIL_FAST_PORTABLE)
using V = Scalar<float>;
using Real = float;
#else
using V = Vec;
using Real = float;
#endif

constexpr int width = V::width;
constexpr int digits = std::numeric_limits<Real>::digits;
constexpr long double of_y = 0.85L;  // ulp that exp loses per unit of |y|
bool failed = false;

// The distance of neighbouring numbers around x.
long double ulp(long double x) {
  int exponent;
  std::frexp(x, &exponent);
  return std::ldexp(1.0L, std::max(exponent, std::numeric_limits<Real>::min_exponent) - digits);
}

struct Worst {
  long double part = -1.0L;  // error / bound
  Real at = 0, got = 0;
};

// Calls visit(x) for numbers of all magnitudes in [low, high]: equal steps, and equal steps of the bits.
template <class F>
void sweep(Real low, Real high, F visit) {
  constexpr int64_t count = 1 << 18;
  constexpr Real ratio = sizeof(Real) == 4 ? Real(0.9998) : Real(0.998);
  for (int64_t i = 0; i <= count; ++i) visit(static_cast<Real>(low + (static_cast<double>(high) - low) * i / count));
  for (Real size = high > -low ? high : -low; size > std::numeric_limits<Real>::min(); size *= ratio)
    for (Real x : {size, -size})
      if (x >= low && x <= high) visit(x);
}

// The largest error of f on [low, high] as a part of `bound(x, exact)`. Vectors hold neighbours of x, so that
// every lane works.
template <class F, class Exact, class Bound>
void check(const char* name, Real low, Real high, F f, Exact exact, Bound bound) {
  Worst worst;
  int64_t tried = 0;
  sweep(low, high, [&](Real x) {
    alignas(64) Real in[16], out[16];
    for (int lane = 0; lane < width; ++lane) {
      Real moved = x * (Real(1) + lane * std::numeric_limits<Real>::epsilon());
      in[lane] = moved < low || moved > high ? x : moved;
    }
    store(out, f(load(in)));
    const int lane = static_cast<int>(tried++ % width);
    const long double truth = exact(static_cast<long double>(in[lane]));
    const long double part = std::fabs(out[lane] - truth) / bound(static_cast<long double>(in[lane]), truth);
    if (!(part <= worst.part)) worst = {part, in[lane], out[lane]};
  });
  const bool good = worst.part <= 1.0L;
  failed |= !good;
  std::printf("%-28s [%11.4g, %9.4g] %9lld  error / bound %6.3Lf  at %.9g -> %.9g%s\n", name, double(low), double(high),
              static_cast<long long>(tried), worst.part, double(worst.at), double(worst.got),
              good ? "" : "  TOO LARGE");
}

// `actual` must be `expected` to the bit, or both nan.
void same(const char* what, V actual, Real expected) {
  alignas(64) Real out[16];
  store(out, actual);
  for (int lane = 0; lane < width; ++lane)
    if (!(out[lane] == expected || (out[lane] != out[lane] && expected != expected))) {
      std::printf("%s: %.9g, expected %.9g\n", what, double(out[lane]), double(expected));
      failed = true;
      return;
    }
}

void exponentials() {
  constexpr long double log2e = 1.44269504088896340736L;
  for (double temperature : {1.0, 2.0, 3.7, 0.5}) {
    const Exponential<V> f(temperature);
    char name[64];
    std::snprintf(name, sizeof name, "exp(d / %g)", temperature);
    // 3.5 ulp of the polynomial, and the rounding of y = d log2(e) / T, which is a part of |y|
    const auto exact = [&](long double d) { return std::exp(d / static_cast<long double>(temperature)); };
    const auto bound = [&](long double d, long double truth) {
      const long double y = std::fabs(d * log2e / static_cast<long double>(temperature));
      return (3.5L + of_y * y) * ulp(truth);
    };
    check(name, static_cast<Real>(-87 * temperature), static_cast<Real>(80 * temperature), f, exact, bound);
    same("exp(0)", f(V(0)), 1);
    same("exp(-inf)", f(V(-std::numeric_limits<double>::infinity())), 0);
    same("exp(nan)", f(V(std::numeric_limits<double>::quiet_NaN())), std::numeric_limits<Real>::quiet_NaN());
    if (sizeof(Real) == 4) {
      same("exp(-88)", f(V(-88 * temperature)), 0);
      same("exp(-1e30)", f(V(-1e30)), 0);
      same("exp(lowest)", f(V(-3.4e38)), 0);
    }
    const bool large_is_inf = sizeof(Real) == 4;
    same("exp(1e30)", f(V(large_is_inf ? 1e30 : 1e300)), std::numeric_limits<Real>::infinity());
  }
}

void others() {
  const auto ulps = [](long double n) { return [n](long double, long double truth) { return n * ulp(truth); }; };
  // relative to expm1(x), which is what the tail is added to
  check(
      "expm1(x) - x", Real(-0.5), Real(0.5), [](V x) { return expm1_tail(x); },
      [](long double x) {
        if (std::fabs(x) < 1e-3L) return x * x * (1 / 2.0L + x * (1 / 6.0L + x * (1 / 24.0L + x / 120.0L)));
        return std::expm1(x) - x;
      },
      [](long double x, long double) { return (sizeof(Real) == 4 ? 1.7e-7L : 2.3e-16L) * std::fabs(std::expm1(x)); });
  check(
      "expm1", Real(-0.5), Real(0.5), [](V x) { return expm1(x); }, [](long double x) { return std::expm1(x); },
      ulps(3));
  check(
      "expm1, far", Real(-80), Real(80), [](V x) { return expm1(x); }, [](long double x) { return std::expm1(x); },
      [](long double x, long double truth) { return (6.5L + of_y * std::fabs(x) * 1.4426950408889634L) * ulp(truth); });
  check(
      "log1p", Real(-0.9999), Real(1), [](V x) { return log1p(x); }, [](long double x) { return std::log1p(x); },
      ulps(1.5L));
  check(
      "log1p, far", Real(-0.9999), Real(1e30), [](V x) { return log1p(x); },
      [](long double x) { return std::log1p(x); }, ulps(1.5L));
  check("log", Real(1e-37), Real(1), [](V x) { return log(x); }, [](long double x) { return std::log(x); }, ulps(1));
  check(
      "log, far", Real(1e-37), Real(1e37), [](V x) { return log(x); }, [](long double x) { return std::log(x); },
      ulps(1));
  const auto tanh_of = [](long double x) { return std::tanh(x); };
  check("tanh", Real(-0.5), Real(0.5), [](V x) { return tanh(x); }, tanh_of, ulps(6.5L));
  check("tanh, far", Real(-40), Real(40), [](V x) { return tanh(x); }, tanh_of, ulps(6.5L));
  check(
      "1 - tanh^2", Real(-40), Real(40), [](V x) { return tanh_slope(x); },
      [](long double x) { return 1 / (std::cosh(x) * std::cosh(x)); },
      [](long double x, long double truth) {
        return (7 + 2 * of_y * std::fabs(x) * 1.4426950408889634L) * ulp(truth);
      });
  const Real infinite = std::numeric_limits<Real>::infinity();
  same("tanh(inf)", tanh(V(infinite)), 1);
  same("tanh(-inf)", tanh(V(-infinite)), -1);
  same("tanh(nan)", tanh(V(std::numeric_limits<double>::quiet_NaN())), std::numeric_limits<Real>::quiet_NaN());
  same("1 - tanh(inf)^2", tanh_slope(V(-infinite)), 0);
  same("log(1)", log(V(1)), 0);
  same("expm1(0)", expm1(V(0)), 0);
  same("log1p(0)", log1p(V(0)), 0);
}

bool present() {
#if defined(__AVX512BF16__)
  return __builtin_cpu_supports("avx512bf16");
#elif defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

}  // namespace
}  // namespace distil_fast

int main() {
  using namespace distil_fast;
  if (!present()) return 77;
#if defined(__x86_64__)
  _mm_setcsr(_mm_getcsr() | 0x8040);  // subnormals count as zero, as in threads.h
#endif
  exponentials();
  others();
  return failed;
}
