// core.h: the ABI of the native core: plain structs of pointers, sizes and strides, in elements, never in
// bytes. It knows nothing of Python or torch, and who calls it has made sure that the pointers are what they
// claim to be. What depends on values (labels, masks, weights) is checked inside, before a logit is read, and
// comes back as a Fault. Next: cpu/row_loss.h, the algorithm behind row_loss_cpu.
#pragma once

#include <cstdint>

namespace distil_fast {

enum class DType : int32_t { f32, f16, bf16, f64 };

// [outer, inner, cols]: two free strides, the last dimension contiguous.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t outer_stride = 0;
  int64_t row_stride = 0;
};

enum class Reduction : int32_t { mean, sum, none };

// What was wrong with the values: no logit is read and nothing is written when a call returns anything but
// `nothing`. row_loss's teacher_mass alone is seen while rows are read: then every output is written, and where a row was
// at fault its loss is nan and its gradient 0.
enum class FaultKind : int32_t {
  nothing,
  label,
  mask,
  temperature,
  class_weight,
  teacher_mass,
  topk_id,
  topk_log_prob
};

struct Fault {
  FaultKind kind = FaultKind::nothing;
  int64_t row = -1;    // the first row at fault; of class_weight: the class
  double value = 0.0;  // what stood there
};

// What a logit is before the temperature: scale x, or cap tanh(scale x / cap) where cap is not 0.
struct Transform {
  double scale = 1.0, cap = 0.0;
};

// What the teacher's rows hold. What is not logits is at the temperature already, and normalised by the kernel; a
// row whose probabilities sum to more than 1 by more than rounding is at fault.
enum class TeacherForm : int32_t { logits, log_probs, probs };

// How much that may be: a bfloat16 log-probability of -8 to -16 is off by up to 3 %, and all of a row the same way.
constexpr double mass_limit(DType dtype) { return dtype == DType::bf16 ? 1.05 : dtype == DType::f16 ? 1.01 : 1.001; }

// loss = sum over rows of soft_weight * share_s * D(teacher, student) + hard_weight * share_h *
// cross_entropy. `Real` below is double where the student's logits are, float otherwise.
struct RowLoss {
  int64_t outer = 0, inner = 0, cols = 0;  // rows = outer * inner
  Matrix student, teacher;                 // teacher.data null: no soft term
  Matrix grad;                             // of the student's dtype; data null: no gradient; may be the student itself
  const int64_t* labels = nullptr;         // [rows]; null: no hard term
  int64_t ignore_index = -100;
  const void* soft_mask = nullptr;  // [rows] bool, or Real token weights; null: every row
  bool mask_is_bool = false;
  const void* temperatures = nullptr;  // [rows] Real; null: `temperature` for all
  double temperature = 1.0;
  double soft_weight = 1.0, hard_weight = 0.0;
  double soft_count = -1.0, hard_count = -1.0;  // the terms' denominators; -1: counted here
  bool t_squared = true;
  Reduction reduction = Reduction::mean;
  double label_smoothing = 0.0;
  double z_loss = 0.0;                  // the hard term is cross_entropy + z_loss lse^2
  const void* class_weights = nullptr;  // [cols] Real: a label's weight in the hard term, as in its count; null: 1
  int32_t divergence = 0;               // index into the table of divergences.h
  double parameters[2] = {0.0, 0.0};    // its run-time parameters
  TeacherForm teacher_form = TeacherForm::logits;
  Transform student_transform, teacher_transform;  // the latter of logits only
  const void* upstream = nullptr;                  // [rows] Real: multiplies each row's gradient; null: 1
  void *loss = nullptr, *soft = nullptr,
       *hard = nullptr;    // Real: one each, or [rows] where nothing is reduced
  double* unit = nullptr;  // out: the gradient is stored in units of it (fp16 only; else 1)
};

Fault row_loss_cpu(const RowLoss& call);

// What becomes of the mass that a top-k teacher does not name: it is one more outcome, compared with the student's mass
// on the other columns; both models are renormalised over the k; or the sum over outcomes stops at the k.
enum class Tail : int32_t { bucket, renormalise, ignore };

