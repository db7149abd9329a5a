// threads.cpp: the parts of threads.h that exist once: the number of threads, the scratch memory, the fork
// handler.
#include "threads.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace distil_fast {
namespace {

constexpr int64_t worth_a_region = 32768;  // elements: about 10 us of work, where a region costs 1 to 5

std::atomic<bool> forked{false};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Free {
  void operator()(std::byte* p) const { std::free(p); }
};
thread_local std::unique_ptr<std::byte, Free> memory;
thread_local size_t capacity = 0;

}  // namespace

int threads_for(int64_t elements) {
  if (elements < worth_a_region || forked || omp_in_parallel()) return 1;
  return omp_get_max_threads();
}

std::byte* scratch(size_t bytes) {
  if (bytes > capacity) {
    memory.reset();
    capacity = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    memory.reset(static_cast<std::byte*>(std::aligned_alloc(4096, rounded)));
    if (!memory) throw std::bad_alloc();
    capacity = rounded;
  }
  return memory.get();
}

}  // namespace distil_fast
