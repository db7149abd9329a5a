// form.cuh: what the values in memory come to: logits as they are, logits under a scale and a softcap, or a teacher's
// probabilities or their logarithms. A `value` is what is exponentiated: logit = unit value, where rounding the product
// first would lose digits. Knows no sums and no divergence. Next: row_loss.cuh; reference.py has the definitions.
#pragma once

#include "scalar.cuh"

namespace distil_fast::cuda {

// Of one model; where `holds` is not logits, what stands there is at the temperature already.
struct Form {
  float scale = 1.0f, cap = 0.0f;        // logit = cap tanh(scale x / cap); cap 0: scale x
  float inner = 0.0f, inner_low = 0.0f;  // scale / cap, to more digits than a float has
  TeacherForm holds = TeacherForm::logits;
};

inline Form form_of(const Transform& transform, TeacherForm holds) {
  const double inner = transform.cap == 0.0 ? 0.0 : transform.scale / transform.cap;
  const auto high = static_cast<float>(inner);
  return {static_cast<float>(transform.scale), static_cast<float>(transform.cap), high,
          static_cast<float>(inner - high), holds};
}

// What fp32 rounds off in a - b = d (Knuth's TwoSum); an infinite d has lost nothing.
DISTIL_FAST_DEVICE float lost_in(float a, float b, float d) {
  const float back = d - a, lost = (a - (d - back)) - (b + back);
  return lost == lost ? lost : 0.0f;
}

// x y - z w - apart with one rounding, where nothing overflows.
DISTIL_FAST_DEVICE float products_apart(float x, float y, float z, float w, float apart, float off) {
  const float a = x * y, b = z * w, d = a - b;
  const float lost = lost_in(a, b, d) + (hw::fma(x, y, -a) - hw::fma(z, w, -b)) - off;
  return (d - apart) + (lost == lost ? lost : 0.0f);
}

// log x, and what its rounding to fp32 lost: where a student is close to its teacher, log q - log p is no larger. Below
// 2^-126 x counts as 0. The polynomial of cpu/math.h.
struct Logarithm {
  float high, low;
};
DISTIL_FAST_DEVICE Logarithm logarithm(float x) {
  constexpr uint32_t half_root = 0x3F3504F3u;  // of sqrt(1/2)
  const uint32_t above = hw::bits_of(x) - half_root;
  const float e = static_cast<float>(static_cast<int32_t>(above) >> 23);
  const float z = hw::float_of((above & 0x007FFFFFu) + half_root) - 1.0f;  // x = 2^e (1 + z), 1 + z from sqrt(1/2)
  float p = hw::fma(-0.07634438f, z, 0.12761563f);
  p = hw::fma(p, z, -0.13160197f);
  p = hw::fma(p, z, 0.1420176f);
  p = hw::fma(p, z, -0.16623355f);
  p = hw::fma(p, z, 0.20001227f);
  p = hw::fma(p, z, -0.25000823f);
  p = hw::fma(p, z, 0.3333333f);
  const float tail = hw::fma(p * z, z * z, -0.5f * z * z), large = e * 0.693145752f;  // exactly
  const float small = z + hw::fma(e, 1.42860677e-06f, tail), sum = large + small;
  if (x >= 1.17549435e-38f) return {sum, (large - sum) + small};
  return {x >= 0.0f ? minus_infinity : __builtin_nanf(""), 0.0f};
}

// At most 3 ulp.
DISTIL_FAST_DEVICE float tanh(float x) {
  const float x2 = x * x;
  float p = hw::fma(0.0157394409f, x2, -0.052302558f);
  p = hw::fma(p, x2, 0.133152977f);
  p = hw::fma(p, x2, -0.333327681f);
  const float large = 1.0f - 2.0f / (1.0f + hw::exp2(2.0f * log2_e * __builtin_fabsf(x)));
  return __builtin_fabsf(x) < 0.55f ? hw::fma(p * x2, x, x) : __builtin_copysignf(large, x);
}

// Logits as they are.
class Plain {
 public:
  DISTIL_FAST_DEVICE Plain(const Form&, const Form&, float, float by_t) : by_t_(by_t) {}
  DISTIL_FAST_DEVICE float student(float x) const { return x; }
  DISTIL_FAST_DEVICE float teacher(float x) const { return x; }
  DISTIL_FAST_DEVICE float student_logit(float value) const { return value; }
  // what a value is multiplied by to become an exponent of 2, at T or at temperature 1
  DISTIL_FAST_DEVICE float student_rate() const { return log2_e * by_t_; }
  DISTIL_FAST_DEVICE float teacher_rate() const { return log2_e * by_t_; }
  DISTIL_FAST_DEVICE float rate_at_one() const { return log2_e; }
  // the student's logit less the teacher's
  DISTIL_FAST_DEVICE float tops_apart(float s, float t, float apart) const {
    const float d = s - t;
    return (d - apart) + lost_in(s, t, d);
  }
  DISTIL_FAST_DEVICE float logits_apart(float s, float t, float apart) const { return tops_apart(s, t, apart); }

