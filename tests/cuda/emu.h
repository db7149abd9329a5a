// emu.h: a GPU on the CPU, as far as csrc/cuda/hw.cuh asks for one: blocks, warps, clusters, shared memory (poisoned with
// nan), asynchronous copies. Two engines for a cluster's threads: fibres (quick; EMU_SEED shuffles their order) or, with
// EMU_THREADS, one std::thread each, for ThreadSanitizer. It knows no kernel, and no time: warps run their lanes one by
// one, and memory is sequentially consistent. Next: emu_engine.h, the engines; csrc/cuda/hw.cuh, what is emulated.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define DISTIL_FAST_DEVICE inline
#define DISTIL_FAST_FN inline
#define DISTIL_FAST_BOTH constexpr
#define DISTIL_FAST_KERNEL(max_threads, min_blocks) inline void
#define DISTIL_FAST_ARGS(Type) const Type

#include "cpu/table.h"
#include "emu_engine.h"

namespace distil_fast::emulated {
#include "cpu/bits.h"
#include "cpu/vec_portable.h"
}  // namespace distil_fast::emulated

namespace distil_fast::hw {

using emulated::me;

inline int thread() { return me().thread; }
inline int threads() { return me().block->threads; }
inline int block() { return me().block->id; }
inline int blocks() { return me().block->grid; }
inline int rank() { return me().block->rank; }
inline int ranks() { return static_cast<int>(me().block->cluster->blocks.size()); }
inline void sync() { me().block->barrier.meet(); }
inline void cluster_sync() { me().block->cluster->barrier.meet(); }
inline unsigned char* shared() { return me().block->shared(); }

template <class T>
inline T shuffle_xor(T value, int mask) {
  emulated::Warp& warp = *me().block->warps[me().thread / 32];
  const int lane = me().thread % 32;
  std::memcpy(&warp.slots[lane], &value, sizeof(T));
  warp.barrier.meet();
  std::memcpy(&value, &warp.slots[lane ^ mask], sizeof(T));
  warp.barrier.meet();
  return value;
}

inline uint32_t atomic_or(uint32_t* at, uint32_t bits) { return std::atomic_ref<uint32_t>(*at).fetch_or(bits); }

inline float load_peer(const float* mine, int peer) {
  const auto offset = reinterpret_cast<const unsigned char*>(mine) - shared();
  float value;
  std::memcpy(&value, me().block->cluster->blocks[peer]->shared() + offset, sizeof(value));
  return value;
}

inline void aligned(const void* p, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) emulated::fail("misaligned address");
}

// Copies happen at the latest moment that the device allows, in `wait`, or with EMU_EAGER at the earliest, in `load`.
class Arrival {
 public:
  void init() { state_ = me().block->new_copies(); }
  void load(void* to, const void* from, int bytes) {
    if (thread() != 0) return;
    aligned(to, 16), aligned(from, 16);
    if (bytes % 16 || bytes < 0) emulated::fail("an asynchronous copy of no multiple of 16 bytes");
    state_->load(to, from, bytes);
  }
  void commit() {
    if (thread() == 0) state_->commit();
  }
  void wait(int parity) { state_->wait(parity); }
  static void release() { sync(); }

 private:
  emulated::Copies* state_;
};

struct alignas(16) Bits16 {
  uint32_t word[4];
};
struct alignas(8) Bits8 {
  uint32_t word[2];
};

template <class Bits>
inline Bits load_bits(const void* p) {
  aligned(p, sizeof(Bits));
  Bits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}
inline Bits16 load16(const void* p) { return load_bits<Bits16>(p); }
inline Bits8 load8(const void* p) { return load_bits<Bits8>(p); }
inline void store16(void* p, Bits16 x) {
  aligned(p, 16);
  std::memcpy(p, &x, sizeof(x));
}

inline uint32_t bits_of(float x) { return emulated::bit_cast<uint32_t>(x); }
inline float float_of(uint32_t bits) { return emulated::bit_cast<float>(bits); }
inline float widen_half(uint16_t bits) { return emulated::widen(distil_fast::Half{bits}); }
template <class T>
inline uint16_t narrowed(float x) {
  T y;
  emulated::narrow(x, &y);
  return y.bits;
}
inline uint16_t narrow_half(float x) { return narrowed<distil_fast::Half>(x); }
inline uint16_t narrow_bfloat16(float x) { return narrowed<distil_fast::BFloat16>(x); }
inline uint32_t narrow_half2(float low, float high) { return narrow_half(low) | uint32_t(narrow_half(high)) << 16; }
inline uint32_t narrow_bfloat16x2(float low, float high) {
  return narrow_bfloat16(low) | uint32_t(narrow_bfloat16(high)) << 16;
}

// As inexact as the device's: 2 ulp, and no subnormal results.
inline float exp2(float x) {
  const float y = std::exp2(x);
  if (y < std::numeric_limits<float>::min()) return 0.0f;
  return std::isfinite(y) && y != 1.0f ? y * (1.0f + 0x1p-23f) : y;
}
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float log(float x) { return std::log(x); }
inline float log1p(float x) { return std::log1p(x); }
inline float sqrt(float x) { return std::sqrt(x); }
inline float max(float a, float b) { return std::fmax(a, b); }

struct Device {
  int major, shared_per_block, multiprocessors;
};

inline Device& the_device() {
  static Device device{9, 227 << 10, 3};
  return device;
}
inline const char* device(Device* out) {
  *out = the_device();
  return nullptr;
}

inline int devices(const char** why) {
  *why = "emulated";
  return 0;
}

struct Launch {
  int blocks, threads, cluster, shared;
  void* stream;
};

template <class... Args>
class Kernel {
 public:
  Kernel(void (*function)(Args...), const Launch& launch) : function_(function), launch_(launch) {}
  const char* launch(const Args&... args) {
    if (launch_.shared > the_device().shared_per_block) return "too much shared memory";
    if (launch_.threads < 32 || launch_.threads > 1024 || launch_.threads % 32) return "no such block";
    if (launch_.blocks < 1 || launch_.blocks % launch_.cluster) return "no such grid";
    if (launch_.cluster > (the_device().major < 9 ? 1 : 16)) return "no such cluster";
    return emulated::run(launch_.blocks, launch_.threads, launch_.cluster, launch_.shared, [&] { function_(args...); });
  }
  int64_t resident() const { return the_device().multiprocessors; }

 private:
  void (*function_)(Args...);
  Launch launch_;
};

}  // namespace distil_fast::hw
