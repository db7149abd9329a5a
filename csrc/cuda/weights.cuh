// weights.cuh: before the rows, what mask, labels, denominators, reduction and the terms' weights come to, in numbers per
// row; after them, the sum of their values. The twin of cpu/shares.h, which says the conventions; unlike
// it, a value at fault stops nothing: its row is not read, its gradient is 0, its term nan, and `fault` tells of it.
// Knows nothing of logits. Next: weights.cu, the kernels.
#pragma once

#include "reduce.cuh"

namespace distil_fast::cuda {

// A number, or where it stands on the device.
struct Quantity {
  double number = 0.0;
  const float* device = nullptr;

  DISTIL_FAST_DEVICE double value() const { return device ? *device : number; }
};

// The workspace: two numbers, then vectors of [rows].
struct RowWeights {
  static constexpr int vectors = 10, ahead = 4;
  float *soft_weight, *hard_weight;              // of the terms
  float *soft, *hard, *soft_share, *hard_share;  // of each row in the gradient, and in the value
  float* temperature;
  float *soft_value, *hard_value;
  float* fault;         // FaultKind of a row whose teacher is no distribution, else 0,
  double* fault_value;  // and what stood there

  static RowWeights at(float* workspace, int64_t rows) {
    float* v = workspace + ahead;
    return {workspace,
            workspace + 1,
            v,
            v + rows,
            v + 2 * rows,
            v + 3 * rows,
            v + 4 * rows,
            v + 5 * rows,
            v + 6 * rows,
            v + 7 * rows,
            reinterpret_cast<double*>(v + 8 * rows)};
  }
};

struct WeighArgs {
  int64_t rows = 0, cols = 0;
  bool has_soft = false, has_hard = false, mask_is_bool = false, t_squared = false, mean = true;
  const void* mask = nullptr;       // [rows] bool or float; null: every row
  const int64_t* labels = nullptr;  // [rows]
  int64_t ignore_index = 0;
  const float* class_weights = nullptr;  // [cols]: what a row with this label counts; null: 1
  const float* temperatures = nullptr;   // [rows]; null: `temperature` for all
  Quantity temperature, soft_weight, hard_weight, soft_count, hard_count;
  const float* upstream = nullptr;  // [rows]; null: 1
  const float* norms = nullptr;     // [rows]: what a row's gradient is divided by, for the unit; null: its temperature
  bool needs_unit = false;
  double slope = 1.0;  // of what the gradient is taken by, for the unit
  RowWeights out;
  float* unit = nullptr;
  double* fault = nullptr;  // [3]: kind, row, value
};

// weight * value, where a weight of 0 wins.
DISTIL_FAST_DEVICE double weighted(double weight, double value) { return weight == 0.0 ? 0.0 : weight * value; }

// What one row comes to, to where it is summed or, where nothing is reduced, returned.
struct RowValues {
  RowWeights weights;
  float *loss = nullptr, *soft = nullptr, *hard = nullptr;  // [rows]; null: reduced later

  // By one thread, the hard one first; a share of 0 or nan wins over the value.
  DISTIL_FAST_DEVICE void put_hard(int row, float value) const {
    if (hard || !loss) (loss ? hard : weights.hard_value)[row] = of(weights.hard_share[row], value);
  }
  DISTIL_FAST_DEVICE void put_soft(int row, float value) const {
    const float s = of(weights.soft_share[row], value);
    (loss ? soft : weights.soft_value)[row] = s;
    if (!loss) return;
    const double h = hard ? weighted(*weights.hard_weight, hard[row]) : 0.0;
    loss[row] = static_cast<float>(weighted(*weights.soft_weight, s) + h);
  }
  // In the place of put_soft.
  DISTIL_FAST_DEVICE void refuse(int row, FaultKind kind, double value) const {
    weights.fault[row] = static_cast<float>(kind), weights.fault_value[row] = value;
    put_soft(row, __builtin_nanf(""));
  }
  DISTIL_FAST_DEVICE static float of(float share, float value) { return share == 0.0f ? 0.0f : share * value; }
};

struct TotalArgs {
  int64_t rows = 0;
  RowWeights weights;
  float *loss = nullptr, *soft = nullptr, *hard = nullptr;  // one each; hard may be null; loss null: nothing is reduced
  double* fault =
      nullptr;  // tells of the first row that was refused, where the prologue left it empty; null: none can be
};

// Both launch one kernel and return what kept them from it, or null.
const char* launch_weights(const WeighArgs& args, void* stream);
const char* launch_total(const TotalArgs& args, void* stream);

}  // namespace distil_fast::cuda
