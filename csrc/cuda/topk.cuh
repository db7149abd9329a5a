// topk.cuh: the row loss of a teacher of k columns a row. A cluster takes a row of the student, as in row_loss.cuh; the
// outcomes (the k, and the tail's bucket) every block works through for itself, a thread per outcome, in double where
// digits would cancel. Which columns are among the k stands as a bit for each in shared memory. The twin of
// cpu/topk.cpp. Next: row_call.cuh, stage.cuh; docs/math.md, "A top-k teacher".
#pragma once

#include "row_call.cuh"

namespace distil_fast::cuda {

struct TopKLossArgs : RowLossArgs {  // the teacher's matrix is not read
  int k = 0;
  const int64_t* ids = nullptr;      // [rows, k]; -1: no entry
  const float* log_probs = nullptr;  // [rows, k]
  float tolerance = 0.0f;
  Tail tail = Tail::bucket;
  float shift = 0.0f;
  int scratch_at = 0;  // shared memory of the outcomes' team and the columns' bits
};

constexpr int topk_team = Team<double>::values * 8;  // bytes

// Bytes of shared memory that a row of `cols` needs beside its stages.
inline int64_t topk_scratch(int64_t cols) { return topk_team + (over(cols + 8, 32) + 1) * 4; }

template <class S>
class TopKBody {
  static constexpr int W = group_size<S>;

 public:
  static constexpr bool staged = false;

  DISTIL_FAST_DEVICE explicit TopKBody(const TopKLossArgs& args) : a_(args) {}

  DISTIL_FAST_DEVICE Wanted wanted(int row) const {
    const bool soft = a_.values.weights.soft[row] != 0.0f, hard = a_.values.weights.hard[row] != 0.0f;
    const Slice slice = slice_of<S>(written(row), a_.cols);
    const char* student = row_at(a_.student, row, a_.inner) + slice.begin * sizeof(S);
    return {slice, hard || (soft && tailed()) ? student : nullptr, nullptr, dtype_of<S>, dtype_of<S>};
  }

  DISTIL_FAST_DEVICE void run(int row, const Slice& slice, const void* at, const void*, Team<float>& team) const {
    const RowWeights& weights = a_.values.weights;
    Row r{};
    r.soft = weights.soft[row] != 0.0f, r.hard = weights.hard[row] != 0.0f;
    r.whole = r.hard || (r.soft && tailed());
    if (!r.soft && !r.hard) {
      if (leads()) a_.values.put_hard(row, 0.0f), a_.values.put_soft(row, 0.0f);
      if (a_.grad.data) sink(row, slice).fill(slice, 0.0f);
      return;
    }
    r.t = r.soft ? weights.temperature[row] : 1.0f, r.label = -1;
    if (r.hard) {
      const int64_t local = a_.labels[row] - slice.begin;
      if (local >= 0 && local < slice.n) r.label = static_cast<int>(local) + slice.shift;
    }
    Team<double> outcomes(reinterpret_cast<double*>(hw::shared() + a_.scratch_at));
    const Source<S, W> student(at, slice);
    float top[4] = {minus_infinity, minus_infinity, minus_infinity, minus_infinity};
    const Flaw flaw = r.soft ? entries(row, r, top, outcomes) : Flaw{};
    sums(row, slice, student, top, r, team);
    if (flaw.kind != FaultKind::nothing) {
      if (leads()) a_.values.refuse(row, flaw.kind, flaw.value);
      if (a_.grad.data) sink(row, slice).fill(slice, 0.0f);
      return;
    }
    const float value = r.soft ? diverge(row, r, outcomes) : 0.0f;
    if (leads()) a_.values.put_soft(row, value);
    if (hw::ranks() > 1) hw::cluster_sync();  // in place, the gradient destroys what peers read
    if (a_.grad.data) write(row, slice, student, r);
  }

 private:
  struct Flaw {
    FaultKind kind = FaultKind::nothing;
    double value = 0.0;
  };

  // What all threads know of the row at hand.
  struct Row {
    bool soft, hard, whole;  // which terms it has; whether they need more of it than the k columns
    float t;                 // temperature
    int label;               // as in RowScalars
    float top, top_outside;  // the largest logit of all, and of those outside the k
    float z_outside;         // sum of exponentials there, relative to their largest
    float of_h, at_label;    // of the hard term
    double ref_q, z_q;       // student's exponentials: reference and sum, over all columns or over the k
    double ref_p, z_p;       // of the teacher's
    double p_sum;            // its probabilities
    double q_tail, p_tail, r_tail;
    float centre;
    double of_q, of_outside;  // the gradient: g_i - of_q q_i; of_outside times an exponential outside
  };

  struct Outcome {
    float p, q, r;
  };

