// sanitized_test.cpp: a program for the sanitizers: every CUDA kernel once on odd shapes, on one block and on clusters, with
// its results compared with plain loops in double. Exits with 1 where one is wrong. Run with EMU_EAGER=1 too. Knows no
// Python. Next: test_sanitizers.py, which builds and runs it; emu.h.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "core.h"
#include "cuda/hw.cuh"

using namespace distil_fast;

namespace {

constexpr int64_t rows = 4;
int wrong = 0;

void expect(bool right, const std::string& what) {
  if (!right) std::printf("wrong: %s\n", what.c_str()), ++wrong;
}

bool close(double a, double b, double scale, double relative) {
  return std::fabs(a - b) <= relative * (std::fabs(b) + scale);
}

float widened(uint16_t bfloat16) { return emulated::bit_cast<float>(static_cast<uint32_t>(bfloat16) << 16); }

// Values of one dtype in a buffer of exactly their size, each row `step` after the last.
struct Values {
  Values(int64_t cols, int64_t step, DType dtype, unsigned seed) : step(step), dtype(dtype) {
    const int64_t n = (rows - 1) * step + cols;
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, 2.0f);
    f32.resize(dtype == DType::f32 ? n : 0);
    bf16.resize(dtype == DType::f32 ? 0 : n);
    for (float& x : f32) x = normal(random);
    for (uint16_t& x : bf16) x = hw::narrow_bfloat16(normal(random));
  }
  double at(int64_t row, int64_t j) const {
    return dtype == DType::f32 ? f32[row * step + j] : widened(bf16[row * step + j]);
  }
  void set(int64_t row, int64_t j, double x) {
    if (dtype == DType::f32)
      f32[row * step + j] = static_cast<float>(x);
    else
      bf16[row * step + j] = hw::narrow_bfloat16(static_cast<float>(x));
  }
  Matrix matrix() {
    return {dtype == DType::f32 ? static_cast<void*>(f32.data()) : static_cast<void*>(bf16.data()), dtype, 0, step};
  }
  int64_t step;
  DType dtype;
  std::vector<float> f32;
  std::vector<uint16_t> bf16;
};

double log_sum(const Values& x, int64_t row, int64_t cols, double t) {
  double z = 0.0;
  for (int64_t j = 0; j < cols; ++j) z += std::exp(x.at(row, j) / t);
  return std::log(z);
}

template <class Numbers>
void set_shape(Numbers& c, int64_t cols) {
  c.outer = 1, c.inner = rows, c.cols = cols;
}

void row_loss(int64_t cols, DType dtype, DType teacher_dtype, bool inplace, double t) {
  const std::string what = "row loss, " + std::to_string(cols) + " columns";
  const double relative = dtype == DType::f32 ? 1e-5 : 1e-2;
  Values s(cols, cols, dtype, 1), p(cols, cols + 3, teacher_dtype, 2), grad(cols, cols + 1, dtype, 3);
  const Values student = s;
  std::vector<int64_t> labels = {0, cols - 1, -100, cols / 2};
  std::vector<float> workspace(row_workspace_cuda(rows));
  float loss = 0, soft = 0, hard = 0, unit = 0;
  double fault[3];
  CudaRowLoss call;
  RowLoss& c = call.numbers;
  set_shape(c, cols);
  c.student = s.matrix(), c.teacher = p.matrix(), c.grad = inplace ? s.matrix() : grad.matrix();
  c.labels = labels.data(), c.temperature = t, c.soft_weight = 0.5, c.hard_weight = 1.5, c.label_smoothing = 0.1;
  c.reduction = Reduction::sum, c.t_squared = false;
  c.loss = &loss, c.soft = &soft, c.hard = &hard;
  call.unit = &unit, call.fault = fault, call.workspace = workspace.data();
  const char* error = row_loss_cuda(call);
  if (error) return expect(false, what + ": " + error);

  double total_soft = 0.0, total_hard = 0.0;
  for (int64_t row = 0; row < rows; ++row) {
    const double of_s = log_sum(student, row, cols, t), of_t = log_sum(p, row, cols, t);
    const double of_h = log_sum(student, row, cols, 1.0);
    const bool labelled = labels[row] >= 0;
    for (int64_t j = 0; j < cols; ++j) {
      const double log_q = student.at(row, j) / t - of_s, log_p = p.at(row, j) / t - of_t;
      const double log_h = student.at(row, j) - of_h, target = (j == labels[row] ? 0.9 : 0.0) + 0.1 / cols;
      total_soft += std::exp(log_p) * (log_p - log_q);
      if (labelled) total_hard -= target * log_h;
      const double expected =
          0.5 * (std::exp(log_q) - std::exp(log_p)) / t + (labelled ? 1.5 * (std::exp(log_h) - target) : 0.0);
      const double found = (inplace ? s : grad).at(row, j);
      if (!close(found, expected, 1e-3, relative))
        return expect(false, what + ": gradient " + std::to_string(found) + " for " + std::to_string(expected));
    }
  }
  expect(close(soft, total_soft, 0.1, 1e-5) && close(hard, total_hard, 0.1, 1e-5), what + ": value");
  expect(fault[0] == 0.0, what + ": a fault");
}

