// softmax.cuh: softmax and log_softmax at a temperature, and their backward: a cluster takes a row, reads it once and
// writes once. Knows nothing of losses. Next: softmax.cu, which launches; stage.cuh.
#pragma once

#include "stage.cuh"

namespace distil_fast::cuda {

struct SoftmaxArgs {
  int rows = 0;
  int64_t inner = 0, cols = 0;
  Matrix in, grad_out,
      out;  // forward: logits, nothing, probabilities; backward: probabilities, their gradient, the logits'
  bool logarithm = false;
  const float* temperatures = nullptr;  // [rows]; null: the number, or what stands at `temperature`
  const float* temperature = nullptr;
  float number = 1.0f;
  Stages stages;

  DISTIL_FAST_DEVICE float temperature_of(int row) const {
    const float t = temperatures ? temperatures[row] : temperature ? *temperature : number;
    return t >= 1e-15f && t <= 1e15f ? t : __builtin_nanf("");  // the row becomes nan
  }
};

template <class S>
class SoftmaxRows {
 protected:
  static constexpr int W = group_size<S>;
  using Array = Source<S, W>;

 public:
  static constexpr bool staged = false;
  DISTIL_FAST_DEVICE explicit SoftmaxRows(const SoftmaxArgs& args) : a_(args) {}

  DISTIL_FAST_DEVICE Wanted wanted(int row) const {
    const Slice slice = slice_of<S>(row_at(a_.out, row, a_.inner), a_.cols);
    const int64_t from = slice.begin * static_cast<int64_t>(sizeof(S));
    return {slice, row_at(a_.in, row, a_.inner) + from,
            a_.grad_out.data ? row_at(a_.grad_out, row, a_.inner) + from : nullptr, dtype_of<S>, dtype_of<S>};
  }

 protected:
  DISTIL_FAST_DEVICE Sink<S> sink(int row, const Slice& slice) const {
    return {const_cast<char*>(row_at(a_.out, row, a_.inner)) + slice.begin * sizeof(S), slice};
  }
  // f(group) for this thread's groups
  template <class F>
  DISTIL_FAST_DEVICE static void each(const Slice& slice, F f) {
    for (int g = hw::thread(); g < slice.groups; g += hw::threads()) f(g);
  }
  const SoftmaxArgs& a_;
};

template <class S>
class SoftmaxForward : public SoftmaxRows<S> {
  using Rows = SoftmaxRows<S>;
  using Rows::a_, Rows::W;

 public:
  using Rows::Rows;

  DISTIL_FAST_DEVICE void run(int row, const Slice& slice, const void* first, const void*, Team<float>& team) const {
    const typename Rows::Array logits(first, slice);
    const float by_t = 1.0f / a_.temperature_of(row), k = log2_e * by_t;
    float top[1] = {minus_infinity}, z[1] = {0.0f};
    Rows::each(slice, [&](int g) {
      float x[W];
      logits.load(slice, g, x);
#pragma unroll
      for (int l = 0; l < W; ++l) top[0] = hw::max(top[0], x[l]);
    });
    team.combine<Largest>(top);
    Rows::each(slice, [&](int g) {
      float x[W], part = 0.0f;
      logits.load(slice, g, x);
#pragma unroll
      for (int l = 0; l < W; ++l) part += hw::exp2((x[l] - top[0]) * k);
      z[0] += part;
    });
    team.combine<Sum>(z);
    const float log_z = hw::log(z[0]), by_z = 1.0f / z[0];
    const Sink<S> out = Rows::sink(row, slice);
    Rows::each(slice, [&](int g) {
      float x[W];
      logits.load(slice, g, x);
#pragma unroll
      for (int l = 0; l < W; ++l) {
        const float shifted = x[l] - top[0];
        x[l] = a_.logarithm ? hw::fma(shifted, by_t, -log_z) : hw::exp2(shifted * k) * by_z;
      }
      out.store(slice, g, x);
    });
  }
};

// softmax: grad = y (g - sum g y) / T; log_softmax: grad = (g - exp(y) sum g) / T.
template <class S>
class SoftmaxBackwardRows : public SoftmaxRows<S> {
  using Rows = SoftmaxRows<S>;
  using Rows::a_, Rows::W;

 public:
  using Rows::Rows;

  DISTIL_FAST_DEVICE void run(int row, const Slice& slice, const void* first, const void* second,
                              Team<float>& team) const {
    const typename Rows::Array values(first, slice), upstream(second, slice);
    const float by_t = 1.0f / a_.temperature_of(row);
    float total[1] = {0.0f};
    Rows::each(slice, [&](int g) {
      float y[W], u[W], part = 0.0f;
      values.load(slice, g, y);
      upstream.load(slice, g, u);
      const int i = g * W - slice.shift;
#pragma unroll
      for (int l = 0; l < W; ++l)
        if (i + l >= 0 && i + l < slice.n) part += a_.logarithm ? u[l] : u[l] * y[l];
      total[0] += part;
    });
    team.combine<Sum>(total);
    const Sink<S> out = Rows::sink(row, slice);
    Rows::each(slice, [&](int g) {
      float y[W], u[W];
      values.load(slice, g, y);
      upstream.load(slice, g, u);
#pragma unroll
      for (int l = 0; l < W; ++l)
        u[l] = (a_.logarithm ? u[l] - hw::exp2(y[l] * log2_e) * total[0] : y[l] * (u[l] - total[0])) * by_t;
      out.store(slice, g, u);
    });
  }
};

template <class Rows, int W>
DISTIL_FAST_KERNEL(row_threads, 1)
softmax_kernel(DISTIL_FAST_ARGS(SoftmaxArgs) args) {
  const Rows rows(args);
  for_rows<W>(rows, args.rows, args.stages);
}

}  // namespace distil_fast::cuda
