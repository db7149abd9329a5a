// vec_avx512.h: the vector vocabulary on 16 floats. Knows instructions, and no mathematics.
// Partial loads fill the missing lanes, partial stores leave the rest of memory alone. Next: vec_avx2.h, the
// same on 8.

struct Mask {
  __mmask16 m;
};

struct Vec {
  using Real = float;
  static constexpr int width = 16;
  __m512 v;
  Vec() = default;
  Vec(__m512 x) : v(x) {}
  explicit Vec(double x) : v(_mm512_set1_ps(static_cast<float>(x))) {}
};

inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }  // a b + c
inline Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a.v, b.v, c.v); }  // a b - c
inline Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(b.v, a.v); }  // a nan in `a` stays
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(b.v, a.v); }  // a nan in `a` stays
inline Vec fraction(Vec a) { return _mm512_reduce_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }  // a - floor(a)
inline Vec exponent_in_range(Vec y) { return y; }  // fraction and scale2 take any y here, -inf too
inline Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask is_number(Vec a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q)}; }
inline Mask is_zero(Vec a) { return {_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_EQ_OQ)}; }
inline Vec select(Mask m, Vec yes, Vec no) { return _mm512_mask_blend_ps(m.m, no.v, yes.v); }

// x 2^floor(n) for any n: 0 below -126 for x in [1, 2] (by FlushSubnormals), inf from 128
inline Vec scale2(Vec x, Vec n) { return _mm512_scalef_ps(x.v, n.v); }

// x = m 2^e with m in [sqrt(1/2), sqrt(2)), for normal x > 0
inline Vec exponent(Vec x) { return _mm512_getexp_ps((x * Vec(1.41421356)).v); }

inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

inline __mmask16 first(int64_t k) { return static_cast<__mmask16>((1u << k) - 1u); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const float* p, int64_t k, double fill) { return _mm512_mask_loadu_ps(Vec(fill).v, first(k), p); }
inline Vec load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const Half* p, int64_t k, double fill) {
  __m512 x = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(k), p));
  return _mm512_mask_blend_ps(first(k), Vec(fill).v, x);
}
inline __m512 widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }
inline Vec load(const BFloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const BFloat16* p, int64_t k, double fill) {
  return _mm512_mask_blend_ps(first(k), Vec(fill).v, widen(_mm256_maskz_loadu_epi16(first(k), p)));
}

// to nearest, ties to even; a nan stays a (quiet) nan
inline __m256i to_half(Vec a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#ifdef __AVX512BF16__
inline __m256i to_bfloat16(Vec a) { return (__m256i)_mm512_cvtneps_pbh(a.v); }
#else
inline __m256i to_bfloat16(Vec a) {
  __m512i bits = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
#endif

inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int64_t k) { _mm512_mask_storeu_ps(p, first(k), a.v); }
inline void store(Half* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_half(a)); }
inline void store(Half* p, Vec a, int64_t k) { _mm256_mask_storeu_epi16(p, first(k), to_half(a)); }
inline void store(BFloat16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(a)); }
inline void store(BFloat16* p, Vec a, int64_t k) { _mm256_mask_storeu_epi16(p, first(k), to_bfloat16(a)); }
