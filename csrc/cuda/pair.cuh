// pair.cuh: the losses that compare two tensors row by row, value and gradient from one reading of memory: what all kinds
// do with a row, and the kinds that sum a functor of ../pairs.h over its entries. The twin of cpu/pair.h. Knows nothing
// of masks. Next: cosine.cuh, the kind that needs the rows' norms first; weights.cuh, whose shares it multiplies with.
#pragma once

#include "stage.cuh"
#include "weights.cuh"

namespace distil_fast::cuda {

struct PairArgs {
  int rows = 0;
  int64_t inner = 0, cols = 0;
  Matrix student, teacher, grad;
  float scale = 1.0f;
  RowValues values;
  const float* unit = nullptr;
  Stages stages;
};

// A body of stage.cuh, but for `run`.
template <class S>
class PairRows {
 protected:
  static constexpr int W = group_size<S>;

 public:
  static constexpr bool staged = false;
  DISTIL_FAST_DEVICE explicit PairRows(const PairArgs& args) : a_(args) {}

  DISTIL_FAST_DEVICE Wanted wanted(int row) const {
    const char* student = row_at(a_.student, row, a_.inner);
    const Slice slice = slice_of<S>(a_.grad.data ? row_at(a_.grad, row, a_.inner) : student, a_.cols);
    Wanted w{slice, nullptr, nullptr, dtype_of<S>, a_.teacher.dtype};
    if (a_.values.weights.soft[row] == 0.0f) return w;
    w.first = student + slice.begin * static_cast<int64_t>(sizeof(S));
    w.second = row_at(a_.teacher, row, a_.inner) + slice.begin * size_of(w.second_dtype);
    return w;
  }

 protected:
  // Whether a row weighs nothing; then all that is due of it is done.
  DISTIL_FAST_DEVICE bool skips(int row, const Slice& slice) const {
    if (a_.values.weights.soft[row] != 0.0f) return false;
    put(row, 0.0f);
    if (a_.grad.data) sink(row, slice).fill(slice, 0.0f);
    return true;
  }
  DISTIL_FAST_DEVICE void put(int row, float value) const {
    if (hw::rank() != 0 || hw::thread() != 0) return;
    a_.values.put_hard(row, 0.0f), a_.values.put_soft(row, a_.scale * value);
  }
  // What a row's gradient is multiplied with.
  DISTIL_FAST_DEVICE float to_gradient(int row) const {
    return a_.values.weights.soft[row] * a_.scale * (a_.unit ? 1.0f / *a_.unit : 1.0f);
  }
  DISTIL_FAST_DEVICE Sink<S> sink(int row, const Slice& slice) const {
    return {const_cast<char*>(row_at(a_.grad, row, a_.inner)) + slice.begin * sizeof(S), slice};
  }

  // f(group, student, teacher) for this thread's groups; columns outside of the slice are 0.
  template <class F>
  DISTIL_FAST_DEVICE static void each(const Slice& slice, const Source<S, W>& student, const Source<void, W>& teacher,
                                      F f) {
    for (int g = hw::thread(); g < slice.groups; g += hw::threads()) {
      float s[W], t[W];
      student.load(slice, g, s);
      teacher.load(slice, g, t);
      const int i = g * W - slice.shift;
#pragma unroll
      for (int l = 0; l < W; ++l)
        if (i + l < 0 || i + l >= slice.n) s[l] = t[l] = 0.0f;
      f(g, s, t);
    }
  }

  const PairArgs& a_;
};

// A double as digits of base 4096 and a rest, all of them floats: over 8192 threads, digits are added without rounding
// (the first one as long as the total is below 4096).
struct Digits {
  static constexpr int count = 4;

  DISTIL_FAST_DEVICE static void split(double x, float* to) {
    for (int i = 0; i + 1 < count; ++i) {
      x *= 4096.0;
      const double digit = (x + 0x1.8p52) - 0x1.8p52;  // rounded to a whole number
      to[i] = static_cast<float>(digit);
      x -= digit;
    }
    to[count - 1] = static_cast<float>(x);
  }
  DISTIL_FAST_DEVICE static double join(const float* from) {
    double x = from[count - 1];
    for (int i = count - 2; i >= 0; --i) x = (x + from[i]) / 4096.0;
    return x;
  }
};

template <class S, class Pair>
class EntriesBody : public PairRows<S> {
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
    const Pair pair;
    const float of_g = to_gradient(row);
    float f = 0.0f;
    double exact = 0.0;  // of what is of first order
    each(slice, student, teacher, [&](int g, const float* s, const float* t) {
      float y[W], part = 0.0f;
#pragma unroll
      for (int l = 0; l < W; ++l) {
        const PairTerms<Lane> x = pair(Lane(s[l]), Lane(t[l]));
        part += x.f.v;
        if constexpr (Pair::has_first) exact += static_cast<double>(x.first.v);
        y[l] = of_g * x.g.v;
      }
      f += part;
      if (a_.grad.data) sink(row, slice).store(slice, g, y);
    });
    float sums[Pair::has_first ? 1 + Digits::count : 1] = {f};
    if constexpr (Pair::has_first) Digits::split(exact, sums + 1);
    team.combine<Sum>(sums);
    double value = sums[0];
    if constexpr (Pair::has_first) value += Digits::join(sums + 1);
    put(row, static_cast<float>(value));
  }
};

template <class S, class Pair>
DISTIL_FAST_KERNEL(row_threads, 1)
entries_kernel(DISTIL_FAST_ARGS(PairArgs) args) {
  const EntriesBody<S, Pair> body(args);
  for_rows<group_size<S>>(body, args.rows, args.stages);
}

}  // namespace distil_fast::cuda
