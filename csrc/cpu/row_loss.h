// row_loss.h: the row algorithm: soft term by any divergence, hard term, and the gradient of both, in three
// sweeps over a row that stays in cache. Conducts the sweeps of one block each; knows weights, labels and
// reductions. It knows no instruction set, no formula of a divergence, and no dtype but by its index. Next:
// sweeps.h; topk.cpp, which takes over all but the soft term; docs/math.md for the derivation.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

#include "dispatch.h"
#include "shares.h"
#include "threads.h"

namespace distil_fast {

constexpr int64_t block_cols = 2048;

// What a row's blocks come to.
struct Row {
  double ref_s, ref_t;   // the largest of the blocks' references
  double z_s, z_t, z_h;  // sums of exponentials relative to them
  double rho;            // lse_s - lse_t at temperature T
};

// A row's scratch: exponentials of student and teacher, differences that become g, and the blocks' scalars.
template <class Real>
struct Scratch {
  Real *es, *et, *g;
  Block<Real>* blocks;
  double *f_sum, *g_sum;

  static size_t bytes(int64_t cols) {
    return 3 * padded(cols) * sizeof(Real) + blocks_of(cols) * (sizeof(Block<Real>) + 2 * sizeof(double)) + 64;
  }
  Scratch(std::byte* memory, int64_t cols) {
    es = reinterpret_cast<Real*>(memory);
    et = es + padded(cols);
    g = et + padded(cols);
    f_sum = reinterpret_cast<double*>(g + padded(cols));
    g_sum = f_sum + blocks_of(cols);
    blocks = reinterpret_cast<Block<Real>*>(g_sum + blocks_of(cols));
  }
  static int64_t padded(int64_t cols) { return (cols + 15) / 16 * 16; }
  static int64_t blocks_of(int64_t cols) { return (cols + block_cols - 1) / block_cols; }
};

template <class Real>
class RowLossCall {
 public:
  explicit RowLossCall(const RowLoss& call)
      : c_(call), table_(table<Real>().rows), rows_(call.outer * call.inner), size_(size_of(call.student.dtype)) {}

  Fault run() {
    if (Fault fault = weigh(); fault.kind != FaultKind::nothing) return fault;
    std::unique_ptr<double[]> values(new double[2 * rows_]);
    soft_ = values.get();
    hard_ = soft_ + rows_;
    for_rows(rows_, c_.cols, Scratch<Real>::bytes(c_.cols),
             [this](int64_t row, auto team, std::byte* memory) { run_row(row, team, memory); });
    reduce();
    return {};
  }

 protected:
  // Checks the values that no logit depends on, counts, and finds the unit of an fp16 gradient.
  Fault weigh() {
    const bool soft = c_.teacher.data && c_.soft_weight != 0.0, hard = c_.labels && c_.hard_weight != 0.0;
    double tokens = 0.0, labelled = 0.0;
    if (soft)
      if (Fault fault = count_mask(mask_, rows_, &tokens); fault.kind != FaultKind::nothing) return fault;
    if (hard) {
      for (int64_t row = 0; row < rows_; ++row) {
        const int64_t label = c_.labels[row];
        if (label == c_.ignore_index) continue;
        if (label < 0 || label >= c_.cols) return {FaultKind::label, row, static_cast<double>(label)};
        labelled += 1.0;
      }
    }
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
    unit_ = unit_of(largest);
    if (c_.unit) *c_.unit = unit_;
    return {};
  }

  // A row's share in each term, T^2 included, and its weight in the gradient.
  double soft_share(int64_t row) const {
    if (soft_scale_ == 0.0) return 0.0;
    const double share = mask_[row] * soft_scale_, t = temperature_[row];
    return share != 0.0 && c_.t_squared ? share * t * t : share;
  }
  double hard_share(int64_t row) const {
    return hard_scale_ != 0.0 && c_.labels[row] != c_.ignore_index ? hard_scale_ : 0.0;
  }
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
    if (team.leads()) soft_[row] = hard_[row] = 0.0;
    char* out = c_.grad.data ? row_at(c_.grad, row, c_.inner) : nullptr;
    if (soft_w == 0.0 && hard_w == 0.0) {
      if (out) team.each(1, [&](int64_t) { std::memset(out, 0, c_.cols * size_); });
      return;
    }
    const char* student = row_at(c_.student, row, c_.inner);
    const char* teacher = soft_w != 0.0 ? row_at(c_.teacher, row, c_.inner) : nullptr;
    const double t = teacher ? temperature_[row] : 1.0;
    const int64_t label = hard_w != 0.0 ? c_.labels[row] : -1;
    const Hard kind = !teacher || label < 0 || t == 1.0 ? Hard::linear : t == 2.0 ? Hard::square : Hard::own;
    Scratch<Real> w(memory, c_.cols);