// A softcap, log-probabilities and a divergence that is chosen at run time: the kernel that serves all of them.
void any_row_loss(int64_t cols) {
  const std::string what = "softcap and log-probabilities, " + std::to_string(cols) + " columns";
  Values s(cols, cols + 1, DType::f32, 12), p(cols, cols, DType::f32, 13), grad(cols, cols, DType::f32, 14);
  for (int64_t row = 0; row < rows; ++row) {
    const double z = log_sum(p, row, cols, 1.0);
    for (int64_t j = 0; j < cols; ++j) p.f32[row * cols + j] -= static_cast<float>(z);
  }
  p.f32[2 * cols] = 0.5f;  // no distribution
  std::vector<float> workspace(row_workspace_cuda(rows)), loss(rows), soft(rows);
  double fault[3];
  CudaRowLoss call;
  RowLoss& c = call.numbers;
  set_shape(c, cols);
  c.student = s.matrix(), c.teacher = p.matrix(), c.grad = grad.matrix();
  c.student_transform = {1.5, 3.0}, c.teacher_form = TeacherForm::log_probs, c.temperature = 2.0;
  c.reduction = Reduction::none, c.t_squared = false;
  c.loss = loss.data(), c.soft = soft.data();
  call.fault = fault, call.workspace = workspace.data();
  if (const char* error = row_loss_cuda(call)) return expect(false, what + ": " + error);
  for (int64_t row = 0; row < rows; ++row) {
    Values y = s;
    for (int64_t j = 0; j < cols; ++j) y.f32[row * y.step + j] = 3.0f * std::tanh(0.5f * s.f32[row * s.step + j]);
    const double of_s = log_sum(y, row, cols, 2.0);
    double total = 0.0;
    for (int64_t j = 0; j < cols; ++j) {
      const double log_q = y.at(row, j) / 2.0 - of_s, log_p = p.at(row, j), slope = y.at(row, j) / 3.0;
      total += std::exp(log_p) * (log_p - log_q);
      const double by = 1.5 * (1.0 - slope * slope) * (std::exp(log_q) - std::exp(log_p)) / 2.0;
      if (!close(grad.at(row, j), row == 2 ? 0.0 : by, 1e-3, 1e-3)) return expect(false, what + ": gradient");
    }
    expect(row == 2 ? std::isnan(loss[row]) : close(loss[row], total, 0.1, 1e-5), what + ": value");
  }
  expect(fault[0] == static_cast<double>(FaultKind::teacher_mass) && fault[1] == 2.0, what + ": fault");
}

