// A linear layer on 9 to 64 rows of input, out of the remaining weights in 16 bits.
//
// A warp has 16 rows of the weight. Segment by segment it clears a dense tile of 16 x 256 in shared memory, writes the
// remaining weights to their places, and multiplies it on the tensor cores with the segment of the input that the block
// has brought in meanwhile: output^T = weight * input^T. The segments are dealt out to gridDim.y blocks, whose sums a
// second kernel adds up, always in the same order.
#include "decode.h"
#include "ptx.h"
#include "split_sum.h"
#include "swizzle.h"
#include "tuning.h"

namespace masked_ops::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kLanes = 8, kRows = 16;              // lanes of a row, rows of a warp
constexpr int kPasses = kRows / (kWarp / kLanes);  // over the rows
constexpr int kRowBytes = kSegment * 2;            // of a tile, and of the input
constexpr int kTileBytes = kRows * kRowBytes;

// The first group of each of this lane's rows, in one segment.
struct Segment {
  uint32_t from[kPasses], to[kPasses];
  Group<kHalf, 4> groups[kPasses];
};

struct Rows {
  const Decode& decode;
  int64_t first, segments;
  int lane;

  MASKED_OPS_DEVICE uint32_t position(uint32_t from) const { return from / 4 * 4 + 4 * (lane % kLanes); }
  MASKED_OPS_DEVICE const uint16_t* values() const { return static_cast<const uint16_t*>(decode.values); }

  MASKED_OPS_DEVICE void load(Segment& segment, int64_t s) const {
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const int64_t row = first + p * (kWarp / kLanes) + lane / kLanes;
      const uint32_t* begins = decode.index.begins + row * segments + s;
      segment.from[p] = row < decode.N ? begins[0] : 0;
      segment.to[p] = row < decode.N ? begins[1] : 0;
    }
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const uint32_t at = position(segment.from[p]);
      if (at < segment.to[p]) segment.groups[p].load(values(), decode.index, at, decode.nnz);
    }
  }
  MASKED_OPS_DEVICE void scatter(Segment& segment, uint8_t* tile) const {
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const int row = p * (kWarp / kLanes) + lane / kLanes;
      const uint32_t from = segment.from[p], to = segment.to[p];
      Group<kHalf, 4>& group = segment.groups[p];
      for (uint32_t at = position(from); at < to;) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (at + i - from < to - from) {  // unsigned: not before from either
            *reinterpret_cast<uint16_t*>(tile + swizzled<kRowBytes>(row, group.column(i) * 2)) = group.value(i);
          }
        }
        at += 4 * kLanes;
        if (at < to) group.load(values(), decode.index, at, decode.nnz);
      }
    }
  }
};

// input[m][first .. first + 256), zeros beyond M and K.
template <int kM>
MASKED_OPS_DEVICE void stage_input(uint8_t* to, const Decode& decode, int64_t first) {
  const uint16_t* input = static_cast<const uint16_t*>(decode.input);
  const bool vector = decode.K % 8 == 0;
#pragma unroll 2
  for (int i = threadIdx.x; i < kM * kSegment / 8; i += kThreads) {
    const int m = i / (kSegment / 8), chunk = i % (kSegment / 8);
    const int64_t k = first + chunk * 8;
    const uint16_t* from = input + m * decode.K + k;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (m < decode.M && k < decode.K) {
      if (vector) {
        v = *reinterpret_cast<const uint4*>(from);
      } else {
        uint32_t pairs[4] = {};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (k + e < decode.K) pairs[e / 2] |= uint32_t(from[e]) << (16 * (e % 2));
        }
        v = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      }
    }
    *reinterpret_cast<uint4*>(to + swizzled<kRowBytes>(m, chunk * 16)) = v;
  }
}

