// row_loss.cpp: the row algorithm: soft term by any divergence, hard term, and the gradient of both, in three
// sweeps over a row that stays in cache, between two more where it is not plain logits. Conducts the sweeps of
// one block each; knows weights, labels and reductions. It knows no instruction set, no formula of a divergence,
// and no dtype but by its index. Next: row_scratch.h, hard_term.h, sweeps.h; docs/math.md for the derivation.
#include <cstring>
#include <limits>
#include <memory>

#include "hard_term.h"
#include "row_scratch.h"
#include "shares.h"
#include "threads.h"

namespace distil_fast {
namespace {

// Whether a transform leaves logits as they are.
bool is_plain(const Transform& x) { return x.scale == 1.0 && x.cap == 0.0; }

template <class Real>
class RowLossCall {
 public:
  explicit RowLossCall(const RowLoss& call)
      : c_(call), table_(table<Real>().rows), rows_(call.outer * call.inner), size_(size_of(call.student.dtype)) {}

  Fault run() {
    if (Fault fault = weigh(); fault.kind != FaultKind::nothing) return fault;
    std::unique_ptr<double[]> values(new double[2 * rows_ + (checks_mass() ? rows_ : 0)]);
    soft_ = values.get();
    hard_ = soft_ + rows_;
    excess_ = checks_mass() ? hard_ + rows_ : nullptr;
    for_rows(rows_, c_.cols, Scratch<Real>::bytes(c_.cols, prepares_student_ + prepares_teacher_),
             [this](int64_t row, auto team, std::byte* memory) { run_row(row, team, memory); });
    reduce();
    for (int64_t row = 0; excess_ && row < rows_; ++row)
      if (excess_[row] != 0.0) return {FaultKind::teacher_mass, row, excess_[row]};
    return {};
  }

 private:
  // Checks the values that no logit depends on, counts, and finds the unit of an fp16 gradient.
  Fault weigh() {
    const bool soft = c_.teacher.data && c_.soft_weight != 0.0, hard = c_.labels && c_.hard_weight != 0.0;
    double tokens = 0.0, labelled = 0.0;
    if (soft)
      if (Fault fault = count_mask(mask_, rows_, &tokens); fault.kind != FaultKind::nothing) return fault;
    if (hard)
      if (Fault fault = count_labels(labels_, rows_, c_.cols, &labelled); fault.kind != FaultKind::nothing)
        return fault;
    soft_scale_ = soft ? scale_of(c_.reduction, c_.soft_count, tokens) : 0.0;
    hard_scale_ = hard ? scale_of(c_.reduction, c_.hard_count, labelled) : 0.0;

    double largest = 0.0;
    for (int64_t row = 0; soft_scale_ != 0.0 && row < rows_; ++row) {
      if (mask_[row] == 0.0) continue;
      if (!valid_temperature(temperature_[row])) return {FaultKind::temperature, row, temperature_[row]};
    }
    if (c_.grad.data && c_.grad.dtype == DType::f16 && !c_.upstream)
      for (int64_t row = 0; row < rows_; ++row) {
        const double size = std::fabs(soft_weight(row) / temperature_[row]) + std::fabs(hard_weight(row));
        if (size > largest) largest = size;
      }
    unit_ = unit_of(largest * c_.student_transform.scale);
    if (c_.unit) *c_.unit = unit_;
    return {};
  }

  // A row's share in each term, T^2 included, and its weight in the gradient.
  double soft_share(int64_t row) const {
    if (soft_scale_ == 0.0) return 0.0;
    const double share = mask_[row] * soft_scale_, t = temperature_[row];
    return share != 0.0 && c_.t_squared ? share * t * t : share;
  }
  double hard_share(int64_t row) const { return hard_scale_ == 0.0 ? 0.0 : labels_[row] * hard_scale_; }
  double upstream(int64_t row) const { return c_.upstream ? static_cast<const Real*>(c_.upstream)[row] : 1.0; }
  double soft_weight(int64_t row) const {
    const double share = soft_share(row);
    return share == 0.0 ? 0.0 : share * c_.soft_weight * upstream(row);
  }
  double hard_weight(int64_t row) const {
    const double share = hard_share(row);
    return share == 0.0 ? 0.0 : share * c_.hard_weight * upstream(row);
  }

