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
    float most = 1.0f;      // that a row of probabilities may sum to
    float* mass = nullptr;  // out [rows]: what one at fault sums to, else 0; null: the teacher has logits
  } any;
  Stages stages;
};

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
