// slice.cuh: how a row's columns are dealt out: to the blocks of a cluster in slices, within a slice in groups of 16
// bytes that begin at multiples of 16 bytes, whatever V and the strides are. Only a row's first and last group can be
// partial; they, and arrays that are aligned differently, are read and written value by value. Knows no barriers and no
// mathematics. Next: stage.cuh, which brings slices to shared memory.
#pragma once

#include "scalar.cuh"

namespace distil_fast::cuda {

template <class S>
constexpr int group_size = 16 / static_cast<int>(sizeof(S));

// Local column i stands for column begin + i; group g covers local columns [g W - shift, (g + 1) W - shift).
struct Slice {
  int64_t begin;
  int n, shift, groups;
};

DISTIL_FAST_DEVICE const char* row_at(const Matrix& m, int row, int64_t inner) {
  const auto r = static_cast<unsigned>(row), i = static_cast<unsigned>(inner);  // a launch has fewer than 2^31 rows
  const int64_t offset = r / i * m.outer_stride + r % i * m.row_stride;
  return static_cast<const char*>(m.data) + offset * size_of(m.dtype);
}

// Of a row of S that begins at `row`: how far it is into its first group; this block's slice.
template <class S>
DISTIL_FAST_DEVICE int shift_of(const void* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(S));
}
template <class S>
DISTIL_FAST_DEVICE Slice slice_of(const void* row, int64_t cols) {
  constexpr int W = group_size<S>;
  const int shift = shift_of<S>(row);
  const int64_t all = over(cols + shift, W), each = over(all, hw::ranks());
  const int64_t first = smaller(hw::rank() * each, all), last = smaller(first + each, all);
  const int64_t begin = first ? first * W - shift : 0, end = smaller(last * W - shift, cols);
  return {begin, static_cast<int>(first < last ? end - begin : 0), first ? 0 : shift, static_cast<int>(last - first)};
}

// A slice of one array, of which groups of W are read; T: its dtype. Columns outside of the slice count as masked.
template <class T, int W>
class Source {
 public:
  DISTIL_FAST_DEVICE Source(const void* at, const Slice& slice) : at_(static_cast<const T*>(at)) {
    constexpr int bytes = W * static_cast<int>(sizeof(T)) < 16 ? W * static_cast<int>(sizeof(T)) : 16;
    aligned_ = (reinterpret_cast<uintptr_t>(at) - slice.shift * sizeof(T)) % bytes == 0;
  }
  DISTIL_FAST_DEVICE void load(const Slice& slice, int group, float* to) const {
    const int i = group * W - slice.shift;
    if (aligned_ && i >= 0 && i + W <= slice.n) {
      load_values<W>(at_ + i, to);
    } else {
#pragma unroll
      for (int l = 0; l < W; ++l) to[l] = i + l >= 0 && i + l < slice.n ? widen(at_[i + l]) : minus_infinity;
    }
  }

 private:
  const T* at_;
  bool aligned_;
};

// The same where the dtype is known at run time only.
template <int W>
class Source<void, W> {
 public:
  DISTIL_FAST_DEVICE Source(const void* at, const Slice&, DType dtype) : at_(at), dtype_(dtype) {}
  DISTIL_FAST_DEVICE void load(const Slice& slice, int group, float* to) const {
    if (dtype_ == DType::f32)
      Source<float, W>(at_, slice).load(slice, group, to);
    else if (dtype_ == DType::f16)
      Source<Half, W>(at_, slice).load(slice, group, to);
    else
      Source<BFloat16, W>(at_, slice).load(slice, group, to);
  }

 private:
  const void* at_;
  DType dtype_;
};

// A slice as stage.cuh leaves it in shared memory: groups are whole and aligned.
template <class T, int W>
class Staged {
 public:
  DISTIL_FAST_DEVICE Staged(const void* at, const Slice& slice) : at_(static_cast<const T*>(at) - slice.shift) {}
  DISTIL_FAST_DEVICE void load(const Slice&, int group, float* to) const { load_values<W>(at_ + group * W, to); }

 private:
  const T* at_;
};

// A slice of the array that is written. Rows are sliced by its own alignment, so its whole groups are aligned; without
// the question ptxas 13.0 spills in the kernels of sm_90a.
template <class S>
class Sink {
 public:
  static constexpr int W = group_size<S>;
  DISTIL_FAST_DEVICE Sink(void* at, const Slice& slice) : at_(static_cast<S*>(at)) {
    aligned_ = (reinterpret_cast<uintptr_t>(at) - slice.shift * sizeof(S)) % 16 == 0;
  }
  DISTIL_FAST_DEVICE void store(const Slice& slice, int group, const float* from) const {
    const int i = group * W - slice.shift;
    if (aligned_ && i >= 0 && i + W <= slice.n) {
      store_values(from, at_ + i);
    } else {
#pragma unroll
      for (int l = 0; l < W; ++l)
        if (i + l >= 0 && i + l < slice.n) narrow(from[l], at_ + i + l);
    }
  }
  DISTIL_FAST_DEVICE void put(int i, float value) const { narrow(value, at_ + i); }
  DISTIL_FAST_DEVICE void fill(const Slice& slice, float value) const {
    float values[W];
#pragma unroll
    for (int l = 0; l < W; ++l) values[l] = value;
    for (int g = hw::thread(); g < slice.groups; g += hw::threads()) store(slice, g, values);
  }

 private:
  S* at_;
  bool aligned_;
};

}  // namespace distil_fast::cuda
