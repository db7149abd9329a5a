// hidden.cpp: the cosine loss over rows of hidden states, value and gradient from one reading of memory.
// Conducts sweeps of one row each; knows no instruction set. Next: hidden.h; docs/math.md for the formulae.
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
Fault cosine_rows(const CosineLoss& c) {
  const int64_t rows = c.outer * c.inner;
  const Mask<Real> mask{c.mask, c.mask_is_bool};
  double counted = 0.0;
  if (c.weight != 0.0)
    if (Fault fault = count_mask(mask, rows, &counted); fault.kind != FaultKind::nothing) return fault;
  const double scale = c.weight != 0.0 ? scale_of(c.reduction, c.count, counted) : 0.0;
  auto share = [&](int64_t row) { return scale == 0.0 ? 0.0 : mask[row] * scale; };
  auto upstream = [&](int64_t row) { return c.upstream ? static_cast<const Real*>(c.upstream)[row] : 1.0; };

  const auto& sweeps = table<Real>().hidden;
  const int s = index(c.student.dtype), t = index(c.teacher.dtype);
  std::unique_ptr<double[]> values(new double[rows]);

  // An fp16 gradient's size is that of weight / |student|: the norms are needed before the first of them is stored.
  double unit = 1.0;
  if (rows > 0 && c.grad.data && c.grad.dtype == DType::f16 && !c.upstream) {
    for_rows(rows, c.cols, 64, [&](int64_t row, auto team, std::byte*) {
      team.each(1, [&](int64_t) {
        values[row] = std::fabs(share(row) * c.weight);
        if (values[row] == 0.0) return;
        const char* student = row_at(c.student, row, c.inner);
        double ss, same;
        sweeps.square_sums[s][s](student, student, c.cols, &ss, &same);
        values[row] /= std::sqrt(ss + eps);
      });
    });
    unit = unit_of(*std::max_element(values.get(), values.get() + rows));
  }
  if (c.unit) *c.unit = unit;

  for_rows(rows, c.cols, 64, [&](int64_t row, auto team, std::byte*) {
    team.each(1, [&](int64_t) {
      char* out = c.grad.data ? row_at(c.grad, row, c.inner) : nullptr;
      const double weight = share(row) == 0.0 ? 0.0 : share(row) * c.weight * upstream(row);
      values[row] = 0.0;
      if (weight == 0.0) {
        if (out) std::memset(out, 0, c.cols * size_of(c.grad.dtype));
        return;
      }
      const char *student = row_at(c.student, row, c.inner), *teacher = row_at(c.teacher, row, c.inner);
      double ss, tt;
      sweeps.square_sums[s][t](student, teacher, c.cols, &ss, &tt);
      ss += eps, tt += eps;
      const double inverse_s = 1.0 / std::sqrt(ss), inverse_t = 1.0 / std::sqrt(tt);
      double e_square, u_e;
      sweeps.distance[s][t](student, teacher, c.cols, inverse_s, inverse_t, &e_square, &u_e);
      values[row] = 0.5 * (e_square + eps / ss + eps / tt);
      if (out)
        sweeps.gradient[s][t](out, student, teacher, c.cols, inverse_s, inverse_t, -weight / unit * inverse_s,
                              -weight / unit * inverse_s * (eps / ss - u_e));
    });
  });

  if (!c.loss) return {};
  Real *loss = static_cast<Real*>(c.loss), *term = static_cast<Real*>(c.term);
  double total = 0.0;
  for (int64_t row = 0; row < rows; ++row) {
    const double value = share(row) == 0.0 ? 0.0 : share(row) * values[row];
    total += value;
    if (c.reduction == Reduction::none) {
      term[row] = static_cast<Real>(value);
      loss[row] = static_cast<Real>(c.weight * value);
    }
  }
  if (c.reduction != Reduction::none) {
    *term = static_cast<Real>(total);
    *loss = static_cast<Real>(c.weight == 0.0 ? 0.0 : c.weight * total);
  }
  return {};
}

}  // namespace

Fault cosine_loss_cpu(const CosineLoss& call) {
  return call.student.dtype == DType::f64 ? cosine_rows<double>(call) : cosine_rows<float>(call);
}

}  // namespace distil_fast
