// row_loss.cuh: the row algorithm on a GPU: soft term by any divergence, hard term, and the gradient of both, from one
// reading of memory. A cluster takes a row: maxima, sums of exponentials, the divergence, the gradient: four sweeps over
// logits that lie in shared memory, three of them followed by a total over the cluster. Where a thread has few enough
// columns (`kept`), exponentials and g stay in its registers; otherwise they are computed again. The twin of
// cpu/row_loss.cpp; knows no formula of a divergence. Next: row_call.cuh, stage.cuh; docs/math.md for the derivation.
#pragma once

#include "row_call.cuh"
#include "stage.cuh"

namespace distil_fast::cuda {

template <class S, class D, Kind kind>
class RowLossBody {
  static constexpr bool kept = kind == Kind::kept, any = kind == Kind::any;
  static constexpr int W = group_size<S>, K = kept ? kept_columns<D> / W : 1;
  using Student = std::conditional_t<kept, Staged<S, W>, Source<S, W>>;
  using Teacher = std::conditional_t<kept, Staged<S, W>, Source<void, W>>;

 public:
  static constexpr bool staged = kept;

  DISTIL_FAST_DEVICE explicit RowLossBody(const RowLossArgs& args) : a_(args) {}

  DISTIL_FAST_DEVICE Wanted wanted(int row) const {
    const bool soft = a_.values.weights.soft[row] != 0.0f, hard = a_.values.weights.hard[row] != 0.0f;
    const char* student = row_at(a_.student, row, a_.inner);
    const Slice slice = slice_of<S>(a_.grad.data ? row_at(a_.grad, row, a_.inner) : student, a_.cols);
    Wanted w{slice, nullptr, nullptr, dtype_of<S>, kept ? dtype_of<S> : a_.teacher.dtype};
    if (soft || hard) w.first = student + slice.begin * sizeof(S);
    if (soft) w.second = row_at(a_.teacher, row, a_.inner) + slice.begin * size_of(w.second_dtype);
    return w;
  }

  DISTIL_FAST_DEVICE void run(int row, const Slice& slice, const void* first, const void* second,
                              Team<float>& team) const {
    const RowWeights& weights = a_.values.weights;
    const bool soft = weights.soft[row] != 0.0f, hard = weights.hard[row] != 0.0f;
    if (!soft && !hard) {
      if (leads()) a_.values.put_hard(row, 0.0f), a_.values.put_soft(row, 0.0f);
      if (a_.grad.data) sink(row, slice).fill(slice, 0.0f);
      return;
    }
    const Student student(first, slice);
    const Teacher teacher = teacher_at(second, slice);
    Kept memory;
    RowScalars r = scalars(row, slice, soft, hard);

    maxima(slice, student, teacher, r, team);
    exponentials(row, slice, student, teacher, r, memory, team);
    if (any && r.soft && a_.any.checked && !(r.mass <= a_.any.most)) {
      if (leads()) a_.values.refuse(row, FaultKind::teacher_mass, r.mass);
      if (a_.grad.data) sink(row, slice).fill(slice, 0.0f);
      return;
    }
    float f_and_g[2] = {0.0f, 0.0f};
    if (r.soft) diverge(slice, student, teacher, r, memory, f_and_g, team);
    if (leads()) a_.values.put_soft(row, f_and_g[0]);
    if (a_.grad.data) write(row, slice, student, teacher, r, memory, f_and_g[1]);
  }

 private:
  struct Kept {
    float es[kept ? kept_columns<D> : 1], g[kept ? kept_columns<D> : 1];  // g: the teacher's exponentials at first
  };
  struct Group {
    float s[W], t[W];
  };

  DISTIL_FAST_DEVICE Teacher teacher_at(const void* at, const Slice& slice) const {
    if constexpr (kept)
      return Teacher(at, slice);
    else
      return Teacher(at, slice, a_.teacher.dtype);
  }

  // Where the slice begins is found anew: kept from the start of the row, it would cost two registers.
  DISTIL_FAST_DEVICE Sink<S> sink(int row, const Slice& slice) const {
    const char* at = row_at(a_.grad, row, a_.inner);
    return {const_cast<char*>(at) + slice_of<S>(at, a_.cols).begin * sizeof(S), slice};
  }

