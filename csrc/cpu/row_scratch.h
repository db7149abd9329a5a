// row_scratch.h: a row in the middle of its sweeps: its logits as they are read, its blocks of columns, and the memory
// between one sweep and the next. Knows no weights, no labels and no divergence. Next: row_loss.cpp, hard_term.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "dispatch.h"

namespace distil_fast {

constexpr int64_t block_cols = 2048;

inline int64_t blocks_of(int64_t cols) { return (cols + block_cols - 1) / block_cols; }
inline int64_t block_start(int64_t b) { return b * block_cols; }
inline int64_t block_size(int64_t cols, int64_t b) { return std::min(block_cols, cols - block_start(b)); }

// One model's row of logits: in the caller's memory, or prepared, in scratch. data null: the model has no part in it.
struct Logits {
  const char* data = nullptr;
  int dtype = 0;  // its index in the sweeps' tables
  int64_t size = 0;

  const char* at(int64_t j) const { return data + j * size; }
};

// What a row's blocks come to.
struct Row {
  double ref_s, ref_t;   // the largest of the blocks' references
  double z_s, z_t, z_h;  // sums of exponentials relative to them
  double rho;            // lse_s - lse_t at temperature T
  double mass;           // of a teacher that gives probabilities: their sum
};

// exp((block's reference - row's) / T); nearly all blocks share the row's
inline double fade(double block_ref, double row_ref, double t) {
  return block_ref == row_ref ? 1.0 : std::exp((block_ref - row_ref) / t);
}

// A row's scratch: exponentials of student and teacher, differences that become g, the prepared logits of either model
// where `prepared` counts them, and the blocks' scalars. Once g is known, et is free for the gradient on its way.
template <class Real>
struct Scratch {
  Real *es, *et, *g, *prepared;
  Block<Real>* blocks;
  double *f_sum, *g_sum;

  static size_t bytes(int64_t cols, int prepared) {
    return (3 + prepared) * padded(cols) * sizeof(Real) + blocks_of(cols) * (sizeof(Block<Real>) + 2 * sizeof(double)) +
           64;
  }
  Scratch(std::byte* memory, int64_t cols, int prepared_rows) {
    es = reinterpret_cast<Real*>(memory);
    et = es + padded(cols);
    g = et + padded(cols);
    prepared = g + padded(cols);
    f_sum = reinterpret_cast<double*>(prepared + prepared_rows * padded(cols));
    g_sum = f_sum + blocks_of(cols);
    blocks = reinterpret_cast<Block<Real>*>(g_sum + blocks_of(cols));
  }
  static int64_t padded(int64_t cols) { return (cols + 15) / 16 * 16; }
};

}  // namespace distil_fast
