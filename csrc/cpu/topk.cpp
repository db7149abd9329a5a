// topk.cpp: the row algorithm with a teacher of k columns a row: the student's exponentials in one sweep, the k outcomes
// and their bucket in a small vector of their own, the gradient in a second sweep, and at the ids once more. What does
// not ask for the teacher (weights, labels, the hard term, sums over rows) is row_call.h's. Next: topk_outcomes.h, topk.h;
// docs/math.md, "A top-k teacher".
#include <atomic>
#include <cstring>
#include <memory>

#include "row_call.h"
#include "topk_outcomes.h"

namespace distil_fast {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double faint = 1e-25;  // a tail of so little mass takes a reference of its own: floats end at 1e-38

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
    for_rows(rows_, c_.cols, scratch_of_rows() + Outcomes<Real>::bytes(c_.cols, k_),
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
    Outcomes<Real> e(memory + scratch_of_rows(), topk_, table_);
    team.each(1, [&](int64_t) {
      soft_[row] = hard_[row] = 0.0;
      *e.found = {};
      if (soft_w != 0.0) gather(row, e);
    });
    const bool tailed = soft_w != 0.0 && topk_.tail != Tail::renormalise;
    const int64_t label = hard_w != 0.0 ? c_.labels[row] : -1;
    const double own_t = soft_w != 0.0 ? temperature_[row] : 1.0;
    if (!tailed && label < 0) {
      team.each(1, [&](int64_t) {
        soft_[row] = e.renormalised(own_t);
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
      soft_[row] = tailed ? e.against_all(t, sums.ref_s, outside) : e.renormalised(own_t);
    });
    const Weights weight{soft_w / own_t / unit_, hard_w / unit_};
    if (out) write(team, row, out, student, label, tailed, weight, t, kind, sums, outside, hard, w, e);
  }

  void gather(int64_t row, Outcomes<Real>& e) const {
    const int64_t* ids = ids_of(row);
    const Real* log_probs = log_probs_of(row);
    const Logits raw = given(c_.student, row);
    for (int64_t i = 0; i < k_; ++i) {
      if (ids[i] < 0) continue;
      Real logit;
      table_.prepare[raw.dtype](raw.at(ids[i]), 1, of_student(), &logit);
      e.add(ids[i], logit, log_probs[i]);
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
                    Outcomes<Real>& e) const {
    auto put_at_ids = [&](Real* row, double value) {
      team.each(1, [&](int64_t) {
        for (int64_t i = 0; i < e.found->n; ++i) row[e.ids[i]] = Real(value);
      });
    };
    put_at_ids(w.es, 0.0);
    const double z = sum_outside(team, t, sums.ref_s, w, e);
    if (!(z < faint) || e.found->n == c_.cols) return {z, sums.ref_s};
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
  double sum_outside(const Team& team, double t, double ref, const Scratch<Real>& w, Outcomes<Real>& e) const {
    team.each(blocks(), [&](int64_t b) { e.block_sums[b] = sweeps_.total(w.es + block_start(b), size_at(b)); });
    double z = 0.0;
    for (int64_t b = 0; b < blocks(); ++b) z += e.block_sums[b] * fade(w.blocks[b].ref_s, ref, t);
    team.meet();  // the block sums may be used again
    return z;
  }

  // Zeros but at the ids; `weight` holds 1 / T already, here and below. The slope of a prepared student is taken before
  // the logits are gone, which in place is here.
  void write_ids_alone(int64_t row, char* out, double weight, Outcomes<Real>& e) const {
    const Logits raw = given(c_.student, row);
    for (int64_t i = 0; i < e.found->n; ++i) {
      const Real value[16] = {Real(weight * e.slope(i))};  // a whole vector of gradients may be read
      table_.chain[raw.dtype](e.room(i), raw.at(e.ids[i]), value, 1, of_student());
    }
    std::memset(out, 0, c_.cols * size_);
    for (int64_t i = 0; i < e.found->n; ++i) std::memcpy(out + e.ids[i] * size_, e.room(i), size_);
  }

  template <class Team>
  void write(const Team& team, int64_t row, char* out, const Logits& student, int64_t label, bool tailed,
             Weights weight, double t, Hard kind, const Row& sums, const Outside& outside, const HardTerm<Real>& hard,
             const Scratch<Real>& w, const Outcomes<Real>& e) const {
    static constexpr Real zeros[block_cols] = {};
    // Outside the ids the soft gradient is a multiple of the exponentials.
    auto factors = [&](int64_t b) {
      const double ref = w.blocks[b].ref_s;
      return Combine{1.0, tailed ? weight.soft * e.found->of_tail * fade(ref, outside.ref, t) : 0.0,
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
      for (int64_t i = 0; i < e.found->n; ++i) {
        double value = weight.soft * e.slope(i);
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
