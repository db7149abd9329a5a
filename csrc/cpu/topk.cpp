// topk.cpp: the row algorithm with a teacher of k columns a row: the student's exponentials in one sweep, the k outcomes
// and their bucket in a small vector of their own, the gradient in a second sweep, and at the ids once more. What does
// not ask for the teacher (weights, labels, the hard term, sums over rows) is row_loss.h's. Next: topk.h; docs/math.md,
// section 10.
#include <atomic>

#include "row_loss.h"

namespace distil_fast {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr double negligible = 1e-2;  // of mass that is missing to 1, where the student has none outside: rounding
constexpr double faint = 1e-25;      // a tail of so little mass takes a reference of its own: floats end at 1e-38

// What a row's outcomes come to. Its gradient is weight / T times g_i - of_q q_i at an id, of_tail e_j elsewhere.
struct Soft {
  int64_t n;     // entries that are no padding
  double p_sum;  // of their probabilities
  double of_q, of_tail;
};

// Sum of the student's exponentials outside the ids, relative to a reference.
struct Outside {
  double z, ref;
};

// A row's entries, behind the row algorithm's own scratch.
template <class Real>
struct Entries {
  Soft* soft;
  int64_t* ids;
  double *logits, *log_p, *exp_q, *exp_p;  // [k]; exponentials relative to references of their own
  double* outside;                         // [blocks]
  Real *p, *q, *g;                         // [k + 1]; g begins as r

  static int64_t padded(int64_t k) { return Scratch<Real>::padded(k + 1); }
  static size_t bytes(int64_t cols, int64_t k) {
    return sizeof(Soft) + (5 * k + Scratch<Real>::blocks_of(cols)) * sizeof(double) + 3 * padded(k) * sizeof(Real) + 64;
  }
  Entries(std::byte* memory, int64_t cols, int64_t k) {
    soft = reinterpret_cast<Soft*>(memory);
    ids = reinterpret_cast<int64_t*>(soft + 1);
    logits = reinterpret_cast<double*>(ids + k);
    log_p = logits + k;
    exp_q = log_p + k;
    exp_p = exp_q + k;
    outside = exp_p + k;
    p = reinterpret_cast<Real*>(outside + Scratch<Real>::blocks_of(cols));
    q = p + padded(k);
    g = q + padded(k);
  }
  // Where exponentials of 0 make a vector's rest harmless.
  void pad(int64_t n) {
    for (int64_t i = n; i < Scratch<Real>::padded(n); ++i) p[i] = q[i] = g[i] = 0;
  }
};

template <class Real>
class TopKCall : RowLossCall<Real> {
  using Base = RowLossCall<Real>;
  using Base::block_size, Base::block_start, Base::blocks, Base::fade, Base::logit, Base::put;
  using Base::c_, Base::rows_, Base::size_, Base::table_, Base::temperature_;

 public:
  // `rows` is the call's own, with the log-probabilities in the teacher's place: there is a soft term.
  TopKCall(const TopKLoss& call, const RowLoss& rows)
      : Base(rows), k_(call.k), topk_(call), sweeps_(table<Real>().topk) {}

  Fault run() {
    if (Fault fault = Base::weigh(); fault.kind != FaultKind::nothing) return fault;
    if (Fault fault = check(); fault.kind != FaultKind::nothing) return fault;
    std::unique_ptr<double[]> values(new double[2 * rows_]);
    Base::soft_ = values.get();
    Base::hard_ = values.get() + rows_;
    for_rows(rows_, c_.cols, scratch_of_rows() + Entries<Real>::bytes(c_.cols, k_),
             [this](int64_t row, auto team, std::byte* memory) { run_row(row, team, memory); });
    Base::reduce();
    return {};
  }

 private:
  size_t scratch_of_rows() const { return (Scratch<Real>::bytes(c_.cols) + 63) / 64 * 64; }
  const int64_t* ids_of(int64_t row) const { return topk_.ids + row * k_; }
  const Real* log_probs_of(int64_t row) const { return static_cast<const Real*>(topk_.log_probs) + row * k_; }

