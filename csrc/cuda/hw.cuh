// hw.cuh: what the kernels ask of the hardware, and nothing else: who am I, barriers, shuffles, shared memory, thread-
// block clusters, asynchronous copies, 16-byte accesses, conversions, launching. The one seam between kernels and
// machine: compiled by g++ with DISTIL_FAST_EMULATED, the same names come from an emulation of the device on the CPU
// (tests/cuda/emu.h). Knows no mathematics. Next: slice.cuh, reduce.cuh, stage.cuh, which are built on it.
#pragma once

#include <cstdint>

#ifdef DISTIL_FAST_EMULATED
#include "emu.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#define DISTIL_FAST_DEVICE __device__ __forceinline__
#define DISTIL_FAST_FN __device__ __forceinline__
#define DISTIL_FAST_BOTH __host__ __device__ constexpr
#define DISTIL_FAST_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
#define DISTIL_FAST_ARGS(Type) const __grid_constant__ Type

namespace distil_fast::hw {

DISTIL_FAST_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
DISTIL_FAST_DEVICE int threads() { return static_cast<int>(blockDim.x); }
DISTIL_FAST_DEVICE int block() { return static_cast<int>(blockIdx.x); }
DISTIL_FAST_DEVICE int blocks() { return static_cast<int>(gridDim.x); }
DISTIL_FAST_DEVICE void sync() { __syncthreads(); }

DISTIL_FAST_DEVICE unsigned char* shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

template <class T>
DISTIL_FAST_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

DISTIL_FAST_DEVICE uint32_t atomic_or(uint32_t* at, uint32_t bits) { return atomicOr(at, bits); }

// ---- clusters: a block is alone in one before sm_90

DISTIL_FAST_DEVICE int rank() {
#if __CUDA_ARCH__ >= 900
  unsigned value;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
  return static_cast<int>(value);
#else
  return 0;
#endif
}

DISTIL_FAST_DEVICE int ranks() {
#if __CUDA_ARCH__ >= 900
  unsigned value;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(value));
  return static_cast<int>(value);
#else
  return 1;
#endif
}

DISTIL_FAST_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#endif
}

// A float of a peer's shared memory, at the place that it has in one's own.
DISTIL_FAST_DEVICE float load_peer(const float* mine, int peer) {
#if __CUDA_ARCH__ >= 900
  unsigned own = static_cast<unsigned>(__cvta_generic_to_shared(mine)), theirs;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(own), "r"(peer));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(theirs) : "memory");
  return value;
#else
  return *mine;
#endif
}

// ---- asynchronous copies from global to shared memory, of multiples of 16 aligned bytes. All threads call load and
// wait; between the last read of a place and the next load to it lies `release`, and a sync follows each wait.

class Arrival {
 public:
  DISTIL_FAST_DEVICE void init() {  // by one thread, a sync before first use
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&barrier_)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  }

  DISTIL_FAST_DEVICE void load(void* to, const void* from, int bytes) {
#if __CUDA_ARCH__ >= 900
    if (thread() != 0 || bytes == 0) return;
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(address(&barrier_)), "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(to)),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(address(&barrier_))
        : "memory");
#else
    for (int at = 16 * thread(); at < bytes; at += 16 * threads())
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(static_cast<char*>(to) + at)),
                   "l"(__cvta_generic_to_global(static_cast<const char*>(from) + at))
                   : "memory");
#endif
  }

  DISTIL_FAST_DEVICE void commit() {  // after the loads of one phase, if any
#if __CUDA_ARCH__ >= 900
    if (thread() == 0)
      asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(address(&barrier_)) : "memory");
#endif
  }

  DISTIL_FAST_DEVICE void wait(int parity) {  // for a phase: they alternate between 0 and 1
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(address(&barrier_)),
        "r"(parity)
        : "memory");
#else
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  }

  DISTIL_FAST_DEVICE static void release() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    sync();
  }

 private:
  DISTIL_FAST_DEVICE static unsigned address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
  }
  uint64_t barrier_;
};

// ---- memory and conversions

struct alignas(16) Bits16 {
  uint32_t word[4];
};
struct alignas(8) Bits8 {
  uint32_t word[2];
};