template <bool kBFloat, int kM>
MASKED_OPS_DEVICE void multiply(float (&sums)[kM / 8][4], uint32_t tile, uint32_t input, int lane) {
#pragma unroll 4
  for (int k = 0; k < kSegment / 16; ++k) {
    uint32_t a[4];
    ldmatrix_x4<false>(a, tile + swizzled<kRowBytes>(lane % 16, k * 32 + lane / 16 * 16));
#pragma unroll
    for (int n = 0; n < kM / 16; ++n) {
      uint32_t b[4];
      const int m = n * 16 + lane / 16 * 8 + lane % 8;
      ldmatrix_x4<false>(b, input + swizzled<kRowBytes>(m, k * 32 + lane / 8 % 2 * 16));
      mma_m16n8k16<kBFloat>(sums[2 * n], a, b[0], b[1]);
      mma_m16n8k16<kBFloat>(sums[2 * n + 1], a, b[2], b[3]);
    }
  }
}

template <bool kBFloat, int kM>
__global__ void __launch_bounds__(kThreads, 1) decode_mma_kernel(const __grid_constant__ Decode decode) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  uint8_t* const tile = dynamic_shared + warp * kTileBytes;
  uint8_t* const input = dynamic_shared + kWarps * kTileBytes;
  const Rows rows{decode, (int64_t(blockIdx.x) * kWarps + warp) * kRows, DecodeIndex::segments(decode.K), lane};
  const int64_t first = rows.segments * blockIdx.y / gridDim.y, last = rows.segments * (blockIdx.y + 1) / gridDim.y;
  float sums[kM / 8][4] = {};
  Segment segment;
  if (first < last) rows.load(segment, first);
  for (int64_t s = first; s < last; ++s) {
    __syncthreads();  // nobody reads the input any more
    stage_input<kM>(input, decode, s * kSegment);
#pragma unroll
    for (int i = 0; i < kTileBytes / 16 / kWarp; ++i) {
      *reinterpret_cast<uint4*>(tile + (i * kWarp + lane) * 16) = make_uint4(0, 0, 0, 0);
    }
    __syncwarp();
    rows.scatter(segment, tile);
    if (s + 1 < last) rows.load(segment, s + 1);
    __syncthreads();
    multiply<kBFloat, kM>(sums, shared_address(tile), shared_address(input), lane);
  }
  float* partial = static_cast<float*>(decode.workspace) + blockIdx.y * decode.M * decode.N;
#pragma unroll
  for (int n = 0; n < kM / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t m = n * 8 + lane % 4 * 2 + i % 2, row = rows.first + lane / 4 + i / 2 * 8;
      if (m < decode.M && row < decode.N) partial[m * decode.N + row] = sums[n][i];
    }
  }
}

int64_t row_blocks(int64_t N) { return ceil_div<int64_t>(N, kWarps * kRows); }

int splits_of(int64_t N, int64_t K) {
  const int64_t wanted = ceil_div<int64_t>(tuning::kDecodeBlocks, row_blocks(N)), segments = DecodeIndex::segments(K);
  return int(wanted < segments ? wanted : segments > 1 ? segments : 1);
}

template <bool kBFloat>
int run(const Decode& decode) {
  const int splits = splits_of(decode.N, decode.K);
  const int M = decode.M <= 16 ? 16 : decode.M <= 32 ? 32 : 64;
  const auto kernel = M == 16   ? decode_mma_kernel<kBFloat, 16>
                      : M == 32 ? decode_mma_kernel<kBFloat, 32>
                                : decode_mma_kernel<kBFloat, 64>;
  const int error = launch(kernel, dim3(uint32_t(row_blocks(decode.N)), splits), kThreads,
                           kWarps * kTileBytes + M * kRowBytes, decode.stream, decode);
  if (error) return error;
  return split_sum<kBFloat>(decode.workspace, splits, decode.M, decode.N, decode.bias, decode.output, decode.stream);
}

}  // namespace

size_t decode_mma_workspace(int64_t M, int64_t N, int64_t K) {
  return N == 0 ? 0 : sizeof(float) * size_t(splits_of(N, K)) * M * N;
}

int decode_mma(int dtype, const Decode& decode) { return dtype == kHalf ? run<false>(decode) : run<true>(decode); }

}  // namespace masked_ops::cuda