  // The first row at fault, before a logit is read; the order of rows, whatever the threads.
  Fault check() const {
    std::atomic<int64_t> first{rows_};
    const size_t seen_bytes = (c_.cols + 63) / 64 * 8,
                 bytes = seen_bytes + Scratch<Real>::padded(k_) * 2 * sizeof(Real);
    auto fault_of = [&](int64_t row, std::byte* memory) {
      return check_row(row, reinterpret_cast<uint64_t*>(memory), reinterpret_cast<Real*>(memory + seen_bytes));
    };
    for_rows(rows_, k_, bytes, [&](int64_t row, auto team, std::byte* memory) {
      team.each(1, [&](int64_t) {
        if (Base::soft_weight(row) == 0.0 || fault_of(row, memory).kind == FaultKind::nothing) return;
        int64_t known = first;
        while (row < known && !first.compare_exchange_weak(known, row)) {
        }
      });
    });
    return first == rows_ ? Fault{} : fault_of(first, scratch(bytes));
  }

  // `seen` is a bit for each column, `values` room for the log-probabilities and their exponentials.
  Fault check_row(int64_t row, uint64_t* seen, Real* values) const {
    const int64_t* ids = ids_of(row);
    const Real* log_probs = log_probs_of(row);
    for (int64_t i = 0; i < k_; ++i) {
      if (ids[i] < -1 || ids[i] >= c_.cols) return {FaultKind::topk_id, row, static_cast<double>(ids[i])};
      if (ids[i] >= 0) seen[ids[i] / 64] = 0;
    }
    int64_t n = 0;
    for (int64_t i = 0; i < k_; ++i) {
      if (ids[i] < 0) continue;
      const uint64_t bit = uint64_t(1) << ids[i] % 64;
      if (seen[ids[i] / 64] & bit) return {FaultKind::topk_id, row, static_cast<double>(ids[i])};
      seen[ids[i] / 64] |= bit;
      if (!(log_probs[i] <= topk_.tolerance)) return {FaultKind::topk_log_prob, row, double(log_probs[i])};
      values[n++] = log_probs[i];
    }
    Block<Real> sum{};
    table_.exponentiate_alone[0](values, n, 1.0, values + Scratch<Real>::padded(k_), &sum, Ahead{});
    if (sum.z_s > 1.0 + topk_.tolerance) return {FaultKind::teacher_mass, row, double(sum.z_s)};
    return {};
  }

  template <class Team>
  void run_row(int64_t row, const Team& team, std::byte* memory) {
    const double soft_w = Base::soft_weight(row), hard_w = Base::hard_weight(row);
    if (soft_w == 0.0) return Base::run_row(row, team, memory);
    char* out = c_.grad.data ? row_at(c_.grad, row, c_.inner) : nullptr;
    const char* student = row_at(c_.student, row, c_.inner);
    const int64_t label = hard_w != 0.0 ? c_.labels[row] : -1;
    const bool tailed = topk_.tail != Tail::renormalise;
    const double own_t = temperature_[row], t = tailed ? own_t : 1.0;  // without a tail the sweeps are the hard term's
    const Hard kind = label < 0 || t == 1.0 ? Hard::linear : t == 2.0 ? Hard::square : Hard::own;
    Scratch<Real> w(memory, c_.cols);
    Entries<Real> e(memory + scratch_of_rows(), c_.cols, k_);

    team.each(1, [&](int64_t) { gather(row, student, e); });
    Row sums{};
    double rest = 0.0;
    if (tailed || label >= 0) {
      exponentiate(team, row, student, t, kind, w);
      sums = Base::combine(w, nullptr, t, kind);
    }
    if (label >= 0) rest = Base::all_but(label, student, sums, w, t, kind);
    const double hard = label >= 0 ? Base::cross_entropy(label, student, sums, rest) : 0.0;
    team.meet();  // what follows overwrites the exponentials' references and, in place, the logits
    const Outside outside = tailed ? leave_out(team, student, t, sums, w, e) : Outside{};
    team.each(1, [&](int64_t) {
      Base::hard_[row] = hard;
      Base::soft_[row] = tailed ? against_all(t, sums, outside, e) : renormalised(own_t, e);
    });
    if (out)
      write(team, row, out, student, label, {soft_w / own_t / Base::unit_, hard_w / Base::unit_}, t, kind, sums,
            outside, rest, w, e);
  }

