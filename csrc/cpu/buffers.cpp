// buffers.cpp: the list of free blocks behind buffers.h.
#include "buffers.h"

#include <sys/mman.h>

#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <new>

namespace distil_fast {
namespace {

constexpr size_t huge_page = size_t(2) << 20;

struct Pool {
  std::mutex mutex;
  std::multimap<size_t, void*> free;  // by size
  std::map<void*, size_t> in_use;
};

Pool& pool() {
  static Pool* pool = new Pool;  // never destroyed: tensors may outlive static objects
  return *pool;
}

void* map_aligned(size_t size) {
  void* raw = mmap(nullptr, size + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  const uintptr_t from = reinterpret_cast<uintptr_t>(raw), start = (from + huge_page - 1) / huge_page * huge_page;
  if (start > from) munmap(raw, start - from);
  if (const size_t rest = from + huge_page - start) munmap(reinterpret_cast<void*>(start + size), rest);
  void* block = reinterpret_cast<void*>(start);
#ifdef MADV_HUGEPAGE
  madvise(block, size, MADV_HUGEPAGE);
#endif
  return block;
}

}  // namespace

void* acquire_buffer(size_t bytes) {
  const size_t size = (bytes + huge_page - 1) / huge_page * huge_page;
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  void* block;
  if (auto found = p.free.lower_bound(size); found != p.free.end()) {
    found = std::prev(p.free.upper_bound(found->first));  // of that size, the one whose memory was used last
    block = found->second;
    p.in_use[block] = found->first;
    p.free.erase(found);
    return block;
  }
  for (auto& [old_size, old] : p.free) munmap(old, old_size);
  p.free.clear();
  block = map_aligned(size);
  p.in_use[block] = size;
  return block;
}

void release_buffer(void* buffer) {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  auto found = p.in_use.find(buffer);
#ifdef MADV_FREE
  madvise(buffer, found->second, MADV_FREE);
#endif
  p.free.emplace(found->second, buffer);
  p.in_use.erase(found);
}

}  // namespace distil_fast