  DISTIL_FAST_DEVICE static bool is_column(const Slice& slice, int group, int l) {
    const int i = group * W + l - slice.shift;
    return i >= 0 && i < slice.n;
  }

  // A group as logits.
  DISTIL_FAST_DEVICE void load(const Slice& slice, const Student& student, int group, float* to) const {
    student.load(slice, group, to);
    if constexpr (any) {
#pragma unroll
      for (int l = 0; l < W; ++l) to[l] = transformed(to[l], a_.any.student);
    }
  }
  DISTIL_FAST_DEVICE void load(const Slice& slice, const Teacher& teacher, const RowScalars& r, int group,
                               float* to) const {
    teacher.load(slice, group, to);
    if constexpr (any) {
#pragma unroll
      for (int l = 0; l < W; ++l)
        to[l] = is_column(slice, group, l) ? teacher_logit(to[l], a_.any.teacher, r.t) : minus_infinity;
    }
  }

  // f(group, index of its first value among those kept)
  template <class F>
  DISTIL_FAST_DEVICE static void each(const Slice& slice, F f) {
    if constexpr (kept) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int g = hw::thread() + k * hw::threads();
        if (g < slice.groups) f(g, k * W);
      }
    } else {
      for (int g = hw::thread(); g < slice.groups; g += hw::threads()) f(g, 0);
    }
  }

  DISTIL_FAST_DEVICE RowScalars scalars(int row, const Slice& slice, bool soft, bool hard) const {
    RowScalars r{};
    r.soft = soft, r.hard = hard;
    r.t = soft ? a_.values.weights.temperature[row] : 1.0f, r.by_t = 1.0f / r.t;
    r.label = -1;
    if (hard) {
      const int64_t label = a_.labels[row], local = label - slice.begin;
      if (local >= 0 && local < slice.n) r.label = static_cast<int>(local) + slice.shift;
    }
    return r;
  }

  DISTIL_FAST_DEVICE void maxima(const Slice& slice, const Student& student, const Teacher& teacher, RowScalars& r,
                                 Team<float>& team) const {
    float top[2] = {minus_infinity, minus_infinity};
    each(slice, [&](int g, int) {
      float x[W];
      load(slice, student, g, x);
#pragma unroll
      for (int l = 0; l < W; ++l) top[0] = hw::max(top[0], x[l]);
      if (!r.soft) return;
      load(slice, teacher, r, g, x);
#pragma unroll
      for (int l = 0; l < W; ++l) top[1] = hw::max(top[1], x[l]);
    });
    team.combine<Largest>(top);
    r.top_s = top[0], r.top_t = top[1];
    const float distance = r.top_s - r.top_t;
    r.apart = distance > -1e6f && distance < 1e6f ? distance : 0.0f;
  }

  // s - t - apart with one rounding; of 16-bit logits nothing is rounded off.
  DISTIL_FAST_DEVICE static float difference(float s, float t, const RowScalars& r) {
    const float d = s - t;
    if constexpr (kept && sizeof(S) == 2) return d - r.apart;
    return (d - r.apart) + lost_in(s, t, d);
  }

  // Sums of exponentials, and what they settle; the hard term among it.
  DISTIL_FAST_DEVICE void exponentials(int row, const Slice& slice, const Student& student, const Teacher& teacher,
                                       RowScalars& r, Kept& memory, Team<float>& team) const {
    const bool own = r.hard && r.by_t != 1.0f;  // exponentials at temperature 1 are not those at T
    const float k = log2_e * r.by_t;
    // In two levels where there are many: beside a large sum, small terms would lose their digits.
    const float label_logit = r.hard ? logit(row, a_.labels[row]) : 0.0f;  // `write` may destroy it
    float sum[5] = {};  // student, teacher, student at temperature 1 without the label, shifted logits, es d
    each(slice, [&](int g, int at) {
      Group x;
      float es[W], group[5] = {};
      float (&part)[5] = kept ? sum : group;
      load(slice, student, g, x.s);
#pragma unroll
      for (int l = 0; l < W; ++l) es[l] = hw::exp2((x.s[l] - r.top_s) * k), part[0] += es[l];
      if (r.soft) {
        load(slice, teacher, r, g, x.t);
#pragma unroll
        for (int l = 0; l < W; ++l) {
          const float et = hw::exp2((x.t[l] - r.top_t) * k);
          part[1] += et;
          if (D::centred && (!any || a_.any.centred)) part[4] += weighted_difference(es[l], x.s[l], x.t[l], r);
          if constexpr (kept) memory.es[at + l] = es[l], memory.g[at + l] = et;
        }
      } else if constexpr (kept) {
#pragma unroll
        for (int l = 0; l < W; ++l) memory.es[at + l] = es[l];
      }
      if (r.hard) {
        float eh[W];
        at_one(own, x.s, es, r, eh);
        replace_label(g, r, eh, 0.0f);
#pragma unroll
        for (int l = 0; l < W; ++l) part[2] += eh[l];
      }
      if constexpr (!kept) {
#pragma unroll
        for (int i = 0; i < 5; ++i) sum[i] += group[i];
      }
    });
    if (r.hard && a_.label_smoothing != 0.0f) sum[3] = sum_shifted(slice, student, r);
    team.combine<Sum>(sum);
    r.to_q = 1.0f / sum[0];
    if (r.soft) {
      const float distance = r.top_s - r.top_t, left = (distance - r.apart) + lost_in(r.top_s, r.top_t, distance);
      r.to_p = 1.0f / sum[1];
      r.rho = hw::log(sum[0] / sum[1]) + left * r.by_t;
      const float mean = sum[4] * r.to_q * r.by_t - r.rho;
      r.centre = mean - mean == 0.0f ? mean : 0.0f;
      r.mass = sum[1] * hw::exp2(r.top_t * k);
    }
    const HardTerm term = hard_term(a_, r.top_s, label_logit - r.top_s, sum[2], sum[3]);
    r.of_h = term.of_h, r.at_label = term.at_label;
    if (leads()) a_.values.put_hard(row, r.hard ? term.value : 0.0f);
  }

  // Exponentials at temperature 1: those at T, or `own` ones.
  DISTIL_FAST_DEVICE static void at_one(bool own, const float* s, const float* es, const RowScalars& r, float* to) {
#pragma unroll
    for (int l = 0; l < W; ++l) to[l] = es[l];
    if (!own) return;
#pragma unroll
    for (int l = 0; l < W; ++l) to[l] = hw::exp2((s[l] - r.top_s) * log2_e);
  }

  DISTIL_FAST_DEVICE static void replace_label(int group, const RowScalars& r, float* values, float value) {
    if (r.label < 0 || group != r.label / W) return;
#pragma unroll
    for (int l = 0; l < W; ++l) values[l] = l == r.label % W ? value : values[l];
  }

  DISTIL_FAST_DEVICE static float weighted_difference(float es, float s, float t, const RowScalars& r) {
    return es == 0.0f ? 0.0f : es * difference(s, t, r);
  }

  // Of this thread's columns, for label smoothing.
  DISTIL_FAST_DEVICE float sum_shifted(const Slice& slice, const Student& student, const RowScalars& r) const {
    float sum = 0.0f;
    for (int g = hw::thread(); g < slice.groups; g += hw::threads()) {
      float x[W], part = 0.0f;
      load(slice, student, g, x);
#pragma unroll
      for (int l = 0; l < W; ++l) part += is_column(slice, g, l) ? x[l] - r.top_s : 0.0f;
      sum += part;
    }
    return sum;
  }

  // f and g of a group, from log q - log p; es and g are what is kept, or what is to be.
  template <class Of>
  DISTIL_FAST_DEVICE float terms_of(const float* apart, const RowScalars& r, const float* es, float* g) const {
    const Of divergence{a_.parameters[0], a_.parameters[1], r.centre};
    float f = 0.0f;
#pragma unroll
    for (int l = 0; l < W; ++l) {
      const Terms<Lane> terms = divergence(Lane(apart[l]), Lane(g[l] * r.to_p), Lane(es[l] * r.to_q));
      f += terms.f.v;
      g[l] = terms.g.v;
    }
    return f;
  }

  DISTIL_FAST_DEVICE float diverge_group(const Group& x, const RowScalars& r, const float* es, float* g) const {
    float apart[W];
#pragma unroll
    for (int l = 0; l < W; ++l) apart[l] = hw::fma(difference(x.s[l], x.t[l], r), r.by_t, -r.rho);
    if constexpr (!any) {
      return terms_of<D>(apart, r, es, g);
    } else {
      return with_divergence(a_.any.divergence,
                             [&](auto of) { return terms_of<typename decltype(of)::type>(apart, r, es, g); });
    }
  }

  DISTIL_FAST_DEVICE static void again(const Group& x, const RowScalars& r, float* es, float* et) {
    const float k = log2_e * r.by_t;
#pragma unroll
    for (int l = 0; l < W; ++l) {
      es[l] = hw::exp2((x.s[l] - r.top_s) * k);
      et[l] = r.soft ? hw::exp2((x.t[l] - r.top_t) * k) : 0.0f;
    }
  }

  DISTIL_FAST_DEVICE void diverge(const Slice& slice, const Student& student, const Teacher& teacher,
                                  const RowScalars& r, Kept& memory, float (&sum)[2], Team<float>& team) const {
    each(slice, [&](int g, int at) {
      Group x;
      float here[2][W];
      load(slice, student, g, x.s);
      load(slice, teacher, r, g, x.t);
      if constexpr (!kept) again(x, r, here[0], here[1]);
      float* of_g = kept ? memory.g + at : here[1];
      sum[0] += diverge_group(x, r, kept ? memory.es + at : here[0], of_g);
      float part = 0.0f;
#pragma unroll
      for (int l = 0; l < W; ++l) part += of_g[l];
      sum[1] += part;
    });
    team.combine<Sum>(sum);
  }

  DISTIL_FAST_DEVICE float logit(int row, int64_t column) const {
    const float x = widen(reinterpret_cast<const S*>(row_at(a_.student, row, a_.inner))[column]);
    return any ? transformed(x, a_.any.student) : x;
  }

  // The projection comes first: where g is a multiple of q, nothing is left of it. At the label the hard gradient is
  // p - 1 = -rest / z, taken before anything is rounded.
  DISTIL_FAST_DEVICE void write(int row, const Slice& slice, const Student& student, const Teacher& teacher,
                                const RowScalars& r, Kept& memory, float g_sum) const {
    const RowWeights& weights = a_.values.weights;
    const Sink<S> out = sink(row, slice);
    const float by_unit = a_.unit ? 1.0f / *a_.unit : 1.0f, hard_by = r.hard ? weights.hard[row] * by_unit : 0.0f;
    const float of_g = weights.soft[row] * by_unit * r.by_t, of_q = -g_sum * r.to_q, of_h = hard_by * r.of_h;
    const float constant = -hard_by * a_.label_smoothing / static_cast<float>(a_.cols);
    const float at_label = hard_by * (a_.label_smoothing + r.at_label) + constant;
    const bool own = r.hard && r.by_t != 1.0f;
    each(slice, [&](int g, int at) {
      Group x;
      float here[2][W], y[W];
      if (!kept || own) load(slice, student, g, x.s);
      if constexpr (!kept) {
        if (r.soft) load(slice, teacher, r, g, x.t);
        again(x, r, here[0], here[1]);
        if (r.soft) diverge_group(x, r, here[0], here[1]);
      }
      const float* es = kept ? memory.es + at : here[0];
      const float* of_group = kept ? memory.g + at : here[1];
      if (r.hard) {
        at_one(own, x.s, es, r, y);
#pragma unroll
        for (int l = 0; l < W; ++l) y[l] = hw::fma(of_h, y[l], constant);
        replace_label(g, r, y, at_label);
      }
      if (r.soft) {
#pragma unroll
        for (int l = 0; l < W; ++l) y[l] = hw::fma(of_g, hw::fma(of_q, es[l], of_group[l]), r.hard ? y[l] : 0.0f);
      }
      if constexpr (any) {
        student.load(slice, g, x.s);
#pragma unroll
        for (int l = 0; l < W; ++l) y[l] = before_transform(y[l], x.s[l], a_.any.student);
      }
      out.store(slice, g, y);
    });
  }

  const RowLossArgs& a_;
};

template <class S, class D, Kind kind>
DISTIL_FAST_KERNEL(row_threads, 1)
row_loss_kernel(DISTIL_FAST_ARGS(RowLossArgs) args) {
  RowLossBody<S, D, kind> body(args);
  for_rows<group_size<S>>(body, args.rows, args.stages);
}

}  // namespace distil_fast::cuda
