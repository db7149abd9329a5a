// sanitized_test.cpp: every entry of csrc/core.h on odd shapes, each buffer of its own exact size on the
// heap, for a build under AddressSanitizer and UndefinedBehaviorSanitizer, which end the process at the first
// mistake. Judges no value but that outputs are written and are numbers. Next: ../test_cpp.py, which builds
// it.
#include <omp.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "core.h"
#include "divergences.h"

using namespace distil_fast;

namespace {

constexpr int64_t sizes[] = {4, 2, 2, 8};
int64_t size_of(DType dtype) { return sizes[static_cast<int>(dtype)]; }

uint32_t state = 1;
double random_number() { return static_cast<int32_t>(state = state * 1664525u + 1013904223u) * (4.0 / 2147483648.0); }

void put(char* at, DType dtype, double value) {
  const float single = static_cast<float>(value);
  if (dtype == DType::f64) std::memcpy(at, &value, 8);
  if (dtype == DType::f32) std::memcpy(at, &single, 4);
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  uint16_t half = static_cast<uint16_t>(bits >> 16);  // bf16, truncated
  if (dtype == DType::f16) {
    const _Float16 x = static_cast<_Float16>(single);
    std::memcpy(&half, &x, 2);
  }
  if (dtype == DType::f16 || dtype == DType::bf16) std::memcpy(at, &half, 2);
}

bool is_number(const char* at, DType dtype) {
  double wide;
  float single;
  uint16_t half;
  if (dtype == DType::f64) return std::memcpy(&wide, at, 8), std::isfinite(wide);
  if (dtype == DType::f32) return std::memcpy(&single, at, 4), std::isfinite(single);
  std::memcpy(&half, at, 2);
  return dtype == DType::f16 ? (half & 0x7C00) != 0x7C00 : (half & 0x7F80) != 0x7F80;
}

// Rows of logits in memory that ends with the last one; `gap` elements of nan lie between rows.
struct Rows {
  int64_t rows, cols, gap;
  DType dtype;
  std::unique_ptr<char[]> memory;

  Rows(int64_t r, int64_t c, int64_t g, DType d) : rows(r), cols(c), gap(g), dtype(d) {
    const int64_t bytes = r ? (r * c + (r - 1) * g) * size_of(d) : 0;
    memory.reset(new char[bytes]);
    std::memset(memory.get(), 0xFF, bytes);
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < c; ++j) put(at(i, j), d, random_number());
  }
  char* at(int64_t i, int64_t j) const { return memory.get() + (i * (cols + gap) + j) * size_of(dtype); }
  Matrix matrix(int64_t inner) const { return {memory.get(), dtype, inner * (cols + gap), cols + gap}; }
  void check(const char* what) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j)
        if (!is_number(at(i, j), dtype)) {
          std::printf("%s: not a number in row %ld, column %ld of %ld x %ld\n", what, long(i), long(j), long(rows),
                      long(cols));
          std::exit(1);
        }
  }
};

template <class Real>
std::unique_ptr<Real[]> numbers(int64_t n, double value) {
  std::unique_ptr<Real[]> x(new Real[n]);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<Real>(value);
  return x;
}

void expect(bool right, const char* what) {
  if (right) return;
  std::printf("%s\n", what);
  std::exit(1);
}

struct Shape {
  int64_t outer, inner, cols, gap;
  int64_t rows() const { return outer * inner; }
};

// The same call with a teacher of a few columns, the last ones first, some of them padding.
template <class Real>
void top_k(const RowLoss& given, int variant) {
  const int64_t rows = given.outer * given.inner, k = given.cols < 5 ? given.cols : 5;
  auto ids = std::unique_ptr<int64_t[]>(new int64_t[rows * k]);
  auto log_probs = numbers<Real>(rows * k, std::log(0.15));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < k; ++j) ids[i * k + j] = j && (i + j) % 3 == 0 ? -1 : given.cols - 1 - j;
  TopKLoss call;
  call.row = given, call.row.teacher = {};
  call.k = k, call.ids = ids.get(), call.log_probs = log_probs.get();
  call.tail = static_cast<Tail>(variant % 3);
  if (variant % 2) call.row.student_transform = {0.7, variant % 4 == 1 ? 5.0 : 0.0};
  expect(topk_loss_cpu(call).kind == FaultKind::nothing, "topk_loss: a fault without a reason");
  if (!rows) return;
  ids[0] = given.cols;
  expect(topk_loss_cpu(call).kind == FaultKind::topk_id, "topk_loss: an id out of range went unnoticed");
}

