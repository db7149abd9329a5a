// threads.h: how work is spread: over rows, or over the columns of each row where there are fewer rows than
// threads. Knows OpenMP, per-thread scratch memory and forks; nothing of what is computed. Next:
// row_loss.cpp.
#pragma once

#include <omp.h>

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace distil_fast {

// How many threads to use for so many elements: torch.set_num_threads' number, 1 where a region would cost
// more than it saves, inside another region, or in a forked child (whose copy of the thread pool has no
// threads).
int threads_for(int64_t elements);

// This thread's scratch memory, at least so large, aligned to a cache line; kept for the next call.
std::byte* scratch(size_t bytes);

// Subnormals count as zero while one of these lives: on some processors each costs over a hundred cycles.
class FlushSubnormals {
#if defined(__x86_64__)
 public:
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
 public:
  FlushSubnormals() {}
#endif
};

// And count as what they are while one of these lives, inside the other's life: where a tiny number is a denominator.
class KeepSubnormals {
#if defined(__x86_64__)
 public:
  KeepSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~KeepSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
 public:
  KeepSubnormals() {}
#endif
};

// A row's blocks, one after another on this thread.
struct Solo {
  template <class F>
  void each(int64_t n, F f) const {
    for (int64_t i = 0; i < n; ++i) f(i);
  }
  bool leads() const { return true; }
  void meet() const {}
};

// A row's blocks shared by all threads of the parallel region that this is called in; they meet at the end.
struct Crew {
  template <class F>
  void each(int64_t n, F f) const {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) f(i);
  }
  bool leads() const { return omp_get_thread_num() == 0; }
  void meet() const {
#pragma omp barrier
  }
};

// run(row, team, scratch) for each row; `scratch_bytes` of memory belong to the row that runs.
template <class Run>
void for_rows(int64_t rows, int64_t cols, size_t scratch_bytes, Run run) {
  const int threads = threads_for(rows * cols);
  if (rows >= threads) {
    const int64_t turn = rows / (8 * threads) < 1 ? 1 : rows / (8 * threads) > 32 ? 32 : rows / (8 * threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      FlushSubnormals flush;
      std::byte* memory = scratch(scratch_bytes);
#pragma omp for schedule(dynamic, turn)
      for (int64_t row = 0; row < rows; ++row) run(row, Solo{}, memory);
    }
  } else {
    std::byte* memory = scratch(scratch_bytes);
#pragma omp parallel num_threads(threads)
    {
      FlushSubnormals flush;
      for (int64_t row = 0; row < rows; ++row) run(row, Crew{}, memory);
    }
  }
}

}  // namespace distil_fast
