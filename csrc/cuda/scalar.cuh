// scalar.cuh: the vector vocabulary of divergences.h and pairs.h on one float of a GPU's thread, and the dtypes of memory: how a
// group of neighbouring columns is loaded and stored. Knows no rows. Next: slice.cuh.
#pragma once

#include "hw.cuh"
#include "../core.h"
#include "../divergences.h"
#include "../pairs.h"

namespace distil_fast::cuda {

constexpr float minus_infinity = -__builtin_inff(), log2_e = 1.44269504f, ln_2 = 0.693147181f,
                not_a_number = __builtin_nanf("");

DISTIL_FAST_BOTH int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
DISTIL_FAST_BOTH int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }  // rounded up

// ---- the vocabulary

struct Lane {
  using Real = float;
  float v;
  Lane() = default;
  template <class X>
  DISTIL_FAST_FN explicit Lane(X x) : v(static_cast<float>(x)) {}
};

DISTIL_FAST_DEVICE Lane operator+(Lane a, Lane b) { return Lane(a.v + b.v); }
DISTIL_FAST_DEVICE Lane operator-(Lane a, Lane b) { return Lane(a.v - b.v); }
DISTIL_FAST_DEVICE Lane operator*(Lane a, Lane b) { return Lane(a.v * b.v); }
DISTIL_FAST_DEVICE Lane operator/(Lane a, Lane b) { return Lane(a.v / b.v); }
DISTIL_FAST_DEVICE bool operator<(Lane a, Lane b) { return a.v < b.v; }
DISTIL_FAST_DEVICE bool is_zero(Lane a) { return a.v == 0.0f; }
DISTIL_FAST_DEVICE Lane select(bool m, Lane yes, Lane no) { return m ? yes : no; }
DISTIL_FAST_DEVICE Lane abs(Lane a) { return Lane(__builtin_fabsf(a.v)); }
DISTIL_FAST_DEVICE Lane min(Lane a, Lane b) { return b.v < a.v ? b : a; }  // a nan in `a` stays
DISTIL_FAST_DEVICE Lane max(Lane a, Lane b) { return b.v > a.v ? b : a; }  // a nan in `a` stays

// The polynomials of cpu/math.h, which states their errors.
DISTIL_FAST_DEVICE Lane expm1_tail(Lane a) {
  const float x = a.v, x2 = x * x;
  const float low = hw::fma(0.16666135f, x, 0.49999982f), middle = hw::fma(0.008402393f, x, 0.04166897f);
  return Lane(x2 * hw::fma(hw::fma(0.0013875746f, x2, middle), x2, low));
}
DISTIL_FAST_DEVICE Lane expm1(Lane a) {
  return select(abs(a) < Lane(0.5f), a + expm1_tail(a), Lane(hw::exp2(a.v * log2_e) - 1.0f));
}
DISTIL_FAST_DEVICE Lane exp(Lane a) { return Lane(hw::exp2(a.v * log2_e)); }
DISTIL_FAST_DEVICE Lane log(Lane a) { return Lane(hw::log(a.v)); }
DISTIL_FAST_DEVICE Lane log_and(Lane a, Lane correction) { return log(a) + correction; }  // what a's rounding lost
DISTIL_FAST_DEVICE Lane log1p(Lane a) { return Lane(hw::log1p(a.v)); }
DISTIL_FAST_DEVICE Lane log1p_tail(Lane a) {
  const float x = a.v;
  float p = hw::fma(-0.07634438f, x, 0.12761563f);
  p = hw::fma(p, x, -0.13160197f);
  p = hw::fma(p, x, 0.1420176f);
  p = hw::fma(p, x, -0.16623355f);
  p = hw::fma(p, x, 0.20001227f);
  p = hw::fma(p, x, -0.25000823f);
  p = hw::fma(p, x, 0.3333333f);
  return Lane(x * x * hw::fma(p, x, -0.5f));
}

// ---- dtypes

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
constexpr DType dtype_of = DType::f32;
template <>
inline constexpr DType dtype_of<Half> = DType::f16;
template <>
inline constexpr DType dtype_of<BFloat16> = DType::bf16;

DISTIL_FAST_BOTH int size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

DISTIL_FAST_DEVICE float widen(float x) { return x; }
DISTIL_FAST_DEVICE float widen(Half x) { return hw::widen_half(x.bits); }
DISTIL_FAST_DEVICE float widen(BFloat16 x) { return hw::float_of(static_cast<uint32_t>(x.bits) << 16); }
DISTIL_FAST_DEVICE void narrow(float x, float* to) { *to = x; }
DISTIL_FAST_DEVICE void narrow(float x, Half* to) { to->bits = hw::narrow_half(x); }
DISTIL_FAST_DEVICE void narrow(float x, BFloat16* to) { to->bits = hw::narrow_bfloat16(x); }

// The values in one 32-bit word of memory.
DISTIL_FAST_DEVICE void unpack(uint32_t word, const float*, float* to) { to[0] = hw::float_of(word); }
DISTIL_FAST_DEVICE void unpack(uint32_t word, const Half*, float* to) {
  to[0] = hw::widen_half(static_cast<uint16_t>(word & 0xFFFFu));
  to[1] = hw::widen_half(static_cast<uint16_t>(word >> 16));
}
DISTIL_FAST_DEVICE void unpack(uint32_t word, const BFloat16*, float* to) {
  to[0] = hw::float_of(word << 16);
  to[1] = hw::float_of(word & 0xFFFF0000u);
}
DISTIL_FAST_DEVICE uint32_t pack(const float* from, const float*) { return hw::bits_of(from[0]); }
DISTIL_FAST_DEVICE uint32_t pack(const float* from, const Half*) { return hw::narrow_half2(from[0], from[1]); }
DISTIL_FAST_DEVICE uint32_t pack(const float* from, const BFloat16*) { return hw::narrow_bfloat16x2(from[0], from[1]); }

// `count` values from an address that is a multiple of 16 bytes, or of all their bytes where they are fewer.
template <int count, class T>
DISTIL_FAST_DEVICE void load_values(const T* from, float* to) {
  constexpr int bytes = count * static_cast<int>(sizeof(T)), per_word = 4 / static_cast<int>(sizeof(T));
  if constexpr (bytes == 8) {
    const hw::Bits8 bits = hw::load8(from);
#pragma unroll
    for (int w = 0; w < 2; ++w) unpack(bits.word[w], from, to + w * per_word);
  } else {
    static_assert(bytes % 16 == 0);
#pragma unroll
    for (int b = 0; b < bytes / 16; ++b) {
      const hw::Bits16 bits = hw::load16(from + b * 4 * per_word);
#pragma unroll
      for (int w = 0; w < 4; ++w) unpack(bits.word[w], from, to + (4 * b + w) * per_word);
    }
  }
}

// 16 bytes of values to an address that is a multiple of 16 bytes.
template <class T>
DISTIL_FAST_DEVICE void store_values(const float* from, T* to) {
  hw::Bits16 bits;
#pragma unroll
  for (int w = 0; w < 4; ++w) bits.word[w] = pack(from + w * (4 / static_cast<int>(sizeof(T))), to);
  hw::store16(to, bits);
}

}  // namespace distil_fast::cuda