// Forward KL over three ids and the bucket of the others, in place; row 2 has one of them twice.
void topk(int64_t cols, DType dtype) {
  const std::string what = "top-k, " + std::to_string(cols) + " columns";
  Values s(cols, cols + 1, dtype, 15);
  const Values student = s;
  const double probs[3] = {0.5, 0.2, 0.1}, tail = 0.2;
  std::vector<int64_t> ids(3 * rows), labels = {0, -100, 1, cols - 1};
  std::vector<float> log_probs(3 * rows), workspace(row_workspace_cuda(rows)), loss(rows), soft(rows), hard(rows);
  for (int64_t i = 0; i < 3 * rows; ++i) {
    ids[i] = i / 3 == 2 ? cols / 2 : (i % 3 * (cols - 1)) / 2;
    log_probs[i] = static_cast<float>(std::log(probs[i % 3]));
  }
  double fault[3];
  CudaTopKLoss call;
  RowLoss& c = call.rows.numbers;
  set_shape(c, cols);
  c.student = c.grad = s.matrix(), c.labels = labels.data(), c.temperature = 2.0, c.hard_weight = 1.5;
  c.reduction = Reduction::none, c.t_squared = false;
  c.loss = loss.data(), c.soft = soft.data(), c.hard = hard.data();
  call.rows.fault = fault, call.rows.workspace = workspace.data();
  call.teacher.k = 3, call.teacher.ids = ids.data(), call.teacher.log_probs = log_probs.data();
  call.teacher.shift = 1.0;
  if (const char* error = topk_loss_cuda(call)) return expect(false, what + ": " + error);
  for (int64_t row = 0; row < rows; ++row) {
    const double of_s = log_sum(student, row, cols, 2.0), of_h = log_sum(student, row, cols, 1.0);
    double inside = 0.0, total = 0.0;
    for (int64_t i = 0; i < 3; ++i) {
      const double log_q = student.at(row, ids[3 * row + i]) / 2.0 - of_s;
      inside += std::exp(log_q), total += probs[i] * (std::log(probs[i]) - log_q);
    }
    total += tail * (std::log(tail) - std::log(1.0 - inside));
    for (int64_t j = 0; j < cols; ++j) {
      const double q = std::exp(student.at(row, j) / 2.0 - of_s);
      double p = tail * q / (1.0 - inside);
      for (int64_t i = 0; i < 3; ++i) p = ids[3 * row + i] == j ? probs[i] : p;
      const double h = labels[row] < 0 ? 0.0 : std::exp(student.at(row, j) - of_h) - (labels[row] == j);
      const double expected = row == 2 ? 0.0 : (q - p) / 2.0 + 1.5 * h;
      if (!close(s.at(row, j), expected, 1e-3, dtype == DType::f32 ? 1e-4 : 1e-2))
        return expect(false, what + ": gradient");
    }
    expect(row == 2 ? std::isnan(soft[row]) : close(soft[row], total, 0.1, 1e-5), what + ": value");
  }
  expect(fault[0] == static_cast<double>(FaultKind::topk_id) && fault[1] == 2.0, what + ": fault");
}

void rescale(int64_t cols) {
  Values x(cols, cols, DType::bf16, 4);
  const Values before = x;
  const float by = -2.0f;
  CudaRescale call;
  set_shape(call.numbers, cols);
  call.numbers.grad = x.matrix(), call.grad_output = &by;
  expect(!rescale_cuda(call), "rescale");
  for (int64_t i = 0; i < rows * cols; ++i)
    if (x.at(0, i) != -2.0 * before.at(0, i)) return expect(false, "rescale, " + std::to_string(cols) + " columns");
}

void softmax(int64_t cols) {
  Values x(cols, cols + 1, DType::f32, 5), y(cols, cols, DType::f32, 6), u(cols, cols, DType::f32, 7);
  Values grad(cols, cols, DType::f32, 8);
  CudaTemperature<Softmax> call;
  set_shape(call.numbers, cols);
  call.numbers.logits = x.matrix(), call.numbers.out = y.matrix(), call.numbers.temperature = 2.0;
  expect(!softmax_cuda(call), "softmax");
  CudaTemperature<SoftmaxBackward> backward;
  set_shape(backward.numbers, cols);
  backward.numbers.out = y.matrix(), backward.numbers.grad_out = u.matrix(), backward.numbers.grad = grad.matrix();
  backward.numbers.temperature = 2.0;
  expect(!softmax_backward_cuda(backward), "softmax backward");
  for (int64_t row = 0; row < rows; ++row) {
    const double z = log_sum(x, row, cols, 2.0);
    double total = 0.0;
    for (int64_t j = 0; j < cols; ++j) total += y.at(row, j) * u.at(row, j);
    for (int64_t j = 0; j < cols; ++j) {
      const double q = std::exp(x.at(row, j) / 2.0 - z), g = y.at(row, j) * (u.at(row, j) - total) / 2.0;
      if (!close(y.at(row, j), q, 1e-4, 1e-5)) return expect(false, "softmax, " + std::to_string(cols));
      if (!close(grad.at(row, j), g, 1e-4, 1e-4)) return expect(false, "softmax backward, " + std::to_string(cols));
    }
  }
}

