// What every .cu file is written on: CUDA's built-ins and a launch, or, with MASKED_OPS_EMULATE, their models on the
// CPU (tests/cuda), on which the same kernels run without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "api.h"

#ifdef MASKED_OPS_EMULATE
#include <emulator.h>
#else

#include <cuda_runtime.h>

// Shared memory whose size the launch decides; 1024 bytes is what the tensor memory accelerator's swizzle asks for.
extern __shared__ __align__(1024) uint8_t dynamic_shared[];

namespace masked_ops::cuda {

// Blocks in clusters of so many along x, which run at once and reach each other's shared memory (Hopper).
template <typename... Parameters, typename... Arguments>
int launch_clusters(int cluster, void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared,
                    void* stream, const Arguments&... arguments) {
  if (shared > 32 * 1024) {  // of the 48 KB that need no leave, some may be the kernel's static arrays
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared, void* stream,
           const Arguments&... arguments) {
  return launch_clusters(1, kernel, grid, threads, shared, stream, arguments...);
}

inline int zero(void* memory, size_t bytes, void* stream) {
  return cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream));
}

}  // namespace masked_ops::cuda

#endif

#define MASKED_OPS_DEVICE __device__ __forceinline__

namespace masked_ops::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <typename T>
MASKED_OPS_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

MASKED_OPS_DEVICE int warp_most(int x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const int other = __shfl_xor_sync(kAllLanes, x, step);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace masked_ops::cuda