  template <class Team>
  void run_row(int64_t row, const Team& team, std::byte* memory) {
    const double soft_w = soft_weight(row), hard_w = hard_weight(row);
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
    const Logits student = student_logits(team, row, w);
    const Logits teacher = soft_w != 0.0 ? teacher_logits(team, row, t, w) : Logits{};
    const Hard kind = !teacher.data || label < 0 || t == 1.0 ? Hard::linear : t == 2.0 ? Hard::square : Hard::own;

    exponentiate(team, row, student, teacher, t, kind, w);
    const Row sums = combine(w, teacher, t, kind);
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

  int64_t blocks() const { return blocks_of(c_.cols); }
  int64_t size_at(int64_t b) const { return block_size(c_.cols, b); }

  // ---- rows that are not plain logits

  Logits given(const Matrix& m, int64_t row) const {
    return {row_at(m, row, c_.inner), index(m.dtype), size_of(m.dtype)};
  }

  template <class Team>
  Logits prepared(const Team& team, Logits from, const Prepare& by, Real* to) const {
    team.each(blocks(), [&](int64_t b) {
      const int64_t j = block_start(b);
      table_.prepare[from.dtype](from.at(j), size_at(b), by, to + j);
    });
    return {reinterpret_cast<const char*>(to), 0, sizeof(Real)};
  }

  template <class Team>
  Logits student_logits(const Team& team, int64_t row, const Scratch<Real>& w) const {
    const Logits student = given(c_.student, row);
    return prepares_student_ ? prepared(team, student, of_student(), w.prepared) : student;
  }
  Prepare of_student() const { return {c_.student_transform.scale, c_.student_transform.cap, false}; }

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

  bool checks_mass() const { return c_.teacher.data && c_.teacher_form != TeacherForm::logits; }

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

  Row combine(const Scratch<Real>& w, const Logits& teacher, double t, Hard kind) const {
    Row r{};
    r.ref_s = w.blocks[0].ref_s;
    r.ref_t = teacher.data ? w.blocks[0].ref_t : 0.0;
    for (int64_t b = 1; b < blocks(); ++b) {
      r.ref_s = std::max<double>(r.ref_s, w.blocks[b].ref_s);
      if (teacher.data) r.ref_t = std::max<double>(r.ref_t, w.blocks[b].ref_t);
    }
    for (int64_t b = 0; b < blocks(); ++b) {
      const Block<Real>& block = w.blocks[b];
      const double at_t = fade(block.ref_s, r.ref_s, t);
      r.z_s += block.z_s * at_t;
      r.z_h += block.z_h * (kind == Hard::linear ? at_t : fade(block.ref_s, r.ref_s, 1.0));
      if (teacher.data) r.z_t += block.z_t * fade(block.ref_t, r.ref_t, t);
    }
    if (excess_) r.mass = r.z_t * std::exp(r.ref_t / t);
    // a row without a single finite logit has no distribution
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    if (r.z_s == 0.0) r.z_s = r.z_h = nan;
    if (teacher.data && r.z_t == 0.0) r.z_t = nan;
    if (teacher.data) r.rho = std::log(r.z_s) - std::log(r.z_t) + (r.ref_s - r.ref_t) / t;
    return r;
  }

  // While block b of this row is swept, the part of the next one to fetch: `quarters` of its memory belong to
  // the sweep, beginning at `first`. Without a next row that needs it, this one is fetched again, which costs
  // nothing.
  Ahead ahead_of(int64_t row, int64_t b, int first, int quarters) const {
    const int64_t next = row + 1 < rows_ ? row + 1 : row, at = (first * c_.cols + quarters * block_start(b)) / 4;
    const bool soft = soft_weight(next) != 0.0, used = soft || hard_weight(next) != 0.0;
    const Matrix& teacher = c_.teacher.data ? c_.teacher : c_.student;
    const int64_t teacher_size = size_of(teacher.dtype);
    return {row_at(c_.student, used ? next : row, c_.inner) + at * size_,
            row_at(teacher, soft ? next : row, c_.inner) + at * teacher_size, quarters * size_,
            quarters * teacher_size};
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

  struct Weights {
    double soft, hard;
  };

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

  void put(char* target, int dtype, double value) const {
    alignas(64) Real zero[16] = {};
    table_.gradient_alone[dtype](target, nullptr, zero, zero, 1, Combine{0.0, 0.0, 0.0, value, 0.0}, Ahead{});
  }

  // Rows are summed in their order, so that the result does not depend on the threads.
  void reduce() const {
    if (!c_.loss) return;
    Real *loss = static_cast<Real*>(c_.loss), *soft = static_cast<Real*>(c_.soft), *hard = static_cast<Real*>(c_.hard);
    double soft_sum = 0.0, hard_sum = 0.0;
    for (int64_t row = 0; row < rows_; ++row) {
      const double soft_share_ = soft_share(row), hard_share_ = hard_share(row);
      const double s = soft_share_ == 0.0 ? 0.0 : soft_share_ * soft_[row];
      const double h = hard_share_ == 0.0 ? 0.0 : hard_share_ * hard_[row];
      if (c_.reduction == Reduction::none) {
        loss[row] = static_cast<Real>(weighted(s, h));
        soft[row] = static_cast<Real>(s);
        hard[row] = static_cast<Real>(h);
      }
      soft_sum += s;
      hard_sum += h;
    }
    if (c_.reduction == Reduction::none) return;
    *loss = static_cast<Real>(weighted(soft_sum, hard_sum));
    *soft = static_cast<Real>(soft_sum);
    *hard = static_cast<Real>(hard_sum);
  }
  double weighted(double soft, double hard) const {
    return (c_.soft_weight == 0.0 ? 0.0 : c_.soft_weight * soft) +
           (c_.hard_weight == 0.0 ? 0.0 : c_.hard_weight * hard);
  }

  const RowLoss& c_;
  const Sweeps<Real>& table_;
  const int64_t rows_, size_;
  const Mask<Real> mask_{c_.soft_mask, c_.mask_is_bool};
  const Temperatures<Real> temperature_{c_.temperatures, c_.temperature};
  const Labels<Real> labels_{c_.labels, c_.ignore_index, static_cast<const Real*>(c_.class_weights)};
  const bool prepares_student_ = !is_plain(c_.student_transform);
  const bool prepares_teacher_ = c_.teacher.data && (checks_mass() || !is_plain(c_.teacher_transform));
  double soft_scale_ = 0.0, hard_scale_ = 0.0, unit_ = 1.0;
  double *soft_ = nullptr, *hard_ = nullptr;  // [rows] values of the terms, unweighted
  double* excess_ = nullptr;  // [rows] a teacher's mass where it is at fault, else 0; null: it gives logits
};

}  // namespace

Fault row_loss_cpu(const RowLoss& call) {
  if (call.student.dtype == DType::f64) return RowLossCall<double>(call).run();
  return RowLossCall<float>(call).run();
}

}  // namespace distil_fast
