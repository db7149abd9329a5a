// row_call.h: what every row loss does with its rows, whatever its teacher: weights, checks and denominators, the student's
// logits, sums of blocks, what is fetched ahead, sums over rows. Knows no divergence and no form of teacher but by the
// call. Next: row_loss.cpp and topk.cpp, which derive from it; row_scratch.h, hard_term.h.
#pragma once

#include <limits>

#include "hard_term.h"
#include "shares.h"
#include "threads.h"

namespace distil_fast {

// Whether a transform leaves logits as they are.
inline bool is_plain(const Transform& x) { return x.scale == 1.0 && x.cap == 0.0; }

template <class Real>
class RowCall {
 protected:
  explicit RowCall(const RowLoss& call)
      : c_(call), table_(table<Real>().rows), rows_(call.outer * call.inner), size_(size_of(call.student.dtype)) {}

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

  struct Weights {
    double soft, hard;
  };

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

  bool checks_mass() const { return c_.teacher.data && c_.teacher_form != TeacherForm::logits; }

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
    if (checks_mass()) r.mass = r.z_t * std::exp(r.ref_t / t);
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
  double soft_scale_ = 0.0, hard_scale_ = 0.0, unit_ = 1.0;
  double *soft_ = nullptr, *hard_ = nullptr;  // [rows] values of the terms, unweighted
};

}  // namespace distil_fast
