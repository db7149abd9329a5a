// row_loss.cpp: the row algorithm: soft term by any divergence, hard term, and the gradient of both, in three
// sweeps over a row that stays in cache, between two more where it is not plain logits. Conducts the sweeps of
// one block each; knows weights, labels and reductions. It knows no instruction set, no formula of a divergence,
// and no dtype but by its index. Next: row_call.h, sweeps.h; docs/math.md for the derivation.
#include <cstring>
#include <limits>
#include <memory>

#include "row_call.h"

namespace distil_fast {
namespace {

template <class Real>
class RowLossCall : RowCall<Real> {
  using Base = RowCall<Real>;
  using Base::ahead_of, Base::blocks, Base::checks_mass, Base::given, Base::of_student, Base::prepared, Base::put,
      Base::size_at;
  using Base::c_, Base::hard_, Base::prepares_student_, Base::rows_, Base::size_, Base::soft_, Base::table_,
      Base::temperature_, Base::unit_;
  using typename Base::Weights;

 public:
  explicit RowLossCall(const RowLoss& call) : Base(call) {}

  Fault run() {
    if (Fault fault = Base::weigh(); fault.kind != FaultKind::nothing) return fault;
    std::unique_ptr<double[]> values(new double[2 * rows_ + (checks_mass() ? rows_ : 0)]);
    soft_ = values.get();
    hard_ = soft_ + rows_;
    excess_ = checks_mass() ? hard_ + rows_ : nullptr;
    for_rows(rows_, c_.cols, Scratch<Real>::bytes(c_.cols, prepares_student_ + prepares_teacher_),
             [this](int64_t row, auto team, std::byte* memory) { run_row(row, team, memory); });
    Base::reduce();
    for (int64_t row = 0; excess_ && row < rows_; ++row)
      if (excess_[row] != 0.0) return {FaultKind::teacher_mass, row, excess_[row]};
    return {};
  }

 private:
  template <class Team>
  void run_row(int64_t row, const Team& team, std::byte* memory) {
    const double soft_w = Base::soft_weight(row), hard_w = Base::hard_weight(row);
    if (team.leads()) {
      soft_[row] = hard_[row] = 0.0;
      if (excess_) excess_[row] = 0.0;
    }
    char* out = c_.grad.data ? row_at(c_.grad, row, c_.inner) : nullptr;
    if (soft_w == 0.0 && hard_w == 0.0) {
      if (out) clear(team, out);
      return;
    }
    const double t = soft_w != 0.0 ? temperature_[row] : 1.0;
    const int64_t label = hard_w != 0.0 ? c_.labels[row] : -1;
    Scratch<Real> w(memory, c_.cols, prepares_student_ + prepares_teacher_);
    const Logits student = Base::student_logits(team, row, w);
    const Logits teacher = soft_w != 0.0 ? teacher_logits(team, row, t, w) : Logits{};
    const Hard kind = !teacher.data || label < 0 || t == 1.0 ? Hard::linear : t == 2.0 ? Hard::square : Hard::own;

    exponentiate(team, row, student, teacher, t, kind, w);
    const Row sums = Base::combine(w, teacher, t, kind);
    if (teacher.data && excess_ && too_much(team, row, sums.mass)) {
      if (out) clear(team, out);
      return;
    }
    double g_sum = 0.0;
    if (teacher.data) g_sum = diverge(team, row, t, sums, w);
    const HardTerm<Real> hard(table_, c_, student, label, sums, w, t, kind);
    if (label >= 0 && team.leads()) hard_[row] = hard.value();
    team.meet();  // in place, `write` destroys the logits that the lines above read
    if (out)
      write(team, row, out, student, teacher, label, {soft_w / unit_, hard_w / unit_}, t, kind, sums, g_sum, hard, w);
  }

  template <class Team>
  void clear(const Team& team, char* out) const {
    team.each(1, [&](int64_t) { std::memset(out, 0, c_.cols * size_); });
  }

  // Log-probabilities times T act as logits at T.
  template <class Team>
  Logits teacher_logits(const Team& team, int64_t row, double t, const Scratch<Real>& w) const {
    const Logits teacher = given(c_.teacher, row);
    if (!prepares_teacher_) return teacher;
    const bool logits = c_.teacher_form == TeacherForm::logits;
    const Prepare by = logits ? Prepare{c_.teacher_transform.scale, c_.teacher_transform.cap, false}
                              : Prepare{t, 0.0, c_.teacher_form == TeacherForm::probs};
    return prepared(team, teacher, by, w.prepared + (prepares_student_ ? Scratch<Real>::padded(c_.cols) : 0));
  }

  // Whether the teacher's row sums to more than 1, or to nothing that is a number: then it has a loss of nan.
  template <class Team>
  bool too_much(const Team& team, int64_t row, double mass) {
    if (mass <= mass_limit(c_.teacher.dtype)) return false;
    if (team.leads()) {
      excess_[row] = mass;
      soft_[row] = hard_[row] = std::numeric_limits<double>::quiet_NaN();
    }
    return true;
  }

  // ---- the sweeps

