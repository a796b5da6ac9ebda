// A CUDA device modelled on the CPU, as far as csrc/cuda uses one: the .cu files compiled by a C++ compiler with this
// header run every thread as a fibre, and every instruction that threads perform together as its definition in the PTX
// manual. Written from that manual and not from the kernels, so that a wrong fragment or swizzle shows.
//
// What is asynchronous on the device happens here as early as possible or as late as possible (set_mode), and threads
// run in any order: a kernel that forgets to wait, or releases a buffer too early, gives wrong results in one of the
// modes. Shared memory begins as NaN.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block runs at a time, on one thread of the CPU
#define dynamic_shared (emulator::shared_memory())

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

uint8_t* shared_memory();
void fail(const char* what);  // ends the launch with an error
void yield();                 // lets the other threads run
void progress();              // something has happened that another thread may wait for
bool lazy();

template <typename Ready>
void wait_until(const Ready& ready) {
  while (!ready()) yield();
  progress();
}

// All `threads` of a group of the block come here; the last one runs action, and then all go on.
void meet(int group, int threads, const std::function<void()>& action);
enum : int { kBlock = 0, kNamed = 1, kWarps = 64, kWarpgroups = 128, kCluster = 255 };

constexpr int kMaxCluster = 8;
int rank();  // of the block in its cluster
inline int lane() { return int(threadIdx.x % 32); }
inline int warp() { return int(threadIdx.x / 32); }

// What every lane of the calling warp has put in, by lane.
template <typename T>
const T* exchange(const T& mine) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 64);
  extern uint8_t exchanged[2][kMaxCluster * 32][32 * 64];
  extern int exchange_turn[kMaxCluster * 32];
  const int w = rank() * 32 + warp();
  T* all = reinterpret_cast<T*>(exchanged[exchange_turn[w] & 1][w]);
  std::memcpy(static_cast<void*>(all + lane()), &mine, sizeof(T));
  meet(kWarps + warp(), 32, [w] { ++exchange_turn[w]; });
  return all;
}

int launch(int cluster, dim3 grid, unsigned threads, size_t shared, const std::function<void()>& kernel);

template <typename T>
T* checked(T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T)) fail("a misaligned access");
  return pointer;
}

}  // namespace emulator

