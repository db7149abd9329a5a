// sharded.cpp: a shard's part of the row algorithm: its maxima and sums; sums of f and g, and the gradient, once the
// sums of all shards are known. Conducts sweeps of one block each; a row's sums are taken in the order of its blocks.
// It knows no other process, and no reduction over rows. Next: sweeps.h, sharded.h; docs/math.md, "Sharded
// vocabularies".
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "row_scratch.h"
#include "threads.h"

namespace distil_fast {
namespace {

// The walk over rows and blocks, and a block's exponentials: what the three calls share.
template <class Real>
class ShardRows {
 public:
  explicit ShardRows(const Shard& shard)
      : c_(shard), table_(table<Real>()), rows_(shard.outer * shard.inner), size_(size_of(shard.student.dtype)) {}

 protected:
  struct Place {
    int64_t row;
    const char *student, *teacher;  // teacher null: the row has no soft term
    double t;
    bool hard;
    Hard kind;
  };

  // One thread's memory for a block: exponentials of both models, and differences that become g.
  struct Block3 {
    alignas(64) Real es[block_cols], et[block_cols], g[block_cols];
  };

  // run(place, team, parts) for each row that a term uses, unused(row) for the others; `parts` has one Part a block.
  template <class Part, class Run, class Unused>
  void for_used_rows(Run run, Unused unused) const {
    parts_bytes_ = (blocks() * sizeof(Part) + 63) / 64 * 64;
    for_rows(rows_, c_.cols, scratch_bytes(), [&](int64_t row, auto team, std::byte* memory) {
      const bool soft = c_.teacher.data && c_.soft_weights[row] != 0.0, hard = c_.hard_weights[row] != 0.0;
      if (!soft && !hard) {
        if (team.leads()) unused(row);
        return;
      }
      const double t = soft ? c_.temperatures[row] : 1.0;
      const Hard kind = !soft || !hard || t == 1.0 ? Hard::linear : t == 2.0 ? Hard::square : Hard::own;
      run(Place{row, row_at(c_.student, row, c_.inner), soft ? row_at(c_.teacher, row, c_.inner) : nullptr, t, hard,
                kind},
          team, reinterpret_cast<Part*>(memory));
      team.meet();  // the parts are about to be used again
    });
  }

  // The calling thread's own block; the row's parts, in the first thread's memory, lie before it.
  Block3& own_block() const { return *reinterpret_cast<Block3*>(scratch(scratch_bytes()) + parts_bytes_); }

  int64_t blocks() const { return blocks_of(c_.cols); }
  int64_t size(int64_t b) const { return block_size(c_.cols, b); }
  const char* student(const Place& p, int64_t b) const { return p.student + block_start(b) * size_; }
  const char* teacher(const Place& p, int64_t b) const {
    return p.teacher ? p.teacher + block_start(b) * size_of(c_.teacher.dtype) : nullptr;
  }

  Block<Real> exponentiate(const Place& p, int64_t b, double ref_s, double ref_t, Block3& w) const {
    Block<Real> block{Real(ref_s), Real(ref_t), 0, 0, 0};
    const int s = index(c_.student.dtype);
    if (p.teacher)
      table_.rows.exponentiate[s][index(c_.teacher.dtype)][static_cast<int>(p.kind)](
          student(p, b), teacher(p, b), size(b), p.t, w.es, w.et, w.g, &block, ahead_of(p.row, b));
    else
      table_.rows.exponentiate_alone[s](student(p, b), size(b), 1.0, w.es, &block, ahead_of(p.row, b));
    return block;
  }

  // f and g of a block by the totals of all shards; g takes the differences' place.
  void diverge(const Place& p, int64_t b, const ShardTotals& all, Block3& w, double* f, double* g) const {
    exponentiate(p, b, all.ref_s, all.ref_t, w);
    const Divide by{1.0 / all.z_t, 1.0 / all.z_s, 1.0 / p.t, all.rho, c_.parameters[0], c_.parameters[1], all.centre};
    table_.rows.diverge[c_.divergence](w.es, w.et, w.g, size(b), by, f, g, nothing_ahead(p));
  }

  static Ahead nothing_ahead(const Place& p) { return {p.student, p.student, 0, 0}; }

  const Shard& c_;
  const Table<Real>& table_;
  const int64_t rows_, size_;

 private:
  size_t scratch_bytes() const { return parts_bytes_ + sizeof(Block3); }

  // The same block of the next row, to fetch while this one is swept.
  Ahead ahead_of(int64_t row, int64_t b) const {
    const int64_t next = row + 1 < rows_ ? row + 1 : row;
    const Matrix& other = c_.teacher.data ? c_.teacher : c_.student;
    const int64_t other_size = size_of(other.dtype);
    return {row_at(c_.student, next, c_.inner) + block_start(b) * size_,
            row_at(other, next, c_.inner) + block_start(b) * other_size, 4 * size_, 4 * other_size};
  }

