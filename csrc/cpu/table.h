// table.h: what an instruction set offers: pointers to its sweeps. The seam between code compiled once with
// plain flags (row_loss.h and its like) and code compiled once per instruction set (sweeps.h and its like).
// What little it defines is always inlined: the linker could hand an AVX-512 copy of a function to a machine
// without it. Next: sweeps.h.
#pragma once

#include <cstdint>

#include "../core.h"
#include "../divergences.h"

namespace distil_fast {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// How the student's exponentials at temperature 1 (hard term) follow from those at T. linear: T = 1, the same
// ones (or there is no hard term). square: T = 2. own: computed anew.
enum class Hard { linear, square, own };

#define DISTIL_FAST_ID(name, Functor) name,
enum class DivergenceId { DISTIL_FAST_DIVERGENCES(DISTIL_FAST_ID) count };
#undef DISTIL_FAST_ID

// One block of columns in the first sweep. Exponentials are relative to a reference per model: the first
// block's maximum serves the whole row, unless a block's sum shows that it must take its own.
template <class Real>
struct Block {
  Real ref_s, ref_t;   // in
  Real z_s, z_t, z_h;  // out: sums of exponentials, z_h at temperature 1

  // The models' distance, taken off the difference of their logits so that this is as small as the models are
  // close.
  [[gnu::always_inline]] Real apart() const {
    const Real distance = ref_s - ref_t;
    return distance > Real(-1e6) && distance < Real(1e6) ? distance : Real(0);
  }
  // Neither infinite, nor undefined, nor near the end of a float's range.
  [[gnu::always_inline]] bool in_range() const { return z_s < Real(1e18) && z_t < Real(1e18) && z_h < Real(1e18); }
};

// What to bring into the cache while sweeping one block: part of the row that this thread turns to next. A
// sweep that computes leaves memory idle, and the first sweep of the next row would wait for it.
struct Ahead {
  const char *student, *teacher;
  int64_t student_step, teacher_step;  // bytes per 4 columns swept

  [[gnu::always_inline]] void fetch(int64_t j) const {
    fetch_student(j);
    __builtin_prefetch(teacher + j * teacher_step / 4, 0, 2);
  }
  [[gnu::always_inline]] void fetch_student(int64_t j) const {
    __builtin_prefetch(student + j * student_step / 4, 0, 2);
  }
};

// The scalars of the second sweep.
struct Divide {
  double to_p, to_q, inverse_t, rho, first, second, centre;
};

// The scalars of the third sweep.
struct Combine {
  double of_g, of_q, of_h, constant, ref_s;
};

// How what a model gives becomes logits: scale x; cap tanh(scale x / cap) where cap is not 0; scale log x.
struct Prepare {
  double scale, cap;
  bool logarithm;
};

// A dtype's index: f64 alone, or f32, f16, bf16 in DType's order.
template <class Real>
inline constexpr int dtypes = sizeof(Real) == 8 ? 1 : 3;

template <class Real>
struct Sweeps {
  static constexpr int D = dtypes<Real>;
  void (*exponentiate[D][D][3])(const void* student, const void* teacher, int64_t n, double temperature, Real* es,
                                Real* et, Real* difference, Block<Real>* block, const Ahead& ahead);
  void (*exponentiate_alone[D])(const void* logits, int64_t n, double temperature, Real* es, Block<Real>* block,
                                const Ahead& ahead);
  void (*prepare[D])(const void* given, int64_t n, const Prepare& by, Real* logits);
  void (*chain[D])(void* out, const void* student, const Real* gradient, int64_t n, const Prepare& by);
  double (*maximum[D])(const void* logits, int64_t n);
  double (*exponential_sum[D])(const void* logits, int64_t n, double reference);
  double (*shifted_sum[D])(const void* logits, int64_t n, double reference);
  double (*weighted_difference)(const Real* es, const Real* difference, int64_t n);
  bool centred[static_cast<int>(DivergenceId::count)];
  void (*diverge[static_cast<int>(DivergenceId::count)])(const Real* es, const Real* et, Real* difference, int64_t n,
                                                         const Divide& by, double* f_sum, double* g_sum,
                                                         const Ahead& ahead);
  void (*gradient[D][3])(void* out, const void* student, const Real* g, const Real* es, int64_t n, const Combine& by,
                         const Ahead& ahead);
  void (*gradient_alone[D])(void* out, const void* student, const Real* g, const Real* es, int64_t n, const Combine& by,
                            const Ahead& ahead);
};

template <int D>
struct SoftmaxSweeps {
  void (*log_probabilities[D])(void* out, const void* logits, int64_t n, double shift, double inverse_t, double log_z);
  double (*upstream_sum[D][2])(const void* out, const void* grad_out, int64_t n);
  void (*gradient[D][2])(void* grad, const void* out, const void* grad_out, int64_t n, double total, double inverse_t);
};

template <int D>
struct PairSweeps {
  void (*square_sums[D][D])(const void* student, const void* teacher, int64_t n, double* ss, double* tt);
  void (*distance[D][D])(const void* student, const void* teacher, int64_t n, double inverse_s, double inverse_t,
                         double* e_square, double* u_e);
  void (*cosine_gradient[D][D])(void* grad, const void* student, const void* teacher, int64_t n, double inverse_s,
                                double inverse_t, double of_e, double of_u);
  // of a PairKind but cosine: the row's sum; grad = of_g g, where grad is not null
  double (*entries[3][D][D])(void* grad, const void* student, const void* teacher, int64_t n, double of_g);
};

template <class Real>
struct TopKSweeps {
  static constexpr int D = dtypes<Real>;
  void (*exponentiate[D][3])(const void* logits, int64_t n, double temperature, Real* es, Block<Real>* block,
                             const Ahead& ahead);  // by Hard
  double (*total)(const Real* es, int64_t n);
};

template <class Real>
struct ShardSweeps {
  // gap, tail and lean of a block (ShardSums), those of the student [0] or the teacher [1].
  void (*sums[2])(const Real* es, const Real* et, const Real* difference, int64_t n, double inverse_t, double to_q,
                  double pivot, double* out);
  void (*sum_below[dtypes<Real>])(const void* logits, int64_t n, double top, double* below, double* at_top);
};

// All that one instruction set offers for one Real.
template <class Real>
struct Table {
  Sweeps<Real> rows;
  SoftmaxSweeps<dtypes<Real>> softmax;
  PairSweeps<dtypes<Real>> pairs;
  TopKSweeps<Real> topk;
  ShardSweeps<Real> shards;
  void (*rescale[dtypes<Real>])(void* values, int64_t n, double factor);
};

}  // namespace distil_fast
