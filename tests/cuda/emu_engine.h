// emu_engine.h: runs a cluster's threads side by side, as fibres or as std::threads, and lets them meet. Knows nothing of
// what CUDA calls these things, or of numbers. Next: emu.h.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <ucontext.h>

namespace distil_fast::emulated {

struct Block;

struct Me {
  int thread = 0;
  Block* block = nullptr;
};

inline std::string& failure() {
  static std::string message;
  return message;
}
inline void fail(const char* message) {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  if (failure().empty()) failure() = message;
}

#ifdef EMU_THREADS

inline Me& me() {
  thread_local Me context;
  return context;
}
inline void yield() { std::this_thread::yield(); }
inline void progress() {}

class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void meet() {
    std::unique_lock<std::mutex> lock(mutex_);
    const long generation = generation_;
    if (++arrived_ == size_) {
      arrived_ = 0, ++generation_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return generation_ != generation; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  int size_, arrived_ = 0;
  long generation_ = 0;
};

#else

// Fibres take turns in a fixed order; a whole round in which nothing moved is a deadlock.
class Fibres {
 public:
  static Fibres*& current() {
    static Fibres* fibres = nullptr;
    return fibres;
  }
  Me& now() { return *mes_[at_]; }

  void run(std::vector<Me>& mes, const std::function<void()>& body) {
    constexpr size_t stack = 256 << 10;
    body_ = &body;
    for (Me& m : mes) mes_.push_back(&m);
    if (const char* seed = std::getenv("EMU_SEED")) {
      std::mt19937 random(static_cast<unsigned>(std::atoi(seed)));
      std::shuffle(mes_.begin(), mes_.end(), random);
    }
    contexts_.resize(mes.size());
    done_.assign(mes.size(), false);
    std::unique_ptr<char[]> stacks(new char[stack * mes.size()]);
    for (size_t i = 0; i < mes.size(); ++i) {
      getcontext(&contexts_[i]);
      contexts_[i].uc_stack.ss_sp = stacks.get() + i * stack;
      contexts_[i].uc_stack.ss_size = stack;
      contexts_[i].uc_link = nullptr;
      makecontext(&contexts_[i], &Fibres::enter, 0);
    }
    left_ = mes.size(), current() = this;
    swapcontext(&home_, &contexts_[0]);
    current() = nullptr;
  }
  void yield() {
    const size_t from = at_;
    if (++idle_ > 2 * contexts_.size()) {
      fail("deadlock: some threads wait for others that never come");
      swapcontext(&contexts_[from], &home_);  // never to return: the other fibres are dropped
    }
    next();
    if (at_ != from) swapcontext(&contexts_[from], &contexts_[at_]);
  }
  void progress() { idle_ = 0; }

 private:
  void next() {
    do at_ = (at_ + 1) % contexts_.size();
    while (done_[at_]);
  }
  static void enter() {
    Fibres& self = *current();
    (*self.body_)();
    self.done_[self.at_] = true;
    self.progress();
    if (--self.left_ == 0) setcontext(&self.home_);
    self.next();
    setcontext(&self.contexts_[self.at_]);
  }

  const std::function<void()>* body_ = nullptr;
  std::vector<Me*> mes_;
  std::vector<ucontext_t> contexts_;
  std::vector<bool> done_;
  ucontext_t home_;
  size_t at_ = 0, left_ = 0, idle_ = 0;
};

inline Me& me() { return Fibres::current()->now(); }
inline void yield() { Fibres::current()->yield(); }
inline void progress() { Fibres::current()->progress(); }

class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void meet() {
    progress();
    const long generation = generation_;
    if (++arrived_ == size_) {
      arrived_ = 0, ++generation_;
    } else {
      while (generation_ == generation) yield();
    }
  }

 private:
  int size_, arrived_ = 0;
  long generation_ = 0;
};

#endif

struct Warp {
  Barrier barrier{32};
  uint64_t slots[32];
};

// Asynchronous copies of one stage: phases end one after another.
class Copies {
 public:
  void load(void* to, const void* from, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (std::getenv("EMU_EAGER"))
      std::memcpy(to, from, bytes);
    else
      pending_.push_back({to, from, bytes});
  }
  void commit() {
    std::lock_guard<std::mutex> lock(mutex_);
    ++phases_;
    progress();
  }
  void wait(int parity) {
    while (!arrived(parity)) yield();
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };
  bool arrived(int parity) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (phases_ % 2 == parity) return false;
    for (const Copy& c : pending_) std::memcpy(c.to, c.from, c.bytes);
    pending_.clear();
    return true;
  }
  std::mutex mutex_;
  std::vector<Copy> pending_;
  long phases_ = 0;
};

struct Cluster;

struct Block {
  static constexpr size_t fence = 128;
  static constexpr unsigned char poison = 0xFF;  // nan in every floating-point type

  Block(Cluster* cluster, int id, int grid, int rank, int threads, size_t bytes)
      : cluster(cluster), id(id), grid(grid), rank(rank), threads(threads), barrier(threads), size(bytes) {
    memory.reset(new unsigned char[bytes + fence]);
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    start = (fence - address % fence) % fence;
    std::memset(memory.get(), poison, bytes + fence);
    for (int w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Warp>());
  }
  ~Block() {
    for (size_t i = 0; i < size + fence; ++i)
      if ((i < start || i >= start + size) && memory[i] != poison) fail("wrote outside of shared memory");
  }
  unsigned char* shared() { return memory.get() + start; }
  void leave() {  // by each thread at its end: nobody may count on this block's memory once all have left
    if (++left == threads) std::memset(shared(), poison, size);
  }
  Copies* new_copies() {
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    copies.push_back(std::make_unique<Copies>());
    return copies.back().get();
  }

  Cluster* cluster;
  int id, grid, rank, threads;
  std::atomic<int> left{0};
  Barrier barrier;
  size_t size, start;
  std::unique_ptr<unsigned char[]> memory;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Copies>> copies;
};

struct Cluster {
  explicit Cluster(int threads) : barrier(threads) {}
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

inline const char* run(int blocks, int threads, int size, size_t shared, const std::function<void()>& kernel) {
  failure().clear();
  const std::function<void()> body = [&kernel] {
    kernel();
    me().block->leave();
  };
  for (int first = 0; first < blocks; first += size) {
    Cluster cluster(size * threads);
    std::vector<Me> mes;
    for (int r = 0; r < size; ++r) {
      cluster.blocks.push_back(std::make_unique<Block>(&cluster, first + r, blocks, r, threads, shared));
      for (int t = 0; t < threads; ++t) mes.push_back({t, cluster.blocks.back().get()});
    }
#ifdef EMU_THREADS
    std::vector<std::thread> running;
    for (const Me& m : mes)
      running.emplace_back([&body, m] {
        me() = m;
        body();
      });
    for (std::thread& t : running) t.join();
#else
    Fibres().run(mes, body);
#endif
    if (!failure().empty()) break;
  }
  static std::string said;
  said = failure();
  return said.empty() ? nullptr : said.c_str();
}

}  // namespace distil_fast::emulated