  mutable size_t parts_bytes_ = 0;
};

template <class Real>
class Statistics : ShardRows<Real> {
  using Base = ShardRows<Real>;
  using typename Base::Block3, typename Base::Place;

 public:
  explicit Statistics(const ShardStatistics& call) : Base(call.shard), call_(call) {}

  void run() const {
    this->template for_used_rows<Part>([this](const Place& p, auto team, Part* parts) { run_row(p, team, parts); },
                                       [this](int64_t row) {
                                         call_.maxima[2 * row] = call_.maxima[2 * row + 1] = lowest;
                                         call_.sums[row] = {};
                                       });
  }

 private:
  static constexpr double lowest = std::numeric_limits<Real>::lowest();

  struct Part {
    double max_s, max_t;
    ShardSums sums;
    double at_top;  // columns that have the row's largest logit
  };

  template <class Team>
  void run_row(const Place& p, const Team& team, Part* parts) const {
    const Shard& c = this->c_;
    team.each(this->blocks(), [&](int64_t b) {
      parts[b].max_s = this->table_.rows.maximum[index(c.student.dtype)](this->student(p, b), this->size(b));
      parts[b].max_t =
          p.teacher ? this->table_.rows.maximum[index(c.teacher.dtype)](this->teacher(p, b), this->size(b)) : lowest;
    });
    double top_s = lowest, top_t = lowest;
    for (int64_t b = 0; b < this->blocks(); ++b)
      top_s = std::max(top_s, parts[b].max_s), top_t = std::max(top_t, parts[b].max_t);
    team.each(this->blocks(), [&](int64_t b) { sum_block(p, b, top_s, top_t, parts[b]); });
    if (!team.leads()) return;
    ShardSums all{};
    double at_top = 0.0;
    for (int64_t b = 0; b < this->blocks(); ++b) {
      const ShardSums& x = parts[b].sums;
      all.z_s += x.z_s, all.z_t += x.z_t, all.z_h += x.z_h;
      all.gap += x.gap, all.tail += x.tail, all.lean += x.lean;
      all.rest += x.rest, all.shifted += x.shifted;
      at_top += parts[b].at_top;
    }
    if (at_top > 1.0) all.rest += at_top - 1.0;
    call_.maxima[2 * p.row] = top_s, call_.maxima[2 * p.row + 1] = top_t;
    call_.sums[p.row] = all;
  }

  void sum_block(const Place& p, int64_t b, double top_s, double top_t, Part& part) const {
    const int s = index(this->c_.student.dtype);
    const int64_t n = this->size(b);
    Block3& w = this->own_block();
    const Block<Real> block = this->exponentiate(p, b, top_s, top_t, w);
    ShardSums& x = part.sums;
    x = {block.z_s, block.z_t, block.z_h, 0.0, 0.0, 0.0, 0.0, 0.0};
    part.at_top = 0.0;
    if (p.teacher) {
      soft_sums(p, b, block, top_s - top_t, w, x);
    } else {
      x.z_t = 0.0;
    }
    if (!p.hard) return;
    if (part.max_s == top_s)
      this->table_.shards.sum_below[s](this->student(p, b), n, top_s, &x.rest, &part.at_top);
    else
      x.rest = x.z_h;
    if (this->c_.label_smoothing != 0.0) x.shifted = this->table_.rows.shifted_sum[s](this->student(p, b), n, top_s);
  }

  void soft_sums(const Place& p, int64_t b, const Block<Real>& block, double apart, Block3& w, ShardSums& x) const {
    const auto& rows = this->table_.rows;
    const int64_t n = this->size(b);
    const double missed = (apart - block.apart()) / p.t, to_q = std::fabs(missed) < 0.5 ? std::exp(missed) : 1.0;
    // The mean of the differences is taken about an estimate of it: then it is exact where one column weighs most.
    double pivot = call_.of_teacher ? 0.0 : rows.weighted_difference(w.es, w.g, n) / x.z_s;
    pivot = std::isfinite(pivot) ? Real(pivot) : Real(0);
    double sums[3];
    this->table_.shards.sums[call_.of_teacher](w.es, w.et, w.g, n, 1.0 / p.t, to_q, pivot, sums);
    x.gap = sums[0], x.tail = sums[1], x.lean = (sums[2] + pivot * to_q * x.z_s) / p.t;
    if (std::fabs(pivot) <= 8.0 * p.t) return;
    // Models so far apart: their differences are rounded anew, near their mean.
    const Block<Real> moved = this->exponentiate(p, b, block.ref_s, block.ref_s - block.apart() - pivot, w);
    const double by = double(moved.apart()) - block.apart();
    x.lean = (rows.weighted_difference(w.es, w.g, n) + by * x.z_s) * to_q / p.t;
  }

