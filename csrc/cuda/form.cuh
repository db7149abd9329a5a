// form.cuh: what the values in memory are as logits: what they are, under a scale and a softcap, or a teacher's
// probabilities or their logarithms. Knows no sums and no divergence. Next: row_loss.cuh; reference.py, which defines
// them; docs/math.md for what a logit that is rounded here may cost.
#pragma once

#include "scalar.cuh"

namespace distil_fast::cuda {

// Of one model: cap tanh(scale x / cap), or scale x where cap is 0. What holds no logits is at the temperature already.
struct Form {
  float scale = 1.0f, cap = 0.0f;
  TeacherForm holds = TeacherForm::logits;
};

inline Form form_of(const Transform& transform, TeacherForm holds) {
  return {static_cast<float>(transform.scale), static_cast<float>(transform.cap), holds};
}

// At most 3 ulp.
DISTIL_FAST_DEVICE float tanh(float x) {
  const float size = __builtin_fabsf(x), x2 = x * x;
  float p = hw::fma(0.0157394409f, x2, -0.052302558f);
  p = hw::fma(p, x2, 0.133152977f);
  p = hw::fma(p, x2, -0.333327681f);
  const float far = 1.0f - 2.0f / (1.0f + hw::exp2(2.0f * log2_e * size));
  return size < 0.55f ? hw::fma(p * x2, x, x) : __builtin_copysignf(far, x);
}

// A masked column, -inf, stays one.
DISTIL_FAST_DEVICE float transformed(float x, const Form& form) {
  if (form.cap == 0.0f) return form.scale * x;
  return x == minus_infinity ? x : form.cap * tanh(form.scale * x / form.cap);
}

// A logit of the teacher at temperature t.
DISTIL_FAST_DEVICE float teacher_logit(float x, const Form& form, float t) {
  if (form.holds == TeacherForm::logits) return transformed(x, form);
  return t * (form.holds == TeacherForm::probs ? hw::log(x) : x);
}

// The gradient of a transformed logit as that of x: times scale (1 - tanh^2).
DISTIL_FAST_DEVICE float before_transform(float gradient, float x, const Form& form) {
  if (form.cap == 0.0f) return gradient * form.scale;
  const float e = hw::exp2(-2.0f * log2_e * __builtin_fabsf(form.scale * x / form.cap)), of_e = 1.0f + e;
  return x == minus_infinity ? 0.0f : gradient * (form.scale * (4.0f * e / (of_e * of_e)));
}

}  // namespace distil_fast::cuda