  DISTIL_FAST_DEVICE bool tailed() const { return a_.tail != Tail::renormalise; }
  DISTIL_FAST_DEVICE const char* written(int row) const {
    return row_at(a_.grad.data ? a_.grad : a_.student, row, a_.inner);
  }
  DISTIL_FAST_DEVICE Sink<S> sink(int row, const Slice& slice) const {
    return {const_cast<char*>(written(row)) + slice.begin * sizeof(S), slice};
  }
  DISTIL_FAST_DEVICE float given(int row, int64_t column) const {
    return widen(reinterpret_cast<const S*>(row_at(a_.student, row, a_.inner))[column]);
  }
  DISTIL_FAST_DEVICE float logit(int row, int64_t column) const {
    return transformed(given(row, column), a_.any.student);
  }
  DISTIL_FAST_DEVICE void load(const Slice& slice, const Source<S, W>& student, int group, float* to) const {
    student.load(slice, group, to);
#pragma unroll
    for (int l = 0; l < W; ++l) to[l] = transformed(to[l], a_.any.student);
  }

  // ---- a bit for each column, in groups as the row has them

  DISTIL_FAST_DEVICE uint32_t* bits() const {
    return reinterpret_cast<uint32_t*>(hw::shared() + a_.scratch_at + topk_team);
  }
  // Whether it was set before.
  DISTIL_FAST_DEVICE bool set_bit(int row, int64_t column) const {
    const auto at = static_cast<unsigned>(column + shift_of<S>(written(row)));
    const uint32_t bit = 1u << at % 32;
    return hw::atomic_or(bits() + at / 32, bit) & bit;
  }
  // Those of a group of this block's slice.
  DISTIL_FAST_DEVICE uint32_t bits_of(const Row& r, int row, const Slice& slice, int group) const {
    if (!r.soft) return 0;
    const int first = static_cast<int>(slice.begin + (slice.begin ? shift_of<S>(written(row)) : 0));
    const int at = first + group * W;
    return bits()[at / 32] >> at % 32 & ((1u << W) - 1);
  }

  // ---- the outcomes

  // f(id, log-probability, index) of this thread's entries; they stay its own from one call to the next.
  template <class F>
  DISTIL_FAST_DEVICE void each_entry(int row, F f) const {
    const int64_t first = static_cast<int64_t>(row) * a_.k;
    for (int i = hw::thread(); i < a_.k; i += hw::threads()) f(a_.ids[first + i], a_.log_probs[first + i], i);
  }

  // Sets bits, sums probabilities, finds maxima and what is wrong.
  DISTIL_FAST_DEVICE Flaw entries(int row, Row& r, float* top, Team<double>& team) const {
    // the row before is done with its bits: a barrier follows every look at them
    const int words = static_cast<int>(over(a_.cols + W, 32));
    for (int w = hw::thread(); w < words; w += hw::threads()) bits()[w] = 0;
    hw::sync();
    double bad[3] = {},
           sum[1] = {};  // of each fault, the more the earlier it is: no column, a column twice, no logarithm
    each_entry(row, [&](int64_t id, float log_p, int i) {
      if (id == -1) return;
      const double early = a_.k - i;
      if (id < 0 || id >= a_.cols) {
        bad[0] = Largest::of(bad[0], early);
        return;
      }
      if (set_bit(row, id)) bad[1] = Largest::of(bad[1], static_cast<double>(a_.cols - id));
      if (!(log_p <= a_.tolerance)) bad[2] = Largest::of(bad[2], early);
      sum[0] += ::exp(static_cast<double>(log_p));
      top[2] = hw::max(top[2], logit(row, id)), top[3] = hw::max(top[3], log_p);
    });
    team.combine<Largest>(bad);
    team.combine<Sum>(sum);
    r.p_sum = sum[0];
    const int64_t at = static_cast<int64_t>(row) * a_.k + a_.k;
    if (bad[0] > 0.0) return {FaultKind::topk_id, static_cast<double>(a_.ids[at - static_cast<int>(bad[0])])};
    if (bad[1] > 0.0) return {FaultKind::topk_id, a_.cols - bad[1]};
    if (bad[2] > 0.0) return {FaultKind::topk_log_prob, a_.log_probs[at - static_cast<int>(bad[2])]};
    return r.p_sum > 1.0 + a_.tolerance ? Flaw{FaultKind::teacher_mass, r.p_sum} : Flaw{};
  }

  // Of one that the models give e_q and e_p beside references and sums.
  DISTIL_FAST_DEVICE Outcome outcome(const Row& r, float logit, float log_p) const {
    const double apart_q = (logit - r.ref_q) / r.t, apart_p = log_p - r.ref_p;
    const double p = ::exp(apart_p) / r.z_p, q = ::exp(apart_q) / r.z_q;
    const double by = apart_q - ::log(r.z_q) - (apart_p - ::log(r.z_p));
    const bool impossible = p == 0.0 && q == 0.0;
    return {static_cast<float>(p), static_cast<float>(q), impossible ? 0.0f : static_cast<float>(by)};
  }