  void gather(int64_t row, const char* student, Entries<Real>& e) const {
    const int64_t* ids = ids_of(row);
    const Real* log_probs = log_probs_of(row);
    Soft& soft = *e.soft = {};
    for (int64_t i = 0; i < k_; ++i) {
      if (ids[i] < 0) continue;
      e.ids[soft.n] = ids[i];
      e.logits[soft.n] = logit(student, ids[i]);
      e.log_p[soft.n] = log_probs[i];
      soft.p_sum += e.exp_p[soft.n] = std::exp(double(log_probs[i]));
      ++soft.n;
    }
  }

  template <class Team>
  void exponentiate(const Team& team, int64_t row, const char* student, double t, Hard kind, Scratch<Real>& w) const {
    const int s = index(c_.student.dtype);
    auto reference = [&](int64_t b) { return table_.maximum[s](student + block_start(b) * size_, block_size(b)); };
    auto sweep = [&](int64_t b, double ref) {
      const int64_t j = block_start(b);
      w.blocks[b] = Block<Real>{Real(ref), 0, 0, 0, 0};
      sweeps_.exponentiate[s][static_cast<int>(kind)](student + j * size_, block_size(b), t, w.es + j, w.blocks + b,
                                                      Base::ahead_of(row, b, 0, 2));
    };
    const double first = reference(0);
    team.each(blocks(), [&](int64_t b) {
      sweep(b, first);
      if (!w.blocks[b].in_range()) sweep(b, reference(b));
    });
  }

  // Takes the ids out of the exponentials, and sums the others: subtracted from the whole, a small rest would have lost
  // its digits.
  template <class Team>
  Outside leave_out(const Team& team, const char* student, double t, const Row& sums, Scratch<Real>& w,
                    Entries<Real>& e) const {
    team.each(1, [&](int64_t) {
      for (int64_t i = 0; i < e.soft->n; ++i) w.es[e.ids[i]] = 0;
    });
    const double z = sum_outside(team, t, sums.ref_s, w, e);
    if (!(z < faint) || e.soft->n == c_.cols) return {z, sums.ref_s};
    const int s = index(c_.student.dtype);
    team.each(blocks(), [&](int64_t b) {
      sweeps_.widen[s](student + block_start(b) * size_, block_size(b), w.et + block_start(b));
    });
    team.each(1, [&](int64_t) {
      for (int64_t i = 0; i < e.soft->n; ++i) w.et[e.ids[i]] = -infinity;
    });
    double ref = table_.maximum[0](w.et, c_.cols);
    team.each(blocks(), [&](int64_t b) {
      w.blocks[b].ref_s = Real(ref);
      table_.exponentiate_alone[0](w.et + block_start(b), block_size(b), t, w.es + block_start(b), w.blocks + b,
                                   Ahead{});
    });
    return {sum_outside(team, t, ref, w, e), ref};
  }

  template <class Team>
  double sum_outside(const Team& team, double t, double ref, const Scratch<Real>& w, Entries<Real>& e) const {
    team.each(blocks(), [&](int64_t b) { e.outside[b] = sweeps_.total(w.es + block_start(b), block_size(b)); });
    double z = 0.0;
    for (int64_t b = 0; b < blocks(); ++b) z += e.outside[b] * fade(w.blocks[b].ref_s, ref, t);
    team.meet();  // `outside` may be used again
    return z;
  }

