// A linear layer on up to 64 rows of input, out of the remaining weights in 16 bits, on the tensor cores.
//
// A warp has 16 rows of the weight. Segment by segment it clears a dense tile of 16 x 256 in shared memory, writes the
// remaining weights to their places, and multiplies it on the tensor cores with the segment of the input that the block
// has brought in meanwhile: output^T = weight * input^T. What the next segment begins with is on its way all the time.
// The segments are dealt out to gridDim.y blocks, whose sums a second kernel adds up, always in the same order.
#include "decode.h"
#include "ptx.h"
#include "split_sum.h"
#include "swizzle.h"
#include "tuning.h"

namespace masked_ops::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kGroup = Group<kHalf>::kSize;
constexpr int kLanes = 8, kRows = 16;              // lanes of a row, rows of a warp
constexpr int kPasses = kRows / (kWarp / kLanes);  // over the rows
constexpr int kRowBytes = kSegment * 2;            // of a tile, and of the input
constexpr int kTileBytes = kRows * kRowBytes;

// What this lane has of four rows: the groups at hand of one segment, and where that of the next begins and ends.
struct Rows {
  const Decode& decode;
  int64_t segments;
  int lane;
  const uint32_t* begins[kPasses];  // of the segment after the next; null: there is no such row
  uint32_t from[kPasses], to[kPasses], next_to[kPasses], at[kPasses];
  Group<kHalf> groups[kPasses];

  MASKED_OPS_DEVICE Rows(const Decode& of, int64_t first_row, int64_t first, int lane)
      : decode(of), segments(DecodeIndex::segments(of.K)), lane(lane) {
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const int64_t row = first_row + p * (kWarp / kLanes) + lane / kLanes;
      const bool there = row < decode.N && first < segments;
      begins[p] = there ? decode.index.begins + row * segments + first + 2 : nullptr;
      to[p] = there ? begins[p][-2] : 0;
      next_to[p] = there ? begins[p][-1] : 0;
    }
    next(first);
  }
  // On to the segment that begins where the last one ended; s is its number.
  MASKED_OPS_DEVICE void next(int64_t s) {
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      from[p] = to[p], to[p] = next_to[p];
      at[p] = from[p] / kGroup * kGroup + kGroup * (lane % kLanes);
      if (at[p] < to[p]) groups[p].load(decode.values, decode.index, at[p], decode.nnz);
    }
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      if (begins[p] && s + 1 < segments) next_to[p] = *begins[p]++;
    }
  }
  MASKED_OPS_DEVICE void scatter(uint8_t* tile) {
    for (bool more = true; more;) {
      more = false;
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        if (at[p] >= to[p]) continue;
        const int row = p * (kWarp / kLanes) + lane / kLanes;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          if (at[p] + i - from[p] < to[p] - from[p]) {  // unsigned: not before from either
            const uint32_t byte = groups[p].column(i) % kSegment * 2;
            *reinterpret_cast<uint16_t*>(tile + swizzled<kRowBytes>(row, byte)) = groups[p].value(i);
          }
        }
        at[p] += kGroup * kLanes;
        if (at[p] < to[p]) {
          groups[p].load(decode.values, decode.index, at[p], decode.nnz);
          more = true;
        }
      }
    }
  }
};

