// vec_avx2.h: the vector vocabulary on 8 floats. Knows instructions, and no mathematics.
// Partial loads fill the missing lanes, partial stores leave the rest of memory alone. Next: vec_portable.h.

struct Mask {
  __m256 m;
};

struct Vec {
  using Real = float;
  static constexpr int width = 8;
  __m256 v;
  Vec() = default;
  Vec(__m256 x) : v(x) {}
  explicit Vec(double x) : v(_mm256_set1_ps(static_cast<float>(x))) {}
};

inline Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }  // a b + c
inline Vec fms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a.v, b.v, c.v); }  // a b - c
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(b.v, a.v); }      // a nan in `a` stays
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(b.v, a.v); }      // a nan in `a` stays
inline Vec fraction(Vec a) { return a - Vec(_mm256_floor_ps(a.v)); }  // a - floor(a)
inline Vec exponent_in_range(Vec y) { return min(max(y, Vec(-127)), Vec(128)); }
inline Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask is_number(Vec a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_ORD_Q)}; }
inline Mask is_zero(Vec a) { return {_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_EQ_OQ)}; }
inline Vec select(Mask m, Vec yes, Vec no) { return _mm256_blendv_ps(no.v, yes.v, m.m); }

// x 2^floor(n) for n in [-127, 129): 0 below -126, inf from 128
inline Vec scale2(Vec x, Vec n) {
  __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_floor_ps(n.v)), _mm256_set1_epi32(127));
  return x * Vec(_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}

// x = m 2^e with m in [sqrt(1/2), sqrt(2)), for normal x > 0
inline Vec exponent(Vec x) {
  __m256i bits = _mm256_castps_si256((x * Vec(1.41421356)).v);
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127)));
}

inline float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float largest(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}

inline __m256i first(int64_t k) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(k)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec widen(__m128i x, const Half*) { return _mm256_cvtph_ps(x); }
inline Vec widen(__m128i x, const BFloat16*) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}

// to nearest, ties to even; a nan stays a (quiet) nan
inline __m128i narrow(Vec a, Half*) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline __m128i narrow(Vec a, BFloat16*) {
  __m256i bits = _mm256_castps_si256(a.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const float* p, int64_t k, double fill) {
  __m256i m = first(k);
  return _mm256_blendv_ps(Vec(fill).v, _mm256_maskload_ps(p, m), _mm256_castsi256_ps(m));
}
template <class T>
inline Vec load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p);
}
template <class T>
inline Vec load(const T* p, int64_t k, double fill) {
  T part[8] = {};  // AVX2 has no masked load of 16-bit lanes
  for (int64_t j = 0; j < k; ++j) part[j] = p[j];
  return _mm256_blendv_ps(Vec(fill).v, load(part).v, _mm256_castsi256_ps(first(k)));
}

inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int64_t k) { _mm256_maskstore_ps(p, first(k), a.v); }
template <class T>
inline void store(T* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, p));
}
template <class T>
inline void store(T* p, Vec a, int64_t k) {
  T part[8];
  store(part, a);
  for (int64_t j = 0; j < k; ++j) p[j] = part[j];
}