// A row loss whose teacher is k columns a row, at the temperature already. At fault, before a logit is read: an id that
// is neither -1 nor a column, or that stands twice in a row (topk_id, value: the id); a log-probability that is nan or
// above `tolerance` (topk_log_prob); probabilities that sum to more than 1 + tolerance (teacher_mass).
struct TopKLoss {
  RowLoss row;  // `teacher` and what says how to read it are not used
  int64_t k = 0;
  const int64_t* ids = nullptr;     // [rows, k]; -1: no entry
  const void* log_probs = nullptr;  // [rows, k] Real, in the whole distribution; -inf: a probability of 0
  double tolerance = 1e-3;          // what rounding may add, by the dtype that the log-probabilities had
  Tail tail = Tail::bucket;
  double shift = 0.0;  // the divergence's functor adds shift (q - p) to f and shift q to g; `ignore` takes it off again
};

Fault topk_loss_cpu(const TopKLoss& call);

// grad *= factor, rounded once to grad's dtype.
struct Rescale {
  int64_t outer = 0, inner = 0, cols = 0;
  Matrix grad;
  double factor = 1.0;
};

void rescale_cpu(const Rescale& call);

// softmax or its logarithm, of logits / temperature.
struct Softmax {
  int64_t outer = 0, inner = 0, cols = 0;
  Matrix logits, out;
  bool logarithm = false;
  const void* temperatures = nullptr;  // [rows] Real
  double temperature = 1.0;
};

Fault softmax_cpu(const Softmax& call);

// From the output and its gradient, the gradient of the logits.
struct SoftmaxBackward {
  int64_t outer = 0, inner = 0, cols = 0;
  Matrix out, grad_out, grad;
  bool logarithm = false;
  const void* temperatures = nullptr;
  double temperature = 1.0;
};

void softmax_backward_cpu(const SoftmaxBackward& call);

// How two tensors are compared: 1 - cos(student, teacher) of each row, or the sum of one of pairs.h over its entries.
enum class PairKind : int32_t { cosine, squared, kl };

// loss = weight * sum over rows of share * scale * value(student, teacher).
struct PairLoss {
  int64_t outer = 0, inner = 0, cols = 0;
  Matrix student, teacher, grad;
  PairKind kind = PairKind::cosine;
  double scale = 1.0;  // of the row's value; in (0, 1], of cosine 1
  const void* mask = nullptr;
  bool mask_is_bool = false;
  double weight = 1.0;
  double count = -1.0;
  Reduction reduction = Reduction::mean;
  const void* upstream = nullptr;
  void *loss = nullptr, *term = nullptr;  // term: before `weight`
  double* unit = nullptr;
};

Fault pair_loss_cpu(const PairLoss& call);

// An fp16 gradient's unit follows from the largest row weight; of `squared` and `kl` it is so many times larger than of a
// probability, whose gradients are below 1.
inline constexpr double pair_unit = 64.0;

// ---- A vocabulary in shards: of each row one process holds some columns, of both models alike. Three calls, with sums
// over the processes between them (distil_fast/parallel), come to RowLoss's value and gradient. What depends on values
// was checked by the caller. Arrays have one entry, or one struct, for each row.

// A row's sums over all processes, or what follows from them. Differences of the logits are relative to the models'
// distance, which is ref_s - ref_t rounded to Real, 0 where that is not below 1e6 (Block::apart).
struct ShardTotals {
  double ref_s, ref_t;   // of the exponentials: the largest logits of all processes
  double z_s, z_t, z_h;  // sums of exponentials of student and teacher at T, and of the student at 1
  double rho, centre;    // lse_s - lse_t less the distance, at T; the divergence's centre (divergences.h)
  double g_sum;          // sum of g
  double rest;           // sum of the student's exponentials at 1 but for the label's
  double lse_slope;      // of the hard term in the student's logsumexp, beside the cross-entropy's 1
};

