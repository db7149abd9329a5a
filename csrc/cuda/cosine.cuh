// cosine.cuh: the cosine loss over rows, value and gradient from one reading of memory. With u = s / |s| and v = t / |t|:
// 1 - cos = |u - v|^2 / 2, which loses nothing as s -> t. The twin of cpu/pair.h. Knows nothing of masks. Next: pair.cuh,
// the rows that it shares with the other kinds; docs/math.md for the gradient.
#pragma once

#include "pair.cuh"

namespace distil_fast::cuda {

constexpr float cosine_eps = 1e-12f;  // on both squared norms, as ATen's cosine_embedding_loss has it

template <class S>
class CosineBody : public PairRows<S> {
  using Rows = PairRows<S>;
  using Rows::a_, Rows::each, Rows::sink, Rows::skips, Rows::put, Rows::to_gradient;
  static constexpr int W = group_size<S>;

 public:
  using Rows::Rows;

  DISTIL_FAST_DEVICE void run(int row, const Slice& slice, const void* first, const void* second,
                              Team<float>& team) const {
    if (skips(row, slice)) return;
    const Source<S, W> student(first, slice);
    const Source<void, W> teacher(second, slice, a_.teacher.dtype);
    float squares[2] = {0.0f, 0.0f};
    each(slice, student, teacher, [&](int, const float* s, const float* t) {
      float part[2] = {0.0f, 0.0f};
#pragma unroll
      for (int l = 0; l < W; ++l) part[0] = hw::fma(s[l], s[l], part[0]), part[1] = hw::fma(t[l], t[l], part[1]);
      squares[0] += part[0], squares[1] += part[1];
    });
    team.combine<Sum>(squares);
    const float ss = squares[0] + cosine_eps, tt = squares[1] + cosine_eps;
    const float by_s = 1.0f / hw::sqrt(ss), by_t = 1.0f / hw::sqrt(tt);

    float sums[2] = {0.0f, 0.0f};  // of e^2 and u e, with e = v - u
    each(slice, student, teacher, [&](int, const float* s, const float* t) {
      float part[2] = {0.0f, 0.0f};
#pragma unroll
      for (int l = 0; l < W; ++l) {
        const float e = apart(s[l], by_s, t[l], by_t);
        part[0] = hw::fma(e, e, part[0]), part[1] = hw::fma(s[l] * by_s, e, part[1]);
      }
      sums[0] += part[0], sums[1] += part[1];
    });
    team.combine<Sum>(sums);
    put(row, 0.5f * (sums[0] + cosine_eps / ss + cosine_eps / tt));
    if (!a_.grad.data) return;

    const float of_e = -to_gradient(row) * by_s, of_u = of_e * (cosine_eps / ss - sums[1]);
    const Sink<S> out = sink(row, slice);
    each(slice, student, teacher, [&](int g, const float* s, const float* t) {
      float y[W];
#pragma unroll
      for (int l = 0; l < W; ++l) y[l] = hw::fma(of_e, apart(s[l], by_s, t[l], by_t), of_u * (s[l] * by_s));
      out.store(slice, g, y);
    });
  }

  // The student's norm, for the unit of an fp16 gradient.
  DISTIL_FAST_DEVICE float norm(const Slice& slice, const void* first, Team<float>& team) const {
    const Source<S, W> student(first, slice);
    float square[1] = {0.0f};
    for (int g = hw::thread(); g < slice.groups; g += hw::threads()) {
      float s[W];
      student.load(slice, g, s);
      const int i = g * W - slice.shift;
#pragma unroll
      for (int l = 0; l < W; ++l)
        if (i + l >= 0 && i + l < slice.n) square[0] = hw::fma(s[l], s[l], square[0]);
    }
    team.combine<Sum>(square);
    return hw::sqrt(square[0] + cosine_eps);
  }

 private:
  // v - u with one rounding: the product that would round s / |s| is corrected by its own error.
  DISTIL_FAST_DEVICE static float apart(float s, float by_s, float t, float by_t) {
    const float u = s * by_s;
    return hw::fma(t, by_t, -u) - hw::fma(s, by_s, -u);
  }
};

template <class S>
DISTIL_FAST_KERNEL(row_threads, 1)
cosine_kernel(DISTIL_FAST_ARGS(PairArgs) args) {
  const CosineBody<S> body(args);
  for_rows<group_size<S>>(body, args.rows, args.stages);
}

struct NormArgs {
  int rows = 0;
  int64_t inner = 0, cols = 0;
  Matrix student;
  const void* mask = nullptr;
  bool mask_is_bool = false;
  Quantity weight;
  float* norms = nullptr;  // [rows]; 1 where a row is not used
};

// Of half-precision rows, one block each, before their weights are known: the unit needs both.
DISTIL_FAST_KERNEL(row_threads, 1) norm_kernel(DISTIL_FAST_ARGS(NormArgs) args) {
  Team<float> team(reinterpret_cast<float*>(hw::shared() + team_at));
  PairArgs of_rows;
  const CosineBody<Half> body(of_rows);
  for (int row = hw::block(); row < args.rows; row += hw::blocks()) {
    bool used = args.weight.value() != 0.0;
    if (used && args.mask)
      used = args.mask_is_bool ? static_cast<const unsigned char*>(args.mask)[row] != 0
                               : static_cast<const float*>(args.mask)[row] != 0.0f;
    float norm = 1.0f;
    if (used) {
      const char* at = row_at(args.student, row, args.inner);
      norm = body.norm(slice_of<Half>(at, args.cols), at, team);
    }
    if (hw::thread() == 0) args.norms[row] = norm;
  }
}

}  // namespace distil_fast::cuda