  // Exponentials of the entries' logits at temperature t, and their sum.
  double exponentiate_ids(double t, double ref, Entries<Real>& e) const {
    double z = 0.0;
    for (int64_t i = 0; i < e.soft->n; ++i) z += e.exp_q[i] = std::exp((e.logits[i] - ref) / t);
    return z;
  }

  // One outcome: its probabilities, and r = log q - log p.
  void outcome(int64_t i, double p, double q, double r, Entries<Real>& e) const {
    e.p[i] = Real(p);
    e.q[i] = Real(q);
    e.g[i] = p == 0.0 && q == 0.0 ? Real(0) : Real(r);
  }

  // The ids', of exponentials that sum to z_q and z_p over the distribution.
  void outcomes(double t, double ref_q, double z_q, double ref_p, double z_p, Entries<Real>& e) const {
    const double rho = std::log(z_q) - (ref_p + std::log(z_p));
    for (int64_t i = 0; i < e.soft->n; ++i)
      outcome(i, e.exp_p[i] / z_p, e.exp_q[i] / z_q, (e.logits[i] - ref_q) / t - e.log_p[i] - rho, e);
  }

  struct Sums {
    double f, g, centre;
  };

  // The divergence over n outcomes; r makes room for g.
  Sums diverge(int64_t n, Entries<Real>& e) const {
    e.pad(n);
    double centre = table_.centred[c_.divergence] ? table_.weighted_difference(e.q, e.g, n) : 0.0;
    if (!std::isfinite(centre)) centre = 0.0;
    const Divide by{1.0, 1.0, 1.0, 0.0, c_.parameters[0], c_.parameters[1], centre};
    double f, g;
    table_.diverge[c_.divergence](e.q, e.p, e.g, n, by, &f, &g, Ahead{});
    return {f, g, centre};
  }

  // Tails that compare the student's own distribution, over all columns.
  double against_all(double t, const Row& sums, const Outside& outside, Entries<Real>& e) const {
    Soft& soft = *e.soft;
    const double apart = outside.ref == sums.ref_s ? 0.0 : (outside.ref - sums.ref_s) / t;
    const double z_ids = exponentiate_ids(t, sums.ref_s, e);
    const double z_tail = outside.z * (apart == 0.0 ? 1.0 : std::exp(apart));
    const double z = z_ids + z_tail > 0.0 ? z_ids + z_tail : nan, q_ids = z_ids / z, q_tail = z_tail / z;
    outcomes(t, sums.ref_s, z, 0.0, 1.0, e);
    double value, of_tail;
    if (topk_.tail == Tail::bucket) {
      const double missing = 1.0 - soft.p_sum;
      const double p_tail = missing > 0.0 && !(outside.z == 0.0 && missing <= negligible) ? missing : 0.0;
      const double log_p = soft.p_sum < 0.5 ? std::log1p(-soft.p_sum) : std::log(p_tail);
      outcome(soft.n, p_tail, q_tail, std::log(outside.z) + apart - std::log(z) - log_p, e);
      const Sums over = diverge(soft.n + 1, e);
      value = over.f - topk_.shift * (missing - p_tail);  // 0 unless `missing` is below 0 or negligible
      soft.of_q = over.g;
      of_tail = e.g[soft.n] - q_tail * over.g;
    } else {
      const Sums over = diverge(soft.n, e);
      const double added = topk_.shift - over.centre;  // to g, in units of q
      value = over.f - topk_.shift * (q_ids - soft.p_sum);
      soft.of_q = over.g + added * q_tail;
      of_tail = -q_tail * (over.g - added * q_ids);
    }
    soft.of_tail = outside.z == 0.0 ? 0.0 : of_tail / outside.z;
    return value;
  }

  // Both models over the ids alone.
  double renormalised(double t, Entries<Real>& e) const {
    Soft& soft = *e.soft;
    if (soft.n == 0) return 0.0;
    double ref = -infinity, ref_p = -infinity, z_p = 0.0;
    for (int64_t i = 0; i < soft.n; ++i) {
      ref = std::max(ref, e.logits[i]);
      ref_p = std::max(ref_p, e.log_p[i]);
    }
    for (int64_t i = 0; i < soft.n; ++i) z_p += e.exp_p[i] = std::exp(e.log_p[i] - ref_p);
    outcomes(t, ref, exponentiate_ids(t, ref, e), ref_p, z_p, e);
    const Sums over = diverge(soft.n, e);
    soft.of_q = over.g;
    return over.f;
  }

