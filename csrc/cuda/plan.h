// plan.h: which shape of launch a row gets: threads, cluster, stages in shared memory. One table for all kernels; the
// reasons are beside it. Host code; knows no kernel. Next: row_loss.cu, softmax.cu, pair_loss.cu, which launch.
#pragma once

#include "stage.cuh"
#include "weights.cuh"

namespace distil_fast::cuda {

struct Shape {
  int major;             // needs this compute capability
  int threads, cluster;  // of a block; blocks
};

// The first that a row fits into. A multiprocessor's registers hold 16384 kept columns: two blocks of 256 threads, one of
// which computes while the other waits for memory or its peers, down to 512 threads where the row needs them all. A
// cluster of 16 is the most that sm_90 has.
#ifndef DISTIL_FAST_SHAPES
#define DISTIL_FAST_SHAPES \
  {8, 128, 1}, {8, 256, 1}, {9, 256, 2}, {9, 256, 4}, {9, 256, 8}, {8, 512, 1}, {9, 512, 8}, {9, 512, 16}
#endif
inline constexpr Shape shapes[] = {DISTIL_FAST_SHAPES};

struct Plan {
  hw::Launch launch;
  Stages stages;
};

// A row of `cols` values in groups of W, as one or two arrays with these sizes (0: there is none). `columns`: how many a
// thread can keep; 0: it keeps none, and rows that fit nowhere are read from global memory again and again.
inline bool plan_rows(const hw::Device& device, int64_t cols, int W, int first_size, int second_size, int columns,
                      void* stream, Plan* plan) {
  for (const Shape& s : shapes) {
    if (device.major < s.major || (s.cluster > 8 && device.major != 9 && device.major != 10)) continue;
    const int64_t groups = over(over(cols + W - 1, W), s.cluster);
    if (columns && groups * W > static_cast<int64_t>(s.threads) * columns) continue;
    const int64_t second = over(place_for(groups, W, first_size), 128) * 128;
    const int64_t bytes = second + over(place_for(groups, W, second_size), 128) * 128;
    const int64_t room = device.shared_per_block * static_cast<int64_t>(s.threads) / row_threads;
    const int count = stages_at + 2 * bytes <= room ? 2 : 1;
    if (stages_at + count * bytes > room) continue;
    plan->stages = {count, static_cast<int>(second), static_cast<int>(bytes)};
    plan->launch = {0, s.threads, s.cluster, static_cast<int>(stages_at + count * bytes), stream};
    return true;
  }
  plan->stages = {};
  plan->launch = {0, row_threads, 1, stages_at, stream};
  return columns == 0;
}

// As many clusters as run at the same time: each goes on to further rows.
template <class Args>
const char* launch_rows(void (*kernel)(Args), Plan plan, Args args) {
  args.stages = plan.stages;
  plan.launch.blocks = plan.launch.cluster;
  const int64_t most = hw::Kernel<Args>(kernel, plan.launch).resident();
  plan.launch.blocks = static_cast<int>(smaller(args.rows, most)) * plan.launch.cluster;
  return hw::Kernel<Args>(kernel, plan.launch).launch(args);
}

// Why a call cannot be served; null: it can.
inline const char* too_large(int64_t rows, int64_t cols) {
  if (rows > (1 << 30)) return "more than 2^30 rows in one call";
  return cols > (1 << 30) ? "more than 2^30 columns in a row" : nullptr;
}

}  // namespace distil_fast::cuda