// A row's sums over one shard, relative to the shard's own largest logits. d: the difference of the logits less the
// shard's own distance, over T; es: as if the references had exactly that distance, where that is nearly so.
struct ShardSums {
  double z_s, z_t, z_h;
  double gap;      // sum of es - et
  double tail;     // sum of et (expm1(d) - d), or of es (expm1(-d) + d)
  double lean;     // sum of et d, or of es d
  double rest;     // sum of the student's exponentials at 1 but for one largest column's
  double shifted;  // sum of the student's logits relative to the largest, where labels are smoothed
};

struct Shard {
  int64_t outer = 0, inner = 0, cols = 0;
  Matrix student, teacher;  // teacher.data null: no soft term
  const double *temperatures = nullptr, *soft_weights = nullptr,
               *hard_weights = nullptr;  // 0: the term has no such row
  int32_t divergence = 0;
  double parameters[2] = {0.0, 0.0};
  double label_smoothing = 0.0;
};

struct ShardStatistics {
  Shard shard;
  bool of_teacher = true;     // what `tail` and `lean` are of
  double* maxima = nullptr;   // out, [rows, 2]: student's and teacher's; the lowest finite number where there is none
  ShardSums* sums = nullptr;  // out
};

struct ShardDivergence {
  Shard shard;
  const ShardTotals* totals = nullptr;
  double* f_g = nullptr;  // out, [rows, 2]: sums of f and of g over the shard
};

struct ShardGradient {
  Shard shard;
  const ShardTotals* totals = nullptr;
  const int64_t* labels = nullptr;  // the column of this shard; -1: the label is in another, or there is none
  int64_t vocabulary = 0;           // columns of all shards
  Matrix grad;                      // may be the student itself
};

void shard_statistics_cpu(const ShardStatistics& call);
void shard_divergence_cpu(const ShardDivergence& call);
void shard_gradient_cpu(const ShardGradient& call);

// ---- CUDA: present where nvcc was when this was built. Pointers are the device's; `numbers` says the rest, and what is a
// pointer beside it stands, where it is not null, for the number of its name. A call launches kernels on `stream` of
// the current device, waits for nothing, and returns null or what kept it from launching.
// Values at fault stop nothing: their row's loss is nan and its gradient 0.
struct CudaRowLoss {
  RowLoss numbers;
  const float *temperature = nullptr, *soft_weight = nullptr, *hard_weight = nullptr, *soft_count = nullptr,
              *hard_count = nullptr;
  float* unit = nullptr;       // out
  double* fault = nullptr;     // out [3]: kind, row, value
  float* workspace = nullptr;  // [row_workspace_cuda(rows)]
  void* stream = nullptr;
};

int64_t row_workspace_cuda(int64_t rows);
const char* row_loss_cuda(const CudaRowLoss& call);

// Its log-probabilities are float32. A row at fault here stops nothing either.
struct CudaTopKLoss {
  CudaRowLoss rows;
  TopKLoss teacher;  // whose `row` is not used
};

const char* topk_loss_cuda(const CudaTopKLoss& call);

// grad *= grad_output * unit, both of them on the device; where the product is 1, grad is not touched.
struct CudaRescale {
  Rescale numbers;
  const float *grad_output = nullptr, *unit = nullptr;  // unit null: 1
  void* stream = nullptr;
};

const char* rescale_cuda(const CudaRescale& call);

template <class Call>
struct CudaTemperature {
  Call numbers;
  const float* temperature = nullptr;
  void* stream = nullptr;
};

const char* softmax_cuda(const CudaTemperature<Softmax>& call);
const char* softmax_backward_cuda(const CudaTemperature<SoftmaxBackward>& call);

struct CudaPairLoss {
  PairLoss numbers;
  const float *weight = nullptr, *count = nullptr;
  float* unit = nullptr;
  double* fault = nullptr;
  float* workspace = nullptr;
  void* stream = nullptr;
};

const char* pair_loss_cuda(const CudaPairLoss& call);

// How many devices there are, or, where they cannot be asked, 0 and why.
int devices_cuda(const char** why);

// The instruction set in use: "avx512_bf16", "avx512", "avx2" or "portable". Choosing one that the processor
// lacks returns false.
const char* instruction_set();
bool use_instruction_set(const char* name);

}  // namespace distil_fast
