// Tiles by the tensor memory accelerator: how a matrix of 2-byte elements is described to it, and the copy itself.
#pragma once

#include "device.h"

#ifndef MASKED_OPS_EMULATE

#include <cuda.h>

namespace masked_ops::cuda {

using TensorMap = CUtensorMap;

// Boxes of box_rows x box_cols out of [rows][cols], swizzled by 128 bytes (box_cols is 64), zeros beyond the matrix.
// Not 0 if that cannot be had: base is not aligned to 16 bytes, or cols is not a multiple of 8.
inline int encode_tensor_map(TensorMap* map, const void* base, int64_t rows, int64_t cols, int box_rows, int box_cols,
                             bool bfloat) {
  // The runtime library finds the driver's function: nothing has to be linked for it.
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess || !function) return 1;
  const cuuint64_t sides[2] = {cuuint64_t(cols), cuuint64_t(rows)}, strides[1] = {cuuint64_t(cols) * 2};
  const cuuint32_t box[2] = {cuuint32_t(box_cols), cuuint32_t(box_rows)}, steps[2] = {1, 1};
  const auto type = bfloat ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return reinterpret_cast<Encode>(function)(map, type, 2, const_cast<void*>(base), sides, strides, box, steps,
                                            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                            CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

MASKED_OPS_DEVICE void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int col, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(to),
      "l"(map), "r"(barrier), "r"(col), "r"(row)
      : "memory");
}

// Lets the description be there before the first copy asks for it.
MASKED_OPS_DEVICE void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

}  // namespace masked_ops::cuda

#endif