  template <class Team>
  void exponentiate(const Team& team, int64_t row, const Logits& student, const Logits& teacher, double t, Hard kind,
                    Scratch<Real>& w) {
    const int s = student.dtype, d = teacher.dtype;
    auto references = [&](int64_t b) {
      const int64_t j = block_start(b), n = size_at(b);
      const double ref_t = teacher.data ? table_.maximum[d](teacher.at(j), n) : 0.0;
      return Block<Real>{Real(table_.maximum[s](student.at(j), n)), Real(ref_t), 0, 0, 0};
    };
    const Block<Real> first = references(0);
    auto sweep = [&](int64_t b, const Block<Real>& start) {
      const int64_t j = block_start(b), n = size_at(b);
      w.blocks[b] = start;
      if (!teacher.data)
        table_.exponentiate_alone[s](student.at(j), n, 1.0, w.es + j, w.blocks + b, ahead_of(row, b, 0, 2));
      else
        table_.exponentiate[s][d][static_cast<int>(kind)](student.at(j), teacher.at(j), n, t, w.es + j, w.et + j,
                                                          w.g + j, w.blocks + b, ahead_of(row, b, 0, 2));
    };
    team.each(blocks(), [&](int64_t b) {
      sweep(b, first);
      if (!w.blocks[b].in_range()) sweep(b, references(b));
    });
  }

  // Sum of q r, 0 where that is not finite.
  template <class Team>
  double mean_difference(const Team& team, double t, const Row& sums, Scratch<Real>& w) const {
    team.each(blocks(), [&](int64_t b) {
      const int64_t j = block_start(b);
      w.f_sum[b] = table_.weighted_difference(w.es + j, w.g + j, size_at(b));
    });
    double total = -sums.rho;
    for (int64_t b = 0; b < blocks(); ++b) {
      const Block<Real>& block = w.blocks[b];
      total += (w.f_sum[b] + block.apart() * double(block.z_s)) / t * fade(block.ref_s, sums.ref_s, t) / sums.z_s;
    }
    team.meet();  // f_sum is about to be used again
    return std::isfinite(total) ? total : 0.0;
  }

  // The soft value of the row goes to soft_; returns the sum of g.
  template <class Team>
  double diverge(const Team& team, int64_t row, double t, const Row& sums, Scratch<Real>& w) {
    auto sweep = table_.diverge[c_.divergence];
    const double centre = table_.centred[c_.divergence] ? mean_difference(team, t, sums, w) : 0.0;
    team.each(blocks(), [&](int64_t b) {
      const Block<Real>& block = w.blocks[b];
      const int64_t j = block_start(b);
      const Divide by{fade(block.ref_t, sums.ref_t, t) / sums.z_t,
                      fade(block.ref_s, sums.ref_s, t) / sums.z_s,
                      1.0 / t,
                      sums.rho - block.apart() / t,
                      c_.parameters[0],
                      c_.parameters[1],
                      centre};
      sweep(w.es + j, w.et + j, w.g + j, size_at(b), by, w.f_sum + b, w.g_sum + b, ahead_of(row, b, 2, 1));
    });
    double f = 0.0, g = 0.0;
    for (int64_t b = 0; b < blocks(); ++b) f += w.f_sum[b], g += w.g_sum[b];
    if (team.leads()) soft_[row] = f;
    return g;
  }

  template <class Team>
  void write(const Team& team, int64_t row, char* out, const Logits& student, const Logits& teacher, int64_t label,
             Weights weight, double t, Hard kind, const Row& sums, double g_sum, const HardTerm<Real>& hard,
             const Scratch<Real>& w) {
    auto factors = [&](int64_t b) {
      const double ref_s = w.blocks[b].ref_s, at_t = fade(ref_s, sums.ref_s, t) / sums.z_s;
      const double at_one = kind == Hard::linear ? at_t : fade(ref_s, sums.ref_s, 1.0) / sums.z_h;
      return Combine{weight.soft / t, -g_sum * at_t, weight.hard * hard.of_softmax() * at_one,
                     weight.hard * hard.constant(), ref_s};
    };
    // At the label the hard gradient is p - 1 = -rest / z, taken before anything is rounded or, in place,
    // overwritten.
    double at_label = 0.0;
    if (label >= 0) {
      at_label = weight.hard * hard.at_label();
      if (teacher.data) {
        const double q = w.es[label] * fade(w.blocks[label / block_cols].ref_s, sums.ref_s, t) / sums.z_s;
        at_label += factors(label / block_cols).of_g * (w.g[label] - q * g_sum);
      }
    }
    // The gradient of prepared logits stays in scratch until `chain` makes it that of the logits as given.
    Real* pending = prepares_student_ ? w.et : nullptr;
    const int to = pending ? 0 : index(c_.student.dtype);
    auto sweep = teacher.data ? table_.gradient[to][static_cast<int>(kind)] : table_.gradient_alone[to];
    const Logits raw = given(c_.student, row);
    team.each(blocks(), [&](int64_t b) {
      const int64_t j = block_start(b), n = size_at(b);
      char* target = pending ? reinterpret_cast<char*>(pending + j) : out + j * size_;
      sweep(target, student.at(j), w.g + j, w.es + j, n, factors(b),
            teacher.data ? ahead_of(row, b, 3, 1) : ahead_of(row, b, 2, 2));
      if (label >= j && label < j + n)
        put(target + (label - j) * (pending ? int64_t(sizeof(Real)) : size_), to, at_label);
      if (pending) table_.chain[raw.dtype](out + j * size_, raw.at(j), pending + j, n, of_student());
    });
  }

  const bool prepares_teacher_ = c_.teacher.data && (checks_mass() || !is_plain(c_.teacher_transform));
  double* excess_ = nullptr;  // [rows] a teacher's mass where it is at fault, else 0; null: it gives logits
};

}  // namespace

Fault row_loss_cpu(const RowLoss& call) {
  if (call.student.dtype == DType::f64) return RowLossCall<double>(call).run();
  return RowLossCall<float>(call).run();
}

}  // namespace distil_fast