 private:
  const float by_t_;
};

// Any form of both models.
class Formed {
 public:
  DISTIL_FAST_DEVICE Formed(const Form& student, const Form& teacher, float t, float by_t)
      : s_(student), t_(teacher), temperature_(t), by_t_(by_t) {}

  DISTIL_FAST_DEVICE float student(float x) const { return s_.cap == 0.0f ? x : capped(x, s_); }
  DISTIL_FAST_DEVICE float teacher(float x) const {
    if (t_.holds == TeacherForm::probs) return x == minus_infinity ? x : logarithm(x).high;  // a column there is not
    return t_.cap == 0.0f ? x : capped(x, t_);
  }
  DISTIL_FAST_DEVICE float student_logit(float value) const { return unit(s_) * value; }
  DISTIL_FAST_DEVICE float student_rate() const { return log2_e * by_t_ * unit(s_); }
  DISTIL_FAST_DEVICE float teacher_rate() const {
    return t_.holds == TeacherForm::logits ? log2_e * by_t_ * unit(t_) : log2_e;
  }
  DISTIL_FAST_DEVICE float rate_at_one() const { return log2_e * unit(s_); }

  DISTIL_FAST_DEVICE float tops_apart(float s, float t, float apart) const {
    return products_apart(unit(s_), s, unit(t_), t, apart, 0.0f);
  }
  // Of logits under the same softcap, by tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b).
  DISTIL_FAST_DEVICE float logits_apart(float s, float t, float apart) const {
    const bool alike = s_.cap != 0.0f && s_.cap == t_.cap && s_.scale == t_.scale;
    if (const float d = s - t; alike && d - d == 0.0f) {
      const float of_d = tanh(inner(d, s_)), of_s = tanh(inner(s, s_)), of_t = tanh(inner(t, s_));
      return s_.cap * of_d * (1.0f - of_s * of_t) - apart;
    }
    const float off = t_.holds == TeacherForm::probs ? temperature_ * logarithm(t).low : 0.0f;
    return products_apart(unit(s_), student(s), unit(t_), teacher(t), apart, off);
  }
  // A gradient of the student's logit as one of what stands in memory: times scale (1 - tanh^2).
  DISTIL_FAST_DEVICE float back(float gradient, float x) const {
    if (s_.cap == 0.0f) return gradient * s_.scale;
    const float e = hw::exp2(-2.0f * log2_e * __builtin_fabsf(inner(x, s_))), of_e = 1.0f + e;
    return x == minus_infinity ? 0.0f : gradient * (s_.scale * (4.0f * e / (of_e * of_e)));
  }

 private:
  DISTIL_FAST_DEVICE static float inner(float x, const Form& f) {
    const float z = hw::fma(x, f.inner, x * f.inner_low);
    return z == z ? z : x;
  }
  DISTIL_FAST_DEVICE static float capped(float x, const Form& f) { return x == minus_infinity ? x : tanh(inner(x, f)); }
  DISTIL_FAST_DEVICE float unit(const Form& f) const {
    if (f.holds != TeacherForm::logits) return temperature_;
    return f.cap == 0.0f ? f.scale : f.cap;
  }

  const Form &s_, &t_;
  const float temperature_, by_t_;
};

}  // namespace distil_fast::cuda