  // weight.soft holds 1 / T already.
  template <class Team>
  void write(const Team& team, int64_t row, char* out, const char* student, int64_t label,
             typename Base::Weights weight, double t, Hard kind, const Row& sums, const Outside& outside, double rest,
             const Scratch<Real>& w, const Entries<Real>& e) const {
    const bool tailed = topk_.tail != Tail::renormalise;
    if (!tailed && label < 0) {
      team.each(1, [&](int64_t) { std::memset(out, 0, c_.cols * size_); });
    } else {
      static constexpr Real zeros[block_cols] = {};
      const int s = index(c_.student.dtype);
      auto sweep = tailed ? table_.gradient[s][static_cast<int>(kind)] : table_.gradient_alone[s];
      team.each(blocks(), [&](int64_t b) {
        const int64_t j = block_start(b);
        Ahead ahead = Base::ahead_of(row, b, 2, 2);
        ahead.teacher = ahead.student, ahead.teacher_step = ahead.student_step;
        sweep(out + j * size_, student + j * size_, zeros, w.es + j, block_size(b),
              factors(b, label, weight, t, sums, outside, w, e), ahead);
      });
    }
    // At the label the hard gradient is p - 1 = -rest / z, which loses nothing where p is 1.
    const double constant = uniform(label, weight), at_label = weight.hard * (smoothing(label) - rest / sums.z_h);
    team.each(1, [&](int64_t) {
      if (label >= 0) {
        const double of_q = tailed ? factors(label / block_cols, label, weight, t, sums, outside, w, e).of_q : 0.0;
        put(out, label, at_label + constant + (tailed ? of_q * w.es[label] : 0.0));
      }
      for (int64_t i = 0; i < e.soft->n; ++i) {
        double value = weight.soft * (e.g[i] - e.q[i] * e.soft->of_q);
        if (label >= 0) {
          const double q = std::exp(e.logits[i] - sums.ref_s) / sums.z_h;
          value += constant + (e.ids[i] == label ? at_label : weight.hard * q);
        }
        put(out, e.ids[i], value);
      }
    });
  }

  double smoothing(int64_t label) const { return label >= 0 ? c_.label_smoothing : 0.0; }
  double uniform(int64_t label, const typename Base::Weights& weight) const {
    return -weight.hard * smoothing(label) / static_cast<double>(c_.cols);
  }

  // The scalars of the last sweep, outside the ids; the soft gradient there is a multiple of the exponentials.
  Combine factors(int64_t b, int64_t label, const typename Base::Weights& weight, double t, const Row& sums,
                  const Outside& outside, const Scratch<Real>& w, const Entries<Real>& e) const {
    const double ref = w.blocks[b].ref_s;
    const double soft = weight.soft * e.soft->of_tail * fade(ref, outside.ref, t);
    const double hard = label < 0 ? 0.0 : weight.hard * fade(ref, sums.ref_s, 1.0) / sums.z_h;
    return {1.0, soft, hard, uniform(label, weight), ref};
  }

  const int64_t k_;
  const TopKLoss& topk_;
  const TopKSweeps<Real>& sweeps_;
};

template <class Real>
Fault run(const TopKLoss& call, DType real) {
  RowLoss rows = call.row;
  rows.teacher = {const_cast<void*>(call.log_probs), real, rows.inner * call.k, call.k};
  return TopKCall<Real>(call, rows).run();
}

}  // namespace

Fault topk_loss_cpu(const TopKLoss& call) {
  if (call.row.student.dtype == DType::f64) return run<double>(call, DType::f64);
  return run<float>(call, DType::f32);
}

}  // namespace distil_fast