DISTIL_FAST_DEVICE Bits16 load16(const void* p) { return *static_cast<const Bits16*>(p); }
DISTIL_FAST_DEVICE Bits8 load8(const void* p) { return *static_cast<const Bits8*>(p); }
DISTIL_FAST_DEVICE void store16(void* p, Bits16 x) {  // streaming: nobody reads it soon
  __stcs(static_cast<uint4*>(p), make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]));
}

DISTIL_FAST_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
DISTIL_FAST_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
DISTIL_FAST_DEVICE float widen_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
DISTIL_FAST_DEVICE uint16_t narrow_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
DISTIL_FAST_DEVICE uint16_t narrow_bfloat16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
DISTIL_FAST_DEVICE uint32_t narrow_half2(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
DISTIL_FAST_DEVICE uint32_t narrow_bfloat16x2(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// ---- functions: 2^x to 2 ulp, 0 below 2^-126; the rest are the toolkit's

DISTIL_FAST_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DISTIL_FAST_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DISTIL_FAST_DEVICE float log(float x) { return logf(x); }
DISTIL_FAST_DEVICE float log1p(float x) { return log1pf(x); }
DISTIL_FAST_DEVICE float sqrt(float x) { return __fsqrt_rn(x); }
DISTIL_FAST_DEVICE float max(float a, float b) { return fmaxf(a, b); }

// ---- the host's side

struct Device {
  int major;             // compute capability
  int shared_per_block;  // bytes a block may use
  int multiprocessors;
};

struct Launch {
  int blocks;  // a multiple of `cluster`
  int threads, cluster, shared;
  void* stream;
};

inline const char* said(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

inline const char* device(Device* out) {
  int id = 0;
  if (cudaError_t error = cudaGetDevice(&id); error != cudaSuccess) return cudaGetErrorString(error);
  cudaDeviceGetAttribute(&out->major, cudaDevAttrComputeCapabilityMajor, id);
  cudaDeviceGetAttribute(&out->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  return said(cudaDeviceGetAttribute(&out->multiprocessors, cudaDevAttrMultiProcessorCount, id));
}

inline int devices(const char** why) {
  int count = 0;  // which a failing call leaves as it is
  *why = said(cudaGetDeviceCount(&count));
  return *why ? 0 : count;
}

template <class... Args>
class Kernel {
 public:
  Kernel(void (*function)(Args...), const Launch& launch) : function_(function) {
    config_.gridDim = dim3(static_cast<unsigned>(launch.blocks));
    config_.blockDim = dim3(launch.threads);
    config_.dynamicSmemBytes = launch.shared;
    config_.stream = static_cast<cudaStream_t>(launch.stream);
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
    config_.attrs = &cluster_;
    config_.numAttrs = launch.cluster > 1;
    cudaFuncSetAttribute(function_, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared);
    if (launch.cluster > 8) cudaFuncSetAttribute(function_, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  Kernel(const Kernel&) = delete;

  const char* launch(const Args&... args) {
    // an error that some earlier call left behind is not this one's
    cudaGetLastError();
    return said(cudaLaunchKernelEx(&config_, function_, args...));
  }

  // How many clusters run at the same time on the whole device: asked once per kernel and shape.
  int64_t resident() {
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, unsigned, unsigned, size_t>, int> known;
    int id = 0;
    cudaGetDevice(&id);
    std::lock_guard<std::mutex> lock(mutex);
    auto [entry, fresh] = known.try_emplace({id, reinterpret_cast<const void*>(function_), config_.blockDim.x,
                                             cluster_.val.clusterDim.x, config_.dynamicSmemBytes});
    if (fresh) entry->second = count(id);
    return entry->second > 0 ? entry->second : 1;
  }

 private:
  int count(int id) {
    int found = 0;
    if (config_.numAttrs) {
      cudaOccupancyMaxActiveClusters(&found, function_, &config_);
    } else {
      int of_device = 0;
      cudaDeviceGetAttribute(&of_device, cudaDevAttrMultiProcessorCount, id);
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, function_, static_cast<int>(config_.blockDim.x),
                                                    config_.dynamicSmemBytes);
      found *= of_device;
    }
    return found;
  }

  void (*function_)(Args...);
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute cluster_{};
};

}  // namespace distil_fast::hw

#endif