  const ShardStatistics& call_;
};

template <class Real>
class Divergences : ShardRows<Real> {
  using Base = ShardRows<Real>;
  using typename Base::Place;

 public:
  explicit Divergences(const ShardDivergence& call) : Base(call.shard), call_(call) {}

  void run() const {
    struct Part {
      double f, g;
    };
    auto put = [this](int64_t row, double f, double g) { call_.f_g[2 * row] = f, call_.f_g[2 * row + 1] = g; };
    this->template for_used_rows<Part>(
        [&](const Place& p, auto team, Part* parts) {
          if (!p.teacher) {
            if (team.leads()) put(p.row, 0.0, 0.0);
            return;
          }
          team.each(this->blocks(), [&](int64_t b) {
            this->diverge(p, b, call_.totals[p.row], this->own_block(), &parts[b].f, &parts[b].g);
          });
          if (!team.leads()) return;
          double f = 0.0, g = 0.0;
          for (int64_t b = 0; b < this->blocks(); ++b) f += parts[b].f, g += parts[b].g;
          put(p.row, f, g);
        },
        [&](int64_t row) { put(row, 0.0, 0.0); });
  }

 private:
  const ShardDivergence& call_;
};

template <class Real>
class Gradient : ShardRows<Real> {
  using Base = ShardRows<Real>;
  using typename Base::Block3, typename Base::Place;

 public:
  explicit Gradient(const ShardGradient& call) : Base(call.shard), call_(call) {}

  void run() const {
    struct Part {};
    this->template for_used_rows<Part>(
        [this](const Place& p, auto team, Part*) {
          team.each(this->blocks(), [&](int64_t b) { write(p, b, call_.totals[p.row]); });
        },
        [this](int64_t row) { std::memset(out(row), 0, this->c_.cols * this->size_); });
  }

 private:
  char* out(int64_t row) const { return row_at(call_.grad, row, this->c_.inner); }

  void write(const Place& p, int64_t b, const ShardTotals& all) const {
    const Shard& c = this->c_;
    const int s = index(c.student.dtype);
    const int64_t from = block_start(b), n = this->size(b), label = p.hard ? call_.labels[p.row] - from : -1;
    const double soft = p.teacher ? c.soft_weights[p.row] / p.t : 0.0, hard = p.hard ? c.hard_weights[p.row] : 0.0;
    const double constant = -hard * c.label_smoothing / static_cast<double>(call_.vocabulary);
    Block3& w = this->own_block();
    double f, g;
    if (p.teacher)
      this->diverge(p, b, all, w, &f, &g);
    else
      this->exponentiate(p, b, all.ref_s, 0.0, w);
    const double of_h = hard == 0.0 ? 0.0 : hard * (1.0 + all.lse_slope) / all.z_h;
    const Combine by{soft, p.teacher ? -all.g_sum / all.z_s : 0.0, of_h, constant, all.ref_s};
    // At the label the cross-entropy's gradient is -rest / z. Taken before anything is overwritten in place.
    double at_label = 0.0;
    if (label >= 0 && label < n) {
      const double missing = all.rest / all.z_h;
      at_label = hard * (c.label_smoothing - missing + all.lse_slope * (1.0 - missing)) + constant;
      if (p.teacher) at_label += soft * (w.g[label] - w.es[label] / all.z_s * all.g_sum);
    }
    char* to = out(p.row) + from * this->size_;
    const auto& rows = this->table_.rows;
    auto sweep = p.teacher ? rows.gradient[s][static_cast<int>(p.kind)] : rows.gradient_alone[s];
    sweep(to, this->student(p, b), w.g, w.es, n, by, this->nothing_ahead(p));
    if (label >= 0 && label < n) {
      const Real zero[16] = {};
      rows.gradient_alone[s](to + label * this->size_, nullptr, zero, zero, 1, Combine{0.0, 0.0, 0.0, at_label, 0.0},
                             Ahead{});
    }
  }

  const ShardGradient& call_;
};

template <template <class> class Step, class Call>
void run(const Call& call) {
  if (call.shard.student.dtype == DType::f64)
    Step<double>(call).run();
  else
    Step<float>(call).run();
}

}  // namespace

void shard_statistics_cpu(const ShardStatistics& call) { run<Statistics>(call); }
void shard_divergence_cpu(const ShardDivergence& call) { run<Divergences>(call); }
void shard_gradient_cpu(const ShardGradient& call) { run<Gradient>(call); }

}  // namespace distil_fast