template <class Real>
void row_losses(const Shape& s, DType student_dtype, DType teacher_dtype, int variant) {
  Rows student(s.rows(), s.cols, s.gap, student_dtype), teacher(s.rows(), s.cols, 2 * s.gap, teacher_dtype);
  Rows grad(s.rows(), s.cols, 0, student_dtype);
  auto labels = std::unique_ptr<int64_t[]>(new int64_t[s.rows()]);
  auto bools = std::unique_ptr<bool[]>(new bool[s.rows()]);
  auto mask = numbers<Real>(s.rows(), 0.5), temperatures = numbers<Real>(s.rows(), 3.7),
       upstream = numbers<Real>(s.rows(), -2);
  const bool none = variant % 3 == 2;
  auto loss = numbers<Real>(none ? s.rows() : 1, NAN), soft = numbers<Real>(none ? s.rows() : 1, NAN),
       hard = numbers<Real>(none ? s.rows() : 1, NAN);
  for (int64_t i = 0; i < s.rows(); ++i) {
    labels[i] = i % 3 == 1 ? -100 : i % 2 ? s.cols - 1 : 0;
    bools[i] = i % 4 != 3;
  }
  double unit = NAN;
  RowLoss call;
  call.outer = s.outer, call.inner = s.inner, call.cols = s.cols;
  call.student = student.matrix(s.inner);
  if (variant % 5 != 4) call.teacher = teacher.matrix(s.inner);
  if (variant % 4 == 1) call.grad = grad.matrix(s.inner);
  if (variant % 4 == 2) call.grad = student.matrix(s.inner);
  if (variant % 5 != 3) call.labels = labels.get(), call.hard_weight = 1.3;
  if (variant % 3 == 1) call.soft_mask = mask.get();
  if (variant % 3 == 0) call.soft_mask = bools.get(), call.mask_is_bool = true;
  call.temperature = 1.0 + variant % 3;
  if (variant % 7 == 3) call.temperatures = temperatures.get();
  call.reduction = static_cast<Reduction>(variant % 3);
  if (none) call.upstream = upstream.get();
  call.label_smoothing = variant % 2 ? 0.1 : 0.0;
  call.divergence = variant % 9, call.parameters[0] = 0.3, call.parameters[1] = 0.6;
  auto class_weights = numbers<Real>(s.cols, 0.7);
  if (variant % 2 == 0) call.class_weights = class_weights.get(), call.z_loss = 0.01;
  if (variant % 6 < 3) call.student_transform = {0.8, variant % 6 ? 5.0 : 0.0};
  if (variant % 4 < 2 && call.teacher.data) call.teacher_transform = {1.2, 7.0};
  if (variant % 4 == 3 && call.teacher.data) {  // uniform rows, half of the mass
    call.teacher_form = variant % 8 == 3 ? TeacherForm::log_probs : TeacherForm::probs;
    const double p = 0.5 / static_cast<double>(s.cols);
    for (int64_t i = 0; i < s.rows(); ++i)
      for (int64_t j = 0; j < s.cols; ++j)
        put(teacher.at(i, j), teacher_dtype, call.teacher_form == TeacherForm::probs ? p : std::log(p));
  }
  call.loss = loss.get(), call.soft = soft.get(), call.hard = hard.get(), call.unit = &unit;
  expect(row_loss_cpu(call).kind == FaultKind::nothing, "row_loss: a fault without a reason");
  for (int64_t i = 0; i < (none ? s.rows() : 1); ++i)
    expect(std::isfinite(loss[i]) && std::isfinite(soft[i]) && std::isfinite(hard[i]),
           "row_loss: a loss that is no number");
  if (variant % 4 == 1) grad.check("row_loss, gradient");
  if (variant % 4 == 2) student.check("row_loss, gradient in place");
  if (call.teacher.data) top_k<Real>(call, variant);
  if (call.grad.data && call.teacher.data) (call.grad.data == call.student.data ? student : grad).check("topk_loss");
  if (s.rows() && call.labels) {
    labels[s.rows() - 1] = s.cols;
    expect(row_loss_cpu(call).kind == FaultKind::label, "row_loss: a label out of range went unnoticed");
  }
}