  // f(outcome) of each that is this thread's, the bucket among them.
  template <class F>
  DISTIL_FAST_DEVICE void each_outcome(int row, const Row& r, F f) const {
    each_entry(row, [&](int64_t id, float log_p, int) {
      if (id >= 0) f(outcome(r, logit(row, id), log_p));
    });
    if (a_.tail == Tail::bucket && hw::thread() == 0) f(bucket(r));
  }
  DISTIL_FAST_DEVICE static Outcome bucket(const Row& r) {
    return {static_cast<float>(r.p_tail), static_cast<float>(r.q_tail), static_cast<float>(r.r_tail)};
  }

  DISTIL_FAST_DEVICE Terms<Lane> terms(const Row& r, const Outcome& o) const {
    return with_divergence(a_.any.divergence, [&](auto of) {
      const typename decltype(of)::type divergence{a_.parameters[0], a_.parameters[1], r.centre};
      return divergence(Lane(o.r), Lane(o.p), Lane(o.q));
    });
  }

  // The row's divergence, and what its gradient needs.
  DISTIL_FAST_DEVICE float diverge(int row, Row& r, Team<double>& team) const {
    double z[2] = {};
    each_entry(row, [&](int64_t id, float log_p, int) {
      if (id < 0) return;
      z[0] += ::exp((logit(row, id) - r.ref_q) / r.t), z[1] += ::exp(log_p - r.ref_p);
    });
    team.combine<Sum>(z);
    r.z_q = z[0], r.z_p = z[1];
    if (tailed()) compare_tails(r);
    if (a_.any.centred && a_.tail != Tail::ignore) {
      double mean[1] = {};
      each_outcome(row, r, [&](const Outcome& o) { mean[0] += o.q == 0.0f ? 0.0 : static_cast<double>(o.q) * o.r; });
      team.combine<Sum>(mean);
      r.centre = mean[0] - mean[0] == 0.0 ? static_cast<float>(mean[0]) : 0.0f;
    }
    double total[2] = {};
    each_outcome(row, r, [&](const Outcome& o) {
      const Terms<Lane> both = terms(r, o);
      total[0] += both.f.v, total[1] += both.g.v;
    });
    team.combine<Sum>(total);
    return static_cast<float>(settle(r, total[0], total[1]));
  }

  // The student's sum over all columns, and the bucket.
  DISTIL_FAST_DEVICE void compare_tails(Row& r) const {
    const bool none = r.z_outside == 0.0f;
    const double apart = none ? 0.0 : (static_cast<double>(r.top_outside) - r.top) / r.t;
    const double z_tail = r.z_outside * ::exp(apart), z = r.z_q + z_tail, missing = 1.0 - r.p_sum;
    r.z_p = 1.0;
    r.z_q = z > 0.0 ? z : static_cast<double>(not_a_number);
    r.q_tail = z_tail / r.z_q;
    r.p_tail = missing > 0.0 && !(none && missing <= 1e-2) ? missing : 0.0;  // negligible: rounding
    const double log_p = r.p_sum < 0.5 ? ::log1p(-r.p_sum) : ::log(r.p_tail);
    const double by = ::log(static_cast<double>(r.z_outside)) + apart - ::log(r.z_q) - log_p;
    r.r_tail = r.p_tail == 0.0 && r.q_tail == 0.0 ? 0.0 : by;
  }

  // From the sums of f and g over the outcomes. What the functors shift f and g by comes to nothing over a distribution;
  // over a part of one it is taken off.
  DISTIL_FAST_DEVICE double settle(Row& r, double f, double g) const {
    const double shift = a_.shift, q_ids = 1.0 - r.q_tail;
    double value = f, of_tail = 0.0;
    r.of_q = g;
    if (a_.tail == Tail::bucket) {
      value -= shift * (1.0 - r.p_sum - r.p_tail);
      of_tail = terms(r, bucket(r)).g.v - r.q_tail * g;
    } else if (a_.tail == Tail::ignore) {
      value -= shift * (q_ids - r.p_sum);
      r.of_q = g + shift * r.q_tail;
      of_tail = -r.q_tail * (g - shift * q_ids);
    }
    r.of_outside = r.z_outside == 0.0f ? 0.0 : of_tail / r.z_outside;
    return value;
  }

  // ---- sweeps over the row

  template <class F>
  DISTIL_FAST_DEVICE static void each_group(const Slice& slice, F f) {
    for (int g = hw::thread(); g < slice.groups; g += hw::threads()) f(g);
  }