inline void __syncthreads() {
  emulator::meet(emulator::kBlock, int(blockDim.x), [] {});
}
inline void __syncwarp(unsigned = ~0u) { emulator::exchange(0); }
inline unsigned __ballot_sync(unsigned, bool mine) {
  const bool* all = emulator::exchange(mine);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= unsigned(all[i]) << i;
  return bits;
}
template <typename T>
T __shfl_xor_sync(unsigned, T mine, int mask) {
  return emulator::exchange(mine)[emulator::lane() ^ mask];
}
template <typename T>
T __shfl_up_sync(unsigned, T mine, int by) {
  const int from = emulator::lane() - by;
  return emulator::exchange(mine)[from < 0 ? emulator::lane() : from];
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long n) {
  return std::exchange(*to, *to + n);
}
inline unsigned long long atomicOr(unsigned long long* to, unsigned long long n) { return std::exchange(*to, *to | n); }
inline unsigned atomicOr(unsigned* to, unsigned n) { return std::exchange(*to, *to | n); }
template <typename T>
T __ldcs(const T* from) {
  return *emulator::checked(from);
}
template <typename T>
T __ldg(const T* from) {
  return *emulator::checked(from);
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// --- the runtime ---

using cudaError_t = int;
using cudaStream_t = void*;
enum : int { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr : int {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrL2CacheSize,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
int cudaDeviceGetAttribute(int* to, cudaDeviceAttr attribute, int device);
int cudaGetDevice(int* device);
const char* cudaGetErrorString(cudaError_t error);

namespace masked_ops::cuda {

template <typename... Parameters, typename... Arguments>
int launch_clusters(int cluster, void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared, void*,
                    const Arguments&... arguments) {
  return emulator::launch(cluster, grid, threads, shared, [&] { kernel(Parameters(arguments)...); });
}
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared, void* stream,
           const Arguments&... arguments) {
  return launch_clusters(1, kernel, grid, threads, shared, stream, arguments...);
}

inline int zero(void* memory, size_t bytes, void*) {
  std::memset(memory, 0, bytes);
  return 0;
}

// --- numeric.h ---

inline uint16_t round_to_bfloat16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (std::isnan(x)) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t round_to_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
template <bool kBFloat>
uint32_t round_pair(uint32_t low, uint32_t high) {
  const float x = __uint_as_float(low), y = __uint_as_float(high);
  return kBFloat ? round_to_bfloat16(x) | uint32_t(round_to_bfloat16(y)) << 16
                 : round_to_half(x) | uint32_t(round_to_half(y)) << 16;
}
template <bool kBFloat>
float to_float(uint16_t bits) {
  if (kBFloat) return __uint_as_float(uint32_t(bits) << 16);
  // Exponent and fraction where a float has them, and the exponent's bias put right by a product, which is exact.
  const float size = __uint_as_float(uint32_t(bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  return __uint_as_float(__float_as_uint(size) | special | uint32_t(bits & 0x8000) << 16);
}

// --- ptx.h: see the PTX manual, "Warp-level matrix instructions", "Asynchronous warpgroup-level matrix instructions",
// "Data movement: cp.async, cp.async.bulk.tensor", "mbarrier" ---

inline uint32_t shared_address(const void* pointer) {
  return uint32_t(static_cast<const uint8_t*>(pointer) - emulator::shared_memory());
}
uint8_t* shared_pointer(uint32_t address, uint32_t alignment, uint32_t bytes);

void cp_async16(uint32_t to, const void* from, bool there);
void cp_async_commit();
void cp_async_wait_all_but(int groups);
template <int kGroups>
void cp_async_wait() {
  cp_async_wait_all_but(kGroups);
}

template <typename T>
T computed(T x) {
  return x;
}

// Nothing, but that the memory has to be there.
inline void prefetch_l2(const void* from) { (void)*static_cast<const volatile uint8_t*>(from); }

// Eight rows of 16 bytes take one turn if they are in different groups of banks.
void count_bank_conflicts(const uint32_t* rows);

template <bool kTransposed>
void ldmatrix_x4(uint32_t* to, uint32_t address) {
  const uint32_t* rows = emulator::exchange(address);
  count_bank_conflicts(rows);
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int a = emulator::lane() / 4, b = emulator::lane() % 4 * 2 + e;
      const uint8_t* row = shared_pointer(rows[8 * i + (kTransposed ? b : a)], 16, 16);
      std::memcpy(&pair[e], row + 2 * (kTransposed ? a : b), 2);
    }
    to[i] = pair[0] | uint32_t(pair[1]) << 16;
  }
}

template <bool kTransposed>
void stmatrix_x4(uint32_t address, const uint32_t* from) {
  const uint32_t* rows = emulator::exchange(address);
  count_bank_conflicts(rows);
  for (int i = 0; i < 4; ++i) {
    for (int e = 0; e < 2; ++e) {
      const int a = emulator::lane() / 4, b = emulator::lane() % 4 * 2 + e;
      const uint16_t element = uint16_t(from[i] >> (16 * e));
      uint8_t* row = shared_pointer(rows[8 * i + (kTransposed ? b : a)], 16, 16);
      std::memcpy(row + 2 * (kTransposed ? a : b), &element, 2);
    }
  }
  __syncwarp();
}

// Lane l has A[l/4 + 8 (i%2)][2 (l%4) + h + 8 (i/2)], B[2 (l%4) + h + 8 i][l/4], D[l/4 + 8 (i/2)][2 (l%4) + i%2].
struct MmaOperands {
  uint32_t a[4], b[2];
};
void mma_m16n8k16(bool bfloat, float* d, const MmaOperands& mine);
template <bool kBFloat>
void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  mma_m16n8k16(kBFloat, d, {{a[0], a[1], a[2], a[3]}, {b0, b1}});
}

// A byte of 0xff or 0 for each selector's nibble: the sign of that byte where the nibble's top bit is set.
template <uint32_t kSelectors>
uint32_t permute(uint32_t from) {
  uint32_t to = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t selector = kSelectors >> (4 * i) & 15;
    uint32_t byte = (selector & 7) < 4 ? from >> (8 * (selector & 3)) & 0xff : 0;
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
    to |= byte << (8 * i);
  }
  return to;
}

inline uint32_t select_bytes(uint32_t first, uint32_t second, uint32_t selectors) {
  const uint64_t both = first | uint64_t{second} << 32;
  uint32_t to = 0;
  for (int i = 0; i < 4; ++i) {
    if (selectors >> (4 * i) & 8) emulator::fail("select_bytes: a selector asks for a sign");
    to |= uint32_t(both >> (8 * (selectors >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return to;
}
template <uint32_t kSelectors>
uint32_t select_bytes(uint32_t first, uint32_t second) {
  return select_bytes(first, second, kSelectors);
}

void mbarrier_init(uint32_t barrier, int arrivals);
void mbarrier_expect(uint32_t barrier, uint32_t bytes);  // and arrives
void mbarrier_arrive(uint32_t barrier);
inline uint32_t cluster_rank() { return uint32_t(emulator::rank()); }
void cluster_barrier();
inline void cluster_barrier_after_reading() { cluster_barrier(); }
float4 load_shared_of(uint32_t block, uint32_t address);
bool mbarrier_done(uint32_t barrier, uint32_t parity);
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  emulator::wait_until([&] { return mbarrier_done(barrier, parity); });
}
inline void fence_mbarrier_init() {}

struct TensorMap {  // of 2-byte elements, zeros beyond its ends, swizzled by 128 bytes
  const void* base;
  int64_t cols, rows, stride_bytes;
  int box_cols, box_rows;
};
inline int encode_tensor_map(TensorMap* map, const void* base, int64_t rows, int64_t cols, int box_rows, int box_cols,
                             bool) {
  *map = {base, cols, rows, cols * 2, box_cols, box_rows};
  return reinterpret_cast<uintptr_t>(base) % 16 || cols % 8 ? 1 : 0;
}
void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);
void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int col, int row);
inline void prefetch_tensor_map(const TensorMap*) {}

void wgmma_fence();
void wgmma_commit();
void wgmma_wait_all_but(int groups);
void wgmma_issue(int N, bool bfloat, bool transposed_b, float* d, const uint32_t* a, uint64_t b);
template <int kGroups>
void wgmma_wait() {
  wgmma_wait_all_but(kGroups);
}
template <bool kBFloat, bool kTransposedB, int kAccumulators>
void wgmma(float (&d)[kAccumulators], const uint32_t* a, uint64_t b) {
  wgmma_issue(kAccumulators * 2, kBFloat, kTransposedB, d, a, b);
}
template <int kAccumulators>
void wgmma_results(float (&)[kAccumulators]) {}
inline void named_barrier(int id, int threads) {
  emulator::meet(emulator::kNamed + id, threads, [] {});
}
template <int kRegisters>
void more_registers() {}
template <int kRegisters>
void fewer_registers() {}

}  // namespace masked_ops::cuda

extern "C" {
// order: 0 threads by number, 1 the other way round, 2 at random.
void emulator_set_mode(int lazy, int order);
void emulator_set_device(int capability, int multiprocessors);
const char* emulator_error();
// Blocks of a cluster in the last launch.
int emulator_cluster();
// Of ldmatrix and stmatrix since it was last asked.
int64_t emulator_bank_conflicts();
}
