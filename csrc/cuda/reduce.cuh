// reduce.cuh: sums and maxima over all threads of a block or a cluster, always in the same order. Knows barriers and
// shuffles; nothing of rows. Next: stage.cuh.
#pragma once

#include "scalar.cuh"

namespace distil_fast::cuda {

struct Sum {
  template <class T>
  DISTIL_FAST_DEVICE static T none(T) {
    return T(0);
  }
  template <class T>
  DISTIL_FAST_DEVICE static T of(T a, T b) {
    return a + b;
  }
};

struct Largest {
  DISTIL_FAST_DEVICE static float none(float) { return minus_infinity; }
  DISTIL_FAST_DEVICE static float of(float a, float b) { return hw::max(a, b); }  // ignores nan
  DISTIL_FAST_DEVICE static double none(double) { return 0.0; }                   // of magnitudes
  DISTIL_FAST_DEVICE static double of(double a, double b) { return a > b ? a : b; }
};

struct Smallest {
  DISTIL_FAST_DEVICE static int64_t none(int64_t) { return INT64_MAX; }
  DISTIL_FAST_DEVICE static int64_t of(int64_t a, int64_t b) { return a < b ? a : b; }
};

// All threads call `combine` equally often. Two places take turns: a block may write the next total while a peer still
// reads this one, but not the one after, because the barrier between them is the cluster's.
template <class T>
class Team {
 public:
  static constexpr int most = 8, warps = 32, place = most * warps + 2 * most, values = 2 * place;

  DISTIL_FAST_DEVICE explicit Team(T* memory) : memory_(memory) {}

  // v becomes the total over the cluster (T = float) or the block, in each thread.
  template <class Op, int n>
  DISTIL_FAST_DEVICE void combine(T (&v)[n]) {
    static_assert(n <= most);
    const int thread = hw::thread(), lane = thread % 32;
    T *of_warps = memory_ + turn_ * place, *of_block = of_warps + most * warps, *of_cluster = of_block + most;
    turn_ ^= 1;
    within_warp<Op>(v);
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < n; ++k) of_warps[k * warps + thread / 32] = v[k];
    }
    hw::sync();
    if (thread < 32) {
#pragma unroll
      for (int k = 0; k < n; ++k) v[k] = lane < hw::threads() / 32 ? of_warps[k * warps + lane] : Op::none(T());
      within_warp<Op>(v);
      if (lane == 0) {
#pragma unroll
        for (int k = 0; k < n; ++k) of_block[k] = v[k];
      }
    }
    const T* total = of_block;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (hw::ranks() > 1) {
        hw::cluster_sync();
        if (thread < n) {
          T all = Op::none(T());
          for (int peer = 0; peer < hw::ranks(); ++peer) all = Op::of(all, hw::load_peer(of_block + thread, peer));
          of_cluster[thread] = all;
        }
        total = of_cluster;
      }
    }
    hw::sync();
#pragma unroll
    for (int k = 0; k < n; ++k) v[k] = total[k];
  }

 private:
  template <class Op, int n>
  DISTIL_FAST_DEVICE static void within_warp(T (&v)[n]) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2)
#pragma unroll
      for (int k = 0; k < n; ++k) v[k] = Op::of(v[k], hw::shuffle_xor(v[k], mask));
  }

  T* memory_;
  int turn_ = 0;
};

}  // namespace distil_fast::cuda