    exponentiate(team, row, student, teacher, t, kind, w);
    const Row sums = combine(w, teacher, t, kind);
    double g_sum = 0.0;
    if (teacher) g_sum = diverge(team, row, t, sums, w);
    const double rest = label >= 0 ? all_but(label, student, sums, w, t, kind) : 0.0;
    if (label >= 0 && team.leads()) hard_[row] = cross_entropy(label, student, sums, rest);
    team.meet();  // in place, `write` destroys the logits that the lines above read
    if (out)
      write(team, row, out, student, teacher, label, {soft_w / unit_, hard_w / unit_}, t, kind, sums, g_sum, rest, w);
  }

  int64_t blocks() const { return Scratch<Real>::blocks_of(c_.cols); }
  int64_t block_start(int64_t b) const { return b * block_cols; }
  int64_t block_size(int64_t b) const { return std::min(block_cols, c_.cols - block_start(b)); }

  template <class Team>
  void exponentiate(const Team& team, int64_t row, const char* student, const char* teacher, double t, Hard kind,
                    Scratch<Real>& w) {
    const int s = index(c_.student.dtype), d = teacher ? index(c_.teacher.dtype) : 0;
    const int64_t teacher_size = size_of(c_.teacher.dtype);
    auto references = [&](int64_t b) {
      const int64_t j = block_start(b), n = block_size(b);
      const double ref_t = teacher ? table_.maximum[d](teacher + j * teacher_size, n) : 0.0;
      return Block<Real>{Real(table_.maximum[s](student + j * size_, n)), Real(ref_t), 0, 0, 0};
    };
    const Block<Real> first = references(0);
    auto sweep = [&](int64_t b, const Block<Real>& start) {
      const int64_t j = block_start(b), n = block_size(b);
      w.blocks[b] = start;
      if (!teacher)
        table_.exponentiate_alone[s](student + j * size_, n, 1.0, w.es + j, w.blocks + b, ahead_of(row, b, 0, 2));
      else
        table_.exponentiate[s][d][static_cast<int>(kind)](student + j * size_, teacher + j * teacher_size, n, t,
                                                          w.es + j, w.et + j, w.g + j, w.blocks + b,
                                                          ahead_of(row, b, 0, 2));
    };
    team.each(blocks(), [&](int64_t b) {
      sweep(b, first);
      if (!w.blocks[b].in_range()) sweep(b, references(b));
    });
  }

  // exp((block's reference - row's) / T); nearly all blocks share the row's
  static double fade(double block_ref, double row_ref, double t) {
    return block_ref == row_ref ? 1.0 : std::exp((block_ref - row_ref) / t);
  }

