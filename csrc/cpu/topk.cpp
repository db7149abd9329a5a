// topk.cpp: the row algorithm with a teacher of k columns a row: the student's exponentials in one sweep, the k outcomes
// and their bucket in a small vector of their own, the gradient in a second sweep, and at the ids once more. What does
// not ask for the teacher (weights, labels, the hard term, sums over rows) is row_call.h's. Next: topk.h; docs/math.md,
// section 10.
#include <atomic>
#include <cstring>
#include <memory>

#include "row_call.h"

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
    return sizeof(Soft) + (5 * k + blocks_of(cols)) * sizeof(double) + 3 * padded(k) * sizeof(Real) + 64;
  }
  Entries(std::byte* memory, int64_t cols, int64_t k) {
    soft = reinterpret_cast<Soft*>(memory);
    ids = reinterpret_cast<int64_t*>(soft + 1);
    logits = reinterpret_cast<double*>(ids + k);
    log_p = logits + k;
    exp_q = log_p + k;
    exp_p = exp_q + k;
    outside = exp_p + k;
    p = reinterpret_cast<Real*>(outside + blocks_of(cols));
    q = p + padded(k);
    g = q + padded(k);
  }
  // Where exponentials of 0 make a vector's rest harmless.
  void pad(int64_t n) {
    for (int64_t i = n; i < Scratch<Real>::padded(n); ++i) p[i] = q[i] = g[i] = 0;
  }
};

template <class Real>
class TopKCall : RowCall<Real> {
  using Base = RowCall<Real>;
  using Base::ahead_of, Base::blocks, Base::given, Base::of_student, Base::put, Base::size_at;
  using Base::c_, Base::hard_, Base::prepares_student_, Base::rows_, Base::size_, Base::soft_, Base::table_,
      Base::temperature_, Base::unit_;
  using typename Base::Weights;

 public:
  // `rows` is the call's own, with the log-probabilities in the teacher's place: there is a soft term.
  TopKCall(const TopKLoss& call, const RowLoss& rows)
      : Base(rows), k_(call.k), topk_(call), sweeps_(table<Real>().topk) {}

  Fault run() {
    if (Fault fault = Base::weigh(); fault.kind != FaultKind::nothing) return fault;
    if (Fault fault = check(); fault.kind != FaultKind::nothing) return fault;
    std::unique_ptr<double[]> values(new double[2 * rows_]);
    soft_ = values.get();
    hard_ = soft_ + rows_;
    for_rows(rows_, c_.cols, scratch_of_rows() + Entries<Real>::bytes(c_.cols, k_),
             [this](int64_t row, auto team, std::byte* memory) { run_row(row, team, memory); });
    Base::reduce();
    return {};
  }

