// stage.cuh: walks a cluster over its rows, while the rows to come are on their way to shared memory. What a row needs
// and what is done with it is a Body's affair:
//   Wanted wanted(row)                            where this block's slices lie in global memory
//   void run(row, slice, first, second, team)     with them at `first` and `second`
//   staged                                        whether they always come to shared memory
// Knows asynchronous copies, stages and parities; no dtype and no mathematics. Next: row_loss.cuh, softmax.cuh, pair.cuh.
#pragma once

#include "reduce.cuh"
#include "slice.cuh"

namespace distil_fast::cuda {

// count: 0 leaves rows where they are, 1 loads each when its turn comes, 2 a row ahead.
struct Stages {
  int count = 0;
  int second = 0;  // bytes from the first array's place to the second's
  int bytes = 0;   // of both
};

struct Wanted {
  Slice slice;
  const char *first, *second;  // of this block's slices; null: not read
  DType first_dtype, second_dtype;
};

constexpr int row_threads = 512;  // of a block, at most

// Shared memory: the arrivals, what a team needs, the stages.
constexpr int team_at = 64, stages_at = (team_at + Team<float>::values * 4 + 127) / 128 * 128;

// Bytes that `groups` groups of W values need in shared memory.
DISTIL_FAST_BOTH int64_t place_for(int64_t groups, int W, int size) { return groups * W * size; }

// A slice of values of Bits to shared memory, where its groups are aligned as those of the frame are. By asynchronous
// copies where they are aligned so in global memory too; columns that groups have beyond the slice count as masked.
template <class Bits>
DISTIL_FAST_DEVICE void bring(hw::Arrival& arrival, unsigned char* place, const char* from, const Slice& slice, int W,
                              Bits masked) {
  constexpr int size = sizeof(Bits);
  Bits* const to = reinterpret_cast<Bits*>(place) + slice.shift;
  const Bits* const values = reinterpret_cast<const Bits*>(from);
  const int before = static_cast<int>(-reinterpret_cast<uintptr_t>(from) % 16) / size;
  int head = slice.n, tail = slice.n;  // [head, tail) is copied asynchronously
  if (before < slice.n && (reinterpret_cast<uintptr_t>(from) - slice.shift * size) % 16 == 0) {
    head = before;
    tail = head + (slice.n - head) * size / 16 * 16 / size;
    arrival.load(to + head, values + head, (tail - head) * size);
  }
  for (int i = hw::thread(); i < head; i += hw::threads()) to[i] = values[i];
  for (int i = tail + hw::thread(); i < slice.n; i += hw::threads()) to[i] = values[i];
  const int thread = hw::thread(), end = slice.groups * W - slice.shift;
  if (thread < slice.shift) to[thread - slice.shift] = masked;
  if (thread < end - slice.n) to[slice.n + thread] = masked;
}

template <int W, class Body>
DISTIL_FAST_DEVICE void for_rows(const Body& body, int rows, const Stages& stages) {
  unsigned char* memory = hw::shared();
  hw::Arrival* arrivals = reinterpret_cast<hw::Arrival*>(memory);
  Team<float> team(reinterpret_cast<float*>(memory + team_at));
  auto stage = [&](int s) { return memory + stages_at + s * stages.bytes; };
  auto bring_one = [&](int s, int offset, const char* from, DType dtype, const Slice& slice) {
    unsigned char* place = stage(s) + offset;
    if (dtype == DType::f32)
      bring<uint32_t>(arrivals[s], place, from, slice, W, 0xFF800000u);
    else
      bring<uint16_t>(arrivals[s], place, from, slice, W, dtype == DType::f16 ? 0xFC00u : 0xFF80u);
  };
  auto fetch = [&](int row, int s) {
    const Wanted w = body.wanted(row);
    if (w.first) bring_one(s, 0, w.first, w.first_dtype, w.slice);
    if (w.second) bring_one(s, stages.second, w.second, w.second_dtype, w.slice);
    arrivals[s].commit();
  };

  const int count = stages.count;
  auto step = [] { return hw::blocks() / hw::ranks(); };  // asked for anew: kept, it would cost a register
  auto ahead = [&] { return count == 2 ? step() : 0; };
  if (hw::thread() < count) arrivals[hw::thread()].init();
  hw::sync();
  int turn = count == 2 ? -1 : 0;  // of the row that is worked on
  for (int row = hw::block() / hw::ranks() - ahead(); row < rows; row += step(), ++turn) {
    if (count && row + ahead() < rows) fetch(row + ahead(), (turn + count - 1) % count);
    if (turn < 0) continue;
    const Wanted w = body.wanted(row);
    const int s = count == 2 ? turn % 2 : 0;
    const void *first = stage(s) + w.slice.shift * size_of(w.first_dtype),
               *second = stage(s) + stages.second + w.slice.shift * size_of(w.second_dtype);
    if constexpr (!Body::staged)
      if (!count) first = w.first, second = w.second;
    if (count) {
      arrivals[s].wait(count == 2 ? turn / 2 % 2 : turn % 2);
      hw::sync();
    }
    body.run(row, w.slice, first, second, team);
    if (count) hw::Arrival::release();
  }
  if (hw::ranks() > 1) hw::cluster_sync();  // a block's shared memory outlives what its peers read there
}

}  // namespace distil_fast::cuda