  // Maxima, sums of exponentials, and the hard term.
  DISTIL_FAST_DEVICE void sums(int row, const Slice& slice, const Source<S, W>& student, float (&top)[4], Row& r,
                               Team<float>& team) const {
    if (r.whole) {
      each_group(slice, [&](int g) {
        float x[W];
        load(slice, student, g, x);
        const uint32_t among = bits_of(r, row, slice, g);
#pragma unroll
        for (int l = 0; l < W; ++l) {
          top[0] = hw::max(top[0], x[l]);
          if (!(among >> l & 1)) top[1] = hw::max(top[1], x[l]);
        }
      });
    }
    team.combine<Largest>(top);
    r.top = top[0], r.top_outside = top[1] == minus_infinity ? 0.0f : top[1];
    r.ref_q = tailed() ? top[0] : top[2], r.ref_p = tailed() ? 0.0f : top[3];
    const float label = r.hard ? logit(row, a_.labels[row]) : 0.0f, k = log2_e / r.t;
    float sum[3] = {};  // outside the k at T, all but the label at temperature 1, all logits
    if (r.whole) {
      each_group(slice, [&](int g) {
        float x[W], part[3] = {};
        load(slice, student, g, x);
        const uint32_t among = bits_of(r, row, slice, g);
#pragma unroll
        for (int l = 0; l < W; ++l) {
          const int at = g * W + l, i = at - slice.shift;
          if (i < 0 || i >= slice.n) continue;
          if (r.soft && !(among >> l & 1)) part[0] += hw::exp2((x[l] - r.top_outside) * k);
          if (r.hard && at != r.label) part[1] += hw::exp2((x[l] - r.top) * log2_e);
          part[2] += x[l] - r.top;
        }
#pragma unroll
        for (int i = 0; i < 3; ++i) sum[i] += part[i];
      });
    }
    team.combine<Sum>(sum);
    r.z_outside = sum[0];
    const HardTerm term = hard_term(a_, r.top, label - r.top, sum[1], sum[2]);
    r.of_h = term.of_h, r.at_label = term.at_label;
    if (leads()) a_.values.put_hard(row, r.hard ? term.value : 0.0f);
  }

  // Outside the k by groups, each of the k by the thread that knows it.
  DISTIL_FAST_DEVICE void write(int row, const Slice& slice, const Source<S, W>& student, const Row& r) const {
    const RowWeights& weights = a_.values.weights;
    const Sink<S> out = sink(row, slice);
    const float by_unit = a_.unit ? 1.0f / *a_.unit : 1.0f, hard_by = r.hard ? weights.hard[row] * by_unit : 0.0f;
    const float of_soft = weights.soft[row] * by_unit / r.t, of_outside = of_soft * static_cast<float>(r.of_outside);
    const float of_h = hard_by * r.of_h, constant = -hard_by * a_.label_smoothing / static_cast<float>(a_.cols);
    const float at_label = hard_by * (a_.label_smoothing + r.at_label) + constant, k = log2_e / r.t;
    auto hard = [&](float x, bool is_label) {
      return !r.hard ? 0.0f : is_label ? at_label : hw::fma(of_h, hw::exp2((x - r.top) * log2_e), constant);
    };
    each_group(slice, [&](int g) {
      float x[W] = {}, y[W];
      if (r.whole) student.load(slice, g, x);
      const uint32_t among = bits_of(r, row, slice, g);
#pragma unroll
      for (int l = 0; l < W; ++l) {
        const float s = transformed(x[l], a_.any.student);
        const float soft = r.soft && tailed() ? of_outside * hw::exp2((s - r.top_outside) * k) : 0.0f;
        y[l] = before_transform(soft + hard(s, g * W + l == r.label), x[l], a_.any.student);
      }
      if (!among) return out.store(slice, g, y);
      const int i = g * W - slice.shift;
#pragma unroll
      for (int l = 0; l < W; ++l)
        if (i + l >= 0 && i + l < slice.n && !(among >> l & 1)) out.put(i + l, y[l]);
    });
    if (!r.soft) return;
    hw::sync();  // in place, a group is read whole by its thread, the columns of ids too
    each_entry(row, [&](int64_t id, float log_p, int) {
      const int64_t local = id - slice.begin;
      if (id < 0 || local < 0 || local >= slice.n) return;
      const float x = given(row, id), s = transformed(x, a_.any.student);
      const Outcome o = outcome(r, s, log_p);
      const float soft = of_soft * static_cast<float>(terms(r, o).g.v - r.of_q * o.q);
      const float y = soft + hard(s, local + slice.shift == r.label);
      out.put(static_cast<int>(local), before_transform(y, x, a_.any.student));
    });
  }

  const TopKLossArgs& a_;
};

template <class S>
DISTIL_FAST_KERNEL(row_threads, 1)
topk_loss_kernel(DISTIL_FAST_ARGS(TopKLossArgs) args) {
  TopKBody<S> body(args);
  for_rows<group_size<S>>(body, args.rows, args.stages);
}

}  // namespace distil_fast::cuda