 private:
  size_t scratch_of_rows() const { return (Scratch<Real>::bytes(c_.cols, prepares_student_) + 63) / 64 * 64; }
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
    char* out = c_.grad.data ? row_at(c_.grad, row, c_.inner) : nullptr;
    Entries<Real> e(memory + scratch_of_rows(), c_.cols, k_);
    team.each(1, [&](int64_t) {
      soft_[row] = hard_[row] = 0.0;
      *e.soft = {};
      if (soft_w != 0.0) gather(row, e);
    });
    const bool tailed = soft_w != 0.0 && topk_.tail != Tail::renormalise;
    const int64_t label = hard_w != 0.0 ? c_.labels[row] : -1;
    const double own_t = soft_w != 0.0 ? temperature_[row] : 1.0;
    if (!tailed && label < 0) {
      team.each(1, [&](int64_t) {
        soft_[row] = renormalised(own_t, e);
        if (out) write_ids_alone(row, out, soft_w / own_t / unit_, e);
      });
      return;
    }
    const double t = tailed ? own_t : 1.0;  // without a tail the sweeps are the hard term's
    const Hard kind = label < 0 || t == 1.0 ? Hard::linear : t == 2.0 ? Hard::square : Hard::own;
    Scratch<Real> w(memory, c_.cols, prepares_student_);
    const Logits student = Base::student_logits(team, row, w);
    exponentiate(team, row, student, t, kind, w);
    const Row sums = Base::combine(w, Logits{}, t, kind);
    const HardTerm<Real> hard(table_, c_, student, label, sums, w, t, kind);
    const double hard_value = label >= 0 ? hard.value() : 0.0;
    team.meet();  // what follows overwrites the exponentials' references and, in place, the logits
    const Outside outside = tailed ? leave_out(team, student, t, sums, w, e) : Outside{};
    team.each(1, [&](int64_t) {
      hard_[row] = hard_value;
      soft_[row] = tailed ? against_all(t, sums, outside, e) : renormalised(own_t, e);
    });
    const Weights weight{soft_w / own_t / unit_, hard_w / unit_};
    if (out) write(team, row, out, student, label, tailed, weight, t, kind, sums, outside, hard, w, e);
  }

  void gather(int64_t row, Entries<Real>& e) const {
    const int64_t* ids = ids_of(row);
    const Real* log_probs = log_probs_of(row);
    const Logits raw = given(c_.student, row);
    Soft& soft = *e.soft;
    for (int64_t i = 0; i < k_; ++i) {
      if (ids[i] < 0) continue;
      Real logit;
      table_.prepare[raw.dtype](raw.at(ids[i]), 1, of_student(), &logit);
      e.ids[soft.n] = ids[i];
      e.logits[soft.n] = logit;
      e.log_p[soft.n] = log_probs[i];
      soft.p_sum += e.exp_p[soft.n] = std::exp(double(log_probs[i]));
      ++soft.n;
    }
  }

  template <class Team>
  void exponentiate(const Team& team, int64_t row, const Logits& student, double t, Hard kind, Scratch<Real>& w) const {
    auto reference = [&](int64_t b) { return table_.maximum[student.dtype](student.at(block_start(b)), size_at(b)); };
    auto sweep = [&](int64_t b, double ref) {
      const int64_t j = block_start(b);
      w.blocks[b] = Block<Real>{Real(ref), 0, 0, 0, 0};
      sweeps_.exponentiate[student.dtype][static_cast<int>(kind)](student.at(j), size_at(b), t, w.es + j, w.blocks + b,
                                                                  ahead_of(row, b, 0, 2));
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
  Outside leave_out(const Team& team, const Logits& student, double t, const Row& sums, Scratch<Real>& w,
                    Entries<Real>& e) const {
    auto put_at_ids = [&](Real* row, double value) {
      team.each(1, [&](int64_t) {
        for (int64_t i = 0; i < e.soft->n; ++i) row[e.ids[i]] = Real(value);
      });
    };
    put_at_ids(w.es, 0.0);
    const double z = sum_outside(team, t, sums.ref_s, w, e);
    if (!(z < faint) || e.soft->n == c_.cols) return {z, sums.ref_s};
    team.each(blocks(), [&](int64_t b) {
      const int64_t j = block_start(b);
      table_.prepare[student.dtype](student.at(j), size_at(b), Prepare{1.0, 0.0, false}, w.et + j);
    });
    put_at_ids(w.et, -infinity);
    const double ref = table_.maximum[0](w.et, c_.cols);
    team.each(blocks(), [&](int64_t b) {
      const int64_t j = block_start(b);
      w.blocks[b].ref_s = Real(ref);
      table_.exponentiate_alone[0](w.et + j, size_at(b), t, w.es + j, w.blocks + b, Ahead{});
    });
    return {sum_outside(team, t, ref, w, e), ref};
  }

  template <class Team>
  double sum_outside(const Team& team, double t, double ref, const Scratch<Real>& w, Entries<Real>& e) const {
    team.each(blocks(), [&](int64_t b) { e.outside[b] = sweeps_.total(w.es + block_start(b), size_at(b)); });
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

  // The soft gradient at an id; `weight` holds 1 / T already, here and below.
  double at_id(int64_t i, double weight, const Entries<Real>& e) const {
    return weight * (e.g[i] - e.q[i] * e.soft->of_q);
  }

  // Zeros but at the ids. In place, the slope of a prepared student is taken there before the logits are gone.
  void write_ids_alone(int64_t row, char* out, double weight, Entries<Real>& e) const {
    const Logits raw = given(c_.student, row);
    for (int64_t i = 0; i < e.soft->n; ++i) {
      const Real value = Real(at_id(i, weight, e));
      table_.chain[raw.dtype](e.exp_p + i, raw.at(e.ids[i]), &value, 1, of_student());
    }
    std::memset(out, 0, c_.cols * size_);
    for (int64_t i = 0; i < e.soft->n; ++i) std::memcpy(out + e.ids[i] * size_, e.exp_p + i, size_);
  }

  template <class Team>
  void write(const Team& team, int64_t row, char* out, const Logits& student, int64_t label, bool tailed,
             Weights weight, double t, Hard kind, const Row& sums, const Outside& outside, const HardTerm<Real>& hard,
             const Scratch<Real>& w, const Entries<Real>& e) const {
    static constexpr Real zeros[block_cols] = {};
    // Outside the ids the soft gradient is a multiple of the exponentials.
    auto factors = [&](int64_t b) {
      const double ref = w.blocks[b].ref_s;
      return Combine{1.0, tailed ? weight.soft * e.soft->of_tail * fade(ref, outside.ref, t) : 0.0,
                     weight.hard * hard.of_softmax() * fade(ref, sums.ref_s, 1.0) / sums.z_h,
                     weight.hard * hard.constant(), ref};
    };
    // The gradient of prepared logits stays in scratch until `chain` makes it that of the logits as given.
    Real* pending = prepares_student_ ? w.et : nullptr;
    const Logits raw = given(c_.student, row);
    const int to = pending ? 0 : raw.dtype;
    char* const target = pending ? reinterpret_cast<char*>(pending) : out;
    const int64_t size = pending ? int64_t(sizeof(Real)) : size_;
    auto sweep = tailed ? table_.gradient[to][static_cast<int>(kind)] : table_.gradient_alone[to];
    team.each(blocks(), [&](int64_t b) {
      const int64_t j = block_start(b);
      Ahead ahead = ahead_of(row, b, 2, 2);
      ahead.teacher = ahead.student, ahead.teacher_step = ahead.student_step;
      sweep(target + j * size, student.at(j), zeros, w.es + j, size_at(b), factors(b), ahead);
    });
    team.each(1, [&](int64_t) {
      if (label >= 0)
        put(target + label * size, to, weight.hard * hard.at_label() + factors(label / block_cols).of_q * w.es[label]);
      for (int64_t i = 0; i < e.soft->n; ++i) {
        double value = at_id(i, weight.soft, e);
        if (label >= 0) {
          const double q = std::exp(e.logits[i] - sums.ref_s) / sums.z_h;
          value += weight.hard * (e.ids[i] == label ? hard.at_label() : hard.of_softmax() * q + hard.constant());
        }
        put(target + e.ids[i] * size, to, value);
      }
    });
    if (pending)
      team.each(blocks(), [&](int64_t b) {
        const int64_t j = block_start(b);
        table_.chain[raw.dtype](out + j * size_, raw.at(j), pending + j, size_at(b), of_student());
      });
  }

  const int64_t k_;
  const TopKLoss& topk_;
  const TopKSweeps<Real>& sweeps_;
};

template <class Real>
Fault run(const TopKLoss& call, DType real) {
  RowLoss rows = call.row;
  rows.teacher = {const_cast<void*>(call.log_probs), real, rows.inner * call.k, call.k};
  rows.teacher_form = TeacherForm::logits;
  return TopKCall<Real>(call, rows).run();
}

}  // namespace

Fault topk_loss_cpu(const TopKLoss& call) {
  if (call.row.student.dtype == DType::f64) return run<double>(call, DType::f64);
  return run<float>(call, DType::f32);
}

}  // namespace distil_fast
