// row_call.cuh: what the row loss' kernels are told, the kinds of them that there are, and what all threads of a cluster
// know of the row at hand. Knows no sweep. Next: row_loss.cuh, the kernels; form.cuh, weights.cuh.
#pragma once

#include "form.cuh"
#include "stage.cuh"
#include "weights.cuh"

namespace distil_fast::cuda {

// `kept` and `again` are of logits as they are, and of one divergence; `any` computes again, from any form of both models
// and by any divergence, chosen at run time.
enum class Kind { kept, again, any };

#define DISTIL_FAST_DIVERGENCE_INDEX(name, D) name,
#define DISTIL_FAST_DIVERGENCE_CENTRED(name, D) D::centred,
enum class DivergenceIndex { DISTIL_FAST_DIVERGENCES(DISTIL_FAST_DIVERGENCE_INDEX) };

// Stands for the divergence of `any`.
struct AnyDivergence {
  static constexpr bool centred = true;
};

// Columns that a thread keeps: what the registers hold beside what a divergence needs for itself, by ptxas's count.
template <class D>
constexpr int kept_columns = D::centred ? 16 : 24;
template <>
inline constexpr int kept_columns<ForwardKL> = 32;
template <>
inline constexpr int kept_columns<JensenShannon> = 32;
template <>
inline constexpr int kept_columns<AlphaBeta> = 16;

struct RowLossArgs {
  int rows = 0, inner = 0, cols = 0;
  Matrix student, teacher, grad;
  const int64_t* labels = nullptr;
  RowValues values;
  const float* unit = nullptr;
  float label_smoothing = 0.0f, z_loss = 0.0f;
  double parameters[2] = {0.0, 0.0};
  struct {  // for Kind::any
    Form student, teacher;
    int divergence = 0;
    bool centred = false;
    bool checked = false;  // the teacher's rows are distributions, or at fault,
    float most = 1.0f;     // if they sum to more
  } any;
  Stages stages;
};

// f(Type<D>()) of the divergence D with this index.
template <class D>
struct Type {
  using type = D;
};
template <class F>
DISTIL_FAST_DEVICE auto with_divergence(int index, const F& f) {
#define DISTIL_FAST_WITH(name, D)               \
  case static_cast<int>(DivergenceIndex::name): \
    return f(Type<D>());
  switch (index) {
    DISTIL_FAST_DIVERGENCES(DISTIL_FAST_WITH)
    default:
      return f(Type<ForwardKL>());  // there is no such index
  }
}

DISTIL_FAST_DEVICE bool leads() { return hw::rank() == 0 && hw::thread() == 0; }

// The hard term's value, and what its gradient needs: a factor of the exponentials at temperature 1, and what stands at
// the label before smoothing.
struct HardTerm {
  float value, of_h, at_label;
};

// From the largest logit, the label's relative to it, the sum of the others' exponentials, and that of all logits
// relative to the largest.
DISTIL_FAST_DEVICE HardTerm hard_term(const RowLossArgs& a, float top, float shifted, float rest, float shifted_sum) {
  const float own = hw::exp2(shifted * log2_e), z = rest + own, log_z = hw::log(z), lse = log_z + top;
  const float slope = a.z_loss == 0.0f ? 0.0f : 2.0f * a.z_loss * lse;
  float value = own > rest ? hw::log1p(rest / own) : log_z - shifted;
  if (a.label_smoothing != 0.0f) {
    const float uniform = log_z - shifted_sum / static_cast<float>(a.cols);
    value = (1.0f - a.label_smoothing) * value + a.label_smoothing * uniform;
  }
  if (a.z_loss != 0.0f) value += a.z_loss * lse * lse;
  return {value, (1.0f + slope) / z, (slope * own - rest) / z};
}

// What fp32 rounds off in a - b = d (Knuth's TwoSum); an infinite d has lost nothing.
DISTIL_FAST_DEVICE float lost_in(float a, float b, float d) {
  const float back = d - a, lost = (a - (d - back)) - (b + back);
  return lost == lost ? lost : 0.0f;
}

// What all threads know of the row at hand.
struct RowScalars {
  bool soft, hard;     // which terms it has
  float t, by_t;       // T; 1 / T
  float top_s, top_t;  // maxima
  float apart, rho;    // distance taken off s - t; lse_s - lse_t without it
  float to_p, to_q;    // 1 / sums of exponentials
  float of_h;          // what the hard gradient is, by the exponential at temperature 1,
  float at_label;      // and at the label
  float centre;        // for a centred divergence
  float mass;          // of a teacher that has probabilities
  int label;           // its value in the slice's groups; -1: it is in another slice, or there is none
};

}  // namespace distil_fast::cuda
