// The bits of a mask in fragment order: once per mask and direction. A thread makes one word.
#include "fragments.h"

#include "device.h"
#include "tuning.h"

namespace masked_ops::cuda {
namespace {

// Bits of rows [N][K]; the operand is the weight [N][K], or transposed [K][N].
template <bool kTransposed>
__global__ void __launch_bounds__(tuning::kPassThreads)
    fragments_kernel(const uint64_t* __restrict__ words, int64_t N, int64_t K, int64_t total, Divider col_tiles,
                     uint32_t* __restrict__ fragments) {
  const int64_t i = int64_t(blockIdx.x) * tuning::kPassThreads + threadIdx.x;
  if (i >= total) return;
  const int thread = int(i % kFragmentThreads);
  uint64_t col_tile;
  const int64_t row_tile = col_tiles(i / kFragmentThreads, col_tile), stride = words_per_row(K);
  uint32_t fragment = 0;
#pragma unroll
  for (int reg = 0; reg < 16; ++reg) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = fragment_row(thread, reg), col = fragment_col(thread, reg, half);
      const int64_t n = kTransposed ? int64_t(col_tile) * kFragmentTile + col : row_tile * kFragmentTile + row;
      const int64_t word = kTransposed ? row_tile : int64_t(col_tile);
      const int bit = kTransposed ? row : col;
      if (n < N) fragment |= uint32_t(words[n * stride + word] >> bit & 1) << fragment_bit(reg, half);
    }
  }
  fragments[i] = fragment;
}

}  // namespace
}  // namespace masked_ops::cuda

size_t masked_ops_cuda_fragments_bytes(int64_t N, int64_t K, int) {
  using namespace masked_ops::cuda;
  return size_t(fragment_tiles(N)) * fragment_tiles(K) * kFragmentTileBytes;
}

int masked_ops_cuda_pack_fragments(const uint64_t* words, int64_t N, int64_t K, int transposed, uint32_t* fragments,
                                   void* stream) {
  using namespace masked_ops::cuda;
  if (N == 0 || K == 0) return 0;
  const int64_t col_tiles = fragment_tiles(transposed ? N : K);
  const int64_t total = fragment_tiles(N) * fragment_tiles(K) * kFragmentThreads;
  const int64_t blocks = ceil_div<int64_t>(total, tuning::kPassThreads);
  if (blocks > INT32_MAX) return kUnsupported;
  return launch(transposed ? fragments_kernel<true> : fragments_kernel<false>, uint32_t(blocks), tuning::kPassThreads,
                0, stream, words, N, K, total, Divider::by(col_tiles), fragments);
}