template <class Real>
void softmaxes(const Shape& s, DType dtype, bool logarithm) {
  Rows logits(s.rows(), s.cols, s.gap, dtype), out(s.rows(), s.cols, 0, dtype), up(s.rows(), s.cols, 1, dtype),
      grad(s.rows(), s.cols, 3, dtype);
  auto temperatures = numbers<Real>(s.rows(), 1.7);
  Softmax call{s.outer, s.inner, s.cols, logits.matrix(s.inner), out.matrix(s.inner), logarithm, nullptr, 2.0};
  SoftmaxBackward back{s.outer,   s.inner, s.cols, out.matrix(s.inner), up.matrix(s.inner), grad.matrix(s.inner),
                       logarithm, nullptr, 2.0};
  if (s.gap) call.temperatures = back.temperatures = temperatures.get();
  expect(softmax_cpu(call).kind == FaultKind::nothing, "softmax: a fault without a reason");
  softmax_backward_cpu(back);
  out.check("softmax");
  grad.check("softmax, gradient");
  rescale_cpu({s.outer, s.inner, s.cols, grad.matrix(s.inner), 0.5});
  grad.check("rescale");
}

template <class Real>
void cosines(const Shape& s, DType student_dtype, DType teacher_dtype, int variant) {
  Rows student(s.rows(), s.cols, s.gap, student_dtype), teacher(s.rows(), s.cols, 0, teacher_dtype),
      grad(s.rows(), s.cols, 0, student_dtype);
  auto mask = numbers<Real>(s.rows(), 0.5), upstream = numbers<Real>(s.rows(), -2);
  const bool none = variant % 3 == 2;
  auto loss = numbers<Real>(none ? s.rows() : 1, NAN), term = numbers<Real>(none ? s.rows() : 1, NAN);
  double unit = NAN;
  CosineLoss call;
  call.outer = s.outer, call.inner = s.inner, call.cols = s.cols;
  call.student = student.matrix(s.inner), call.teacher = teacher.matrix(s.inner);
  if (variant % 2) call.grad = grad.matrix(s.inner);
  if (variant % 3) call.mask = mask.get();
  if (none) call.upstream = upstream.get();
  call.reduction = static_cast<Reduction>(variant % 3);
  call.loss = loss.get(), call.term = term.get(), call.unit = &unit;
  expect(cosine_loss_cpu(call).kind == FaultKind::nothing, "cosine_loss: a fault without a reason");
  for (int64_t i = 0; i < (none ? s.rows() : 1); ++i)
    expect(std::isfinite(loss[i]), "cosine_loss: a loss that is no number");
  if (variant % 2) grad.check("cosine_loss, gradient");
}

void all(const Shape& s, int variants) {
  constexpr DType half_or_float[] = {DType::f32, DType::f16, DType::bf16};
  for (int variant = 0; variant < variants; ++variant) {
    for (DType student : half_or_float)
      for (DType teacher : half_or_float) {
        row_losses<float>(s, student, teacher, variant);
        cosines<float>(s, student, teacher, variant);
      }
    row_losses<double>(s, DType::f64, DType::f64, variant);
    cosines<double>(s, DType::f64, DType::f64, variant);
  }
  for (bool logarithm : {false, true}) {
    for (DType dtype : half_or_float) softmaxes<float>(s, dtype, logarithm);
    softmaxes<double>(s, DType::f64, logarithm);
  }
}

}  // namespace

int main() {
  for (const char* name : {"avx512_bf16", "avx512", "avx2", "portable"}) {
    if (!use_instruction_set(name)) {
      std::printf("%s: absent\n", name);
      continue;
    }
    omp_set_num_threads(1);
    for (int64_t cols : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 100}) all({2, 2, cols, cols % 3}, 12);
    for (int64_t cols : {2049, 4100}) all({1, 2, cols, 1}, 4);
    all({0, 3, 5, 0}, 12);
    omp_set_num_threads(3);
    all({1, 1, 40001, 0}, 1);  // the columns of a row over threads
    all({1, 5, 9001, 2}, 1);   // rows over threads
    std::printf("%s: clean\n", instruction_set());
  }
  return 0;
}