// input[m][first .. first + 256), zeros beyond M and K; it is there after cp_async_wait and a barrier.
template <int kM>
MASKED_OPS_DEVICE void stage_input(uint8_t* to, const Decode& decode, int64_t first) {
  const uint16_t* input = static_cast<const uint16_t*>(decode.input);
  const bool vector = decode.K % 8 == 0;
#pragma unroll 2
  for (int i = threadIdx.x; i < kM * kSegment / 8; i += kThreads) {
    const int m = i / (kSegment / 8), chunk = i % (kSegment / 8);
    const int64_t k = first + chunk * 8;
    const uint16_t* from = input + m * decode.K + k;
    uint8_t* const place = to + swizzled<kRowBytes>(m, chunk * 16);
    const bool there = m < decode.M && k < decode.K;
    if (vector) {
      cp_async16(shared_address(place), there ? from : input, there);
    } else {
      uint32_t pairs[4] = {};
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (there && k + e < decode.K) pairs[e / 2] |= uint32_t(from[e]) << (16 * (e % 2));
      }
      *reinterpret_cast<uint4*>(place) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
  cp_async_commit();
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

template <int kM>
struct Staging {  // of the input: twice where two blocks still fit a multiprocessor
  static constexpr int kBuffers = kM <= 32 ? 2 : 1;
  static constexpr int kBytes = kM * kRowBytes;
};

template <bool kBFloat, int kM>
__global__ void __launch_bounds__(kThreads, 2) decode_mma_kernel(const __grid_constant__ Decode decode) {
  using S = Staging<kM>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  uint8_t* const tile = dynamic_shared + warp * kTileBytes;
  uint8_t* const input = dynamic_shared + kWarps * kTileBytes;
  const int64_t segments = DecodeIndex::segments(decode.K), first_row = (int64_t(blockIdx.x) * kWarps + warp) * kRows;
  const int64_t first = segments * blockIdx.y / gridDim.y, last = segments * (blockIdx.y + 1) / gridDim.y;
  float sums[kM / 8][4] = {};
  Rows rows(decode, first_row, first, lane);
  if (first < last) stage_input<kM>(input, decode, first * kSegment);
  int buffer = 0;
  for (int64_t s = first; s < last; ++s) {
#pragma unroll
    for (int i = 0; i < kTileBytes / 16 / kWarp; ++i) {
      *reinterpret_cast<uint4*>(tile + (i * kWarp + lane) * 16) = make_uint4(0, 0, 0, 0);
    }
    __syncwarp();
    rows.scatter(tile);
    rows.next(s + 1);
    cp_async_wait<0>();
    __syncthreads();  // the segment of the input is there, and nobody reads the one before
    const int next = (buffer + 1) % S::kBuffers;
    if (S::kBuffers == 2 && s + 1 < last) stage_input<kM>(input + next * S::kBytes, decode, (s + 1) * kSegment);
    multiply<kBFloat, kM>(sums, shared_address(tile), shared_address(input + buffer * S::kBytes), lane);
    if (S::kBuffers == 1) {
      __syncthreads();
      if (s + 1 < last) stage_input<kM>(input, decode, (s + 1) * kSegment);
    }
    buffer = next;
  }
  float* partial = static_cast<float*>(decode.workspace) + blockIdx.y * decode.M * decode.N;
#pragma unroll
  for (int n = 0; n < kM / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t m = n * 8 + lane % 4 * 2 + i % 2, row = first_row + lane / 4 + i / 2 * 8;
      if (m < decode.M && row < decode.N) partial[m * decode.N + row] = sums[n][i];
    }
  }
}

int64_t row_blocks(int64_t N) { return ceil_div<int64_t>(N, kWarps * kRows); }

int splits_of(int64_t N, int64_t K) {
  const int64_t wanted = 2 * tuning::kDecodeMultiprocessors / row_blocks(N), segments = DecodeIndex::segments(K);
  return int(wanted < 1 || segments < 1 ? 1 : wanted < segments ? wanted : segments);
}

template <bool kBFloat>
int run(const Decode& decode) {
  const int splits = splits_of(decode.N, decode.K);
  const int M = decode.M <= 16 ? 16 : decode.M <= 32 ? 32 : 64;
  const int shared = kWarps * kTileBytes + (M <= 32 ? 2 : 1) * M * kRowBytes;
  const auto kernel = M == 16   ? decode_mma_kernel<kBFloat, 16>
                      : M == 32 ? decode_mma_kernel<kBFloat, 32>
                                : decode_mma_kernel<kBFloat, 64>;
  const int error =
      launch(kernel, dim3(uint32_t(row_blocks(decode.N)), splits), kThreads, shared, decode.stream, decode);
  if (error) return error;
  return split_sum<kBFloat>(decode.workspace, splits, decode.M, decode.N, decode.bias, decode.output, decode.stream);
}

}  // namespace

size_t decode_mma_workspace(int64_t M, int64_t N, int64_t K) {
  return N == 0 ? 0 : sizeof(float) * size_t(splits_of(N, K)) * M * N;
}

int decode_mma(int dtype, const Decode& decode) { return dtype == kHalf ? run<false>(decode) : run<true>(decode); }

}  // namespace masked_ops::cuda
