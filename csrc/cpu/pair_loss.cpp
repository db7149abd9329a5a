// pair_loss.cpp: the losses that compare two tensors row by row, value and gradient from one reading of memory. Conducts
// sweeps of one row each; knows no instruction set, and of the formulae what is left of them per row. Next: pair.h;
// docs/math.md for the formulae.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "dispatch.h"
#include "shares.h"
#include "threads.h"

namespace distil_fast {
namespace {

constexpr double eps = 1e-12;  // on both squared norms, as ATen's cosine_embedding_loss has it

template <class Real>
class PairLossCall {
 public:
  explicit PairLossCall(const PairLoss& call)
      : c_(call),
        rows_(call.outer * call.inner),
        mask_{call.mask, call.mask_is_bool},
        sweeps_(table<Real>().pairs),
        s_(index(call.student.dtype)),
        t_(index(call.teacher.dtype)) {}

  Fault run() {
    double counted = 0.0;
    if (c_.weight != 0.0)
      if (Fault fault = count_mask(mask_, rows_, &counted); fault.kind != FaultKind::nothing) return fault;
    to_share_ = c_.weight != 0.0 ? scale_of(c_.reduction, c_.count, counted) : 0.0;
    values_.reset(new double[rows_]);
    if (rows_ > 0 && c_.grad.data && c_.grad.dtype == DType::f16 && !c_.upstream) unit_ = unit();
    if (c_.unit) *c_.unit = unit_;
    for_rows(rows_, c_.cols, 64,
             [&](int64_t row, auto team, std::byte*) { team.each(1, [&](int64_t) { values_[row] = one(row); }); });
    if (c_.loss) reduce();
    return {};
  }

 private:
  double share(int64_t row) const { return to_share_ == 0.0 ? 0.0 : mask_[row] * to_share_; }
  double upstream(int64_t row) const { return c_.upstream ? static_cast<const Real*>(c_.upstream)[row] : 1.0; }

  // An fp16 gradient is of the size of weight * scale, times entries, or, of the cosine, divided by |student|: then the
  // norms are needed before the first gradient is stored. The others leave room for entries of up to 65504.
  double unit() {
    for_rows(rows_, c_.cols, 64, [&](int64_t row, auto team, std::byte*) {
      team.each(1, [&](int64_t) {
        values_[row] = std::fabs(share(row) * c_.weight * c_.scale);
        if (values_[row] == 0.0) return;
        if (c_.kind != PairKind::cosine) {
          values_[row] *= pair_unit;
          return;
        }
        const char* student = row_at(c_.student, row, c_.inner);
        double ss, same;
        sweeps_.square_sums[s_][s_](student, student, c_.cols, &ss, &same);
        values_[row] /= std::sqrt(ss + eps);
      });
    });
    return unit_of(*std::max_element(values_.get(), values_.get() + rows_));
  }

  // A row's value; its gradient is written.
  double one(int64_t row) const {
    char* out = c_.grad.data ? row_at(c_.grad, row, c_.inner) : nullptr;
    const double weight = share(row) == 0.0 ? 0.0 : share(row) * c_.weight * c_.scale * upstream(row);
    if (weight == 0.0) {
      if (out) std::memset(out, 0, c_.cols * size_of(c_.grad.dtype));
      return 0.0;
    }
    const char *student = row_at(c_.student, row, c_.inner), *teacher = row_at(c_.teacher, row, c_.inner);
    if (c_.kind == PairKind::cosine) return cosine(out, student, teacher, weight / unit_);
    const auto entries = sweeps_.entries[static_cast<int>(c_.kind)][s_][t_];
    if (c_.kind != PairKind::kl) return c_.scale * entries(out, student, teacher, c_.cols, weight / unit_);
    KeepSubnormals keep;  // an infinite loss for a tiny q would be wrong
    return c_.scale * entries(out, student, teacher, c_.cols, weight / unit_);
  }

  double cosine(char* out, const char* student, const char* teacher, double weight) const {
    double ss, tt, e_square, u_e;
    sweeps_.square_sums[s_][t_](student, teacher, c_.cols, &ss, &tt);
    ss += eps, tt += eps;
    const double inverse_s = 1.0 / std::sqrt(ss), inverse_t = 1.0 / std::sqrt(tt);
    sweeps_.distance[s_][t_](student, teacher, c_.cols, inverse_s, inverse_t, &e_square, &u_e);
    if (out)
      sweeps_.cosine_gradient[s_][t_](out, student, teacher, c_.cols, inverse_s, inverse_t, -weight * inverse_s,
                                      -weight * inverse_s * (eps / ss - u_e));
    return 0.5 * (e_square + eps / ss + eps / tt);
  }

  void reduce() const {
    Real *loss = static_cast<Real*>(c_.loss), *term = static_cast<Real*>(c_.term);
    double total = 0.0;
    for (int64_t row = 0; row < rows_; ++row) {
      const double value = share(row) == 0.0 ? 0.0 : share(row) * values_[row];
      total += value;
      if (c_.reduction == Reduction::none) {
        term[row] = static_cast<Real>(value);
        loss[row] = static_cast<Real>(c_.weight * value);
      }
    }
    if (c_.reduction != Reduction::none) {
      *term = static_cast<Real>(total);
      *loss = static_cast<Real>(c_.weight == 0.0 ? 0.0 : c_.weight * total);
    }
  }

  const PairLoss& c_;
  const int64_t rows_;
  const Mask<Real> mask_;
  const PairSweeps<dtypes<Real>>& sweeps_;
  const int s_, t_;
  double to_share_ = 0.0, unit_ = 1.0;
  std::unique_ptr<double[]> values_;  // of the rows
};

}  // namespace

Fault pair_loss_cpu(const PairLoss& call) {
  return call.student.dtype == DType::f64 ? PairLossCall<double>(call).run() : PairLossCall<float>(call).run();
}

}  // namespace distil_fast