  Row combine(const Scratch<Real>& w, const char* teacher, double t, Hard kind) const {
    Row r{};
    r.ref_s = w.blocks[0].ref_s;
    r.ref_t = teacher ? w.blocks[0].ref_t : 0.0;
    for (int64_t b = 1; b < blocks(); ++b) {
      r.ref_s = std::max<double>(r.ref_s, w.blocks[b].ref_s);
      if (teacher) r.ref_t = std::max<double>(r.ref_t, w.blocks[b].ref_t);
    }
    for (int64_t b = 0; b < blocks(); ++b) {
      const Block<Real>& block = w.blocks[b];
      const double at_t = fade(block.ref_s, r.ref_s, t);
      r.z_s += block.z_s * at_t;
      r.z_h += block.z_h * (kind == Hard::linear ? at_t : fade(block.ref_s, r.ref_s, 1.0));
      if (teacher) r.z_t += block.z_t * fade(block.ref_t, r.ref_t, t);
    }
    // a row without a single finite logit has no distribution
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    if (r.z_s == 0.0) r.z_s = r.z_h = nan;
    if (teacher && r.z_t == 0.0) r.z_t = nan;
    if (teacher) r.rho = std::log(r.z_s) - std::log(r.z_t) + (r.ref_s - r.ref_t) / t;
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
      w.f_sum[b] = table_.weighted_difference(w.es + j, w.g + j, block_size(b));
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
      sweep(w.es + j, w.et + j, w.g + j, block_size(b), by, w.f_sum + b, w.g_sum + b, ahead_of(row, b, 2, 1));
    });
    double f = 0.0, g = 0.0;
    for (int64_t b = 0; b < blocks(); ++b) f += w.f_sum[b], g += w.g_sum[b];
    if (team.leads()) soft_[row] = f;
    return g;
  }

  double logit(const char* student, int64_t j) const {
    return table_.shifted_sum[index(c_.student.dtype)](student + j * size_, 1, 0.0);
  }

  // Sum of the exponentials (temperature 1) of all columns but one, relative to the row's reference. By
  // subtraction, unless the label has most of the mass: then its block is summed anew, because 1 - p would
  // have lost its digits.
  double all_but(int64_t label, const char* student, const Row& sums, const Scratch<Real>& w, double t,
                 Hard kind) const {
    const double own = std::exp(logit(student, label) - sums.ref_s);
    if (!(own > 0.5 * sums.z_h)) return sums.z_h - own;
    double rest = 0.0;
    for (int64_t b = 0; b < blocks(); ++b) {
      const int64_t from = block_start(b), to = from + block_size(b);
      if (label < from || label >= to) {
        rest += w.blocks[b].z_h * fade(w.blocks[b].ref_s, sums.ref_s, kind == Hard::linear ? t : 1.0);
      } else {
        auto sum = table_.exponential_sum[index(c_.student.dtype)];
        rest += sum(student + from * size_, label - from, sums.ref_s);
        rest += sum(student + (label + 1) * size_, to - label - 1, sums.ref_s);
      }
    }
    return rest;
  }

  double cross_entropy(int64_t label, const char* student, const Row& sums, double rest) const {
    const double shifted = logit(student, label) - sums.ref_s, own = std::exp(shifted);
    const double nll = own > rest ? std::log1p(rest / own) : std::log(sums.z_h) - shifted;
    if (c_.label_smoothing == 0.0) return nll;
    double total = 0.0;
    for (int64_t b = 0; b < blocks(); ++b)
      total += table_.shifted_sum[index(c_.student.dtype)](student + block_start(b) * size_, block_size(b), sums.ref_s);
    const double uniform = std::log(sums.z_h) - total / static_cast<double>(c_.cols);
    return (1.0 - c_.label_smoothing) * nll + c_.label_smoothing * uniform;
  }

  struct Weights {
    double soft, hard;
  };

  template <class Team>
  void write(const Team& team, int64_t row, char* out, const char* student, const char* teacher, int64_t label,
             Weights weight, double t, Hard kind, const Row& sums, double g_sum, double rest, const Scratch<Real>& w) {
    const int s = index(c_.student.dtype);
    const double smoothing = label >= 0 ? c_.label_smoothing : 0.0;
    const double constant = -weight.hard * smoothing / static_cast<double>(c_.cols);
    auto factors = [&](int64_t b) {
      const double ref_s = w.blocks[b].ref_s, at_t = fade(ref_s, sums.ref_s, t) / sums.z_s;
      const double at_one = kind == Hard::linear ? at_t : fade(ref_s, sums.ref_s, 1.0) / sums.z_h;
      return Combine{weight.soft / t, -g_sum * at_t, label < 0 ? 0.0 : weight.hard * at_one, constant, ref_s};
    };
    // At the label the hard gradient is p - 1 = -rest / z, taken before anything is rounded or, in place,
    // overwritten.
    double at_label = 0.0;
    if (label >= 0) {
      Combine by = factors(label / block_cols);
      at_label = weight.hard * (smoothing - rest / sums.z_h) + constant;
      if (teacher) {
        const double q = w.es[label] * fade(w.blocks[label / block_cols].ref_s, sums.ref_s, t) / sums.z_s;
        at_label += by.of_g * (w.g[label] - q * g_sum);
      }
    }
    auto sweep = teacher ? table_.gradient[s][static_cast<int>(kind)] : table_.gradient_alone[s];
    team.each(blocks(), [&](int64_t b) {
      const int64_t j = block_start(b);
      const Combine by = factors(b);
      sweep(out + j * size_, student + j * size_, w.g + j, w.es + j, block_size(b), by,
            teacher ? ahead_of(row, b, 3, 1) : ahead_of(row, b, 2, 2));
      if (label >= j && label < j + block_cols) put(out, label, at_label);
    });
  }

  void put(char* out, int64_t j, double value) const {
    alignas(64) Real zero[16] = {};
    table_.gradient_alone[index(c_.student.dtype)](out + j * size_, nullptr, zero, zero, 1,
                                                   Combine{0.0, 0.0, 0.0, value, 0.0}, Ahead{});
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
  double soft_scale_ = 0.0, hard_scale_ = 0.0, unit_ = 1.0;
  double *soft_ = nullptr, *hard_ = nullptr;  // [rows] values of the terms, unweighted
};

}  // namespace distil_fast