void cosine(int64_t cols) {
  Values s(cols, cols, DType::f32, 9), t(cols, cols, DType::bf16, 10), grad(cols, cols, DType::f32, 11);
  std::vector<float> workspace(row_workspace_cuda(rows));
  float loss = 0, term = 0;
  double fault[3], expected = 0.0;
  CudaPairLoss call;
  set_shape(call.numbers, cols);
  call.numbers.student = s.matrix(), call.numbers.teacher = t.matrix(), call.numbers.grad = grad.matrix();
  call.numbers.reduction = Reduction::sum, call.numbers.loss = &loss, call.numbers.term = &term;
  call.fault = fault, call.workspace = workspace.data();
  expect(!pair_loss_cuda(call), "cosine");
  for (int64_t row = 0; row < rows; ++row) {
    double ss = 0.0, tt = 0.0, st = 0.0, along = 0.0;
    for (int64_t j = 0; j < cols; ++j) {
      ss += s.at(row, j) * s.at(row, j), tt += t.at(row, j) * t.at(row, j), st += s.at(row, j) * t.at(row, j);
      along += s.at(row, j) * grad.at(row, j);
    }
    expected += 1.0 - st / std::sqrt(ss * tt);
    expect(std::fabs(along) < 1e-4, "cosine's gradient, along the student");
  }
  expect(close(loss, expected, 0.1, 1e-5), "cosine, " + std::to_string(cols) + " columns");
}

// Of probabilities that sum to 1, but for their rounding, and of any numbers.
void entries(PairKind kind, int64_t cols) {
  Values s(cols, cols, DType::bf16, 12), t(cols, cols, DType::f32, 13), grad(cols, cols, DType::bf16, 14);
  std::vector<float> workspace(row_workspace_cuda(rows));
  float loss = 0, term = 0;
  double fault[3], expected = 0.0;
  for (int64_t row = 0; row < rows && kind == PairKind::kl; ++row)
    for (int64_t j = 0; j < cols; ++j)
      s.set(row, j, std::exp(s.at(row, j)) / cols), t.set(row, j, std::exp(t.at(row, j)) / cols);
  CudaPairLoss call;
  set_shape(call.numbers, cols);
  call.numbers.student = s.matrix(), call.numbers.teacher = t.matrix(), call.numbers.grad = grad.matrix();
  call.numbers.kind = kind, call.numbers.scale = 0.5, call.numbers.reduction = Reduction::sum;
  call.numbers.loss = &loss, call.numbers.term = &term;
  call.fault = fault, call.workspace = workspace.data();
  const std::string what = "pairs, " + std::to_string(cols) + " columns";
  expect(!pair_loss_cuda(call), what);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t j = 0; j < cols; ++j) {
      const double a = s.at(row, j), b = t.at(row, j), squared = kind == PairKind::squared;
      expected += 0.5 * (squared ? (a - b) * (a - b) : b * std::log(b / a));
      if (!close(grad.at(row, j), squared ? a - b : -0.5 * b / a, 1e-2, 4e-3))
        return expect(false, what + ": gradient");
    }
  expect(close(loss, expected, 0.1, 1e-5), what);
}

}  // namespace

int main() {
  for (int major : {9, 8}) {
    hw::the_device() = {major, major == 9 ? 227 << 10 : 30 << 10, 2};
    for (int64_t cols : {1, 7, 33, 1100, 4111}) {
      for (bool inplace : {false, true}) {
        row_loss(cols, DType::bf16, DType::bf16, inplace, 2.0);
        row_loss(cols, DType::f32, DType::bf16, inplace, 1.0);
      }
      any_row_loss(cols);
      if (cols > 4) topk(cols, DType::f32), topk(cols, DType::bf16);
      rescale(cols);
      softmax(cols);
      if (cols > 1) cosine(cols);
      for (PairKind kind : {PairKind::squared, PairKind::kl}) entries(kind, cols);
    }
  }
  std::puts(wrong ? "wrong" : "clean");
  return wrong != 0;
}
