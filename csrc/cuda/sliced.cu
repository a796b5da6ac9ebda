// Lays the remaining weights out in slices (sliced.h), once per weight: a warp has a piece.
#include "sliced.h"

#include "tuning.h"

namespace masked_ops::cuda {
namespace {

// The bits of one piece's rows, 32 columns at a time.
struct PieceBits {
  const uint64_t* words;
  const int32_t* order;
  int64_t N, K, count;  // of pieces

  MASKED_OPS_BOTH static PieceBits of(const uint64_t* words, const int32_t* order, int64_t N, int64_t K) {
    return {words, order, N, K, slices_of(N) * slice_segments(K)};
  }
  int64_t blocks() const { return ceil_div<int64_t>(count, tuning::kPassThreads / kWarp); }
  MASKED_OPS_DEVICE int64_t slice(int64_t piece) const { return piece / slice_segments(K); }
  MASKED_OPS_DEVICE int64_t first(int64_t piece) const {  // of the segment's halves of words
    return piece % slice_segments(K) * (kSliceColumns / 32);
  }
  MASKED_OPS_DEVICE int halves(int64_t piece) const {
    const int64_t left = 2 * words_per_row(K) - first(piece);
    return int(left < kSliceColumns / 32 ? left : kSliceColumns / 32);
  }
  MASKED_OPS_DEVICE int32_t row(int64_t piece, int r) const { return order[slice(piece) * kSliceRows + r]; }
  MASKED_OPS_DEVICE const uint32_t* of_row(int64_t row) const {
    return reinterpret_cast<const uint32_t*>(words + row * words_per_row(K));
  }
};

__global__ void __launch_bounds__(tuning::kPassThreads) slice_kernel(PieceBits bits, SlicedPiece* __restrict__ pieces) {
  const int64_t piece = (int64_t(blockIdx.x) * tuning::kPassThreads + threadIdx.x) / kWarp;
  if (piece >= bits.count) return;  // all of the warp
  const int lane = threadIdx.x % kWarp, halves = bits.halves(piece);
  int counts[kSliceRows], most = 0;  // this lane's columns in each row
#pragma unroll
  for (int r = 0; r < kSliceRows; ++r) {
    const int32_t row = bits.row(piece, r);
    counts[r] = 0;
    if (row < 0) continue;
    const uint32_t* const from = bits.of_row(row) + bits.first(piece);
    for (int h = 0; h < halves; ++h) counts[r] += from[h] >> lane & 1;
    most = counts[r] > most ? counts[r] : most;
  }
  most = warp_most(most);
  SlicedPiece best = {};
  for (int strict = 0; strict <= most; ++strict) {
    int loose = 0;
#pragma unroll
    for (int r = 0; r < kSliceRows; ++r) {
      const int over = warp_sum(counts[r] > strict ? counts[r] - strict : 0);
      loose = ceil_div(over, kWarp) > loose ? ceil_div(over, kWarp) : loose;
    }
    const uint32_t size = strict * kStrictUnits + loose * kLooseUnits;
    if (strict == 0 || size < best.size) best = {0, size, uint32_t(strict), uint32_t(loose)};
  }
  if (lane == 0) pieces[piece] = best;
}

__global__ void __launch_bounds__(tuning::kPassThreads)
    fill_slices_kernel(PieceBits bits, const int64_t* __restrict__ offsets, const SlicedPiece* __restrict__ pieces,
                       const uint16_t* __restrict__ values, uint8_t* __restrict__ data) {
  const int64_t number = (int64_t(blockIdx.x) * tuning::kPassThreads + threadIdx.x) / kWarp;
  if (number >= bits.count) return;  // all of the warp
  const int lane = threadIdx.x % kWarp, halves = bits.halves(number);
  const uint32_t below = (1u << lane) - 1;
  const SlicedPiece piece = pieces[number];
  for (uint32_t i = lane; i < piece.size * (kSliceUnit / 16); i += kWarp) {
    reinterpret_cast<uint4*>(data + strict_at(piece, 0))[i] = make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
  for (int r = 0; r < kSliceRows; ++r) {
    const int32_t row = bits.row(number, r);
    if (row < 0) continue;
    const uint32_t* from = bits.of_row(row);
    int64_t before = 0;
    for (int64_t h = lane; h < bits.first(number); h += kWarp) before += __popc(from[h]);
    int64_t position = offsets[row] + warp_sum(before);
    from += bits.first(number);
    uint32_t strict = 0, loose = 0;  // values that this lane has in strict steps; all lanes in loose ones
    for (int h = 0; h < halves; ++h) {
      const uint32_t half = from[h];
      const bool set = half >> lane & 1, over = set && strict == piece.strict;
      const uint32_t all_over = __ballot_sync(kAllLanes, over);
      if (set) {
        const uint16_t value = values[position + __popc(half & below)];
        const uint32_t slot = loose + __popc(all_over & below), to = over ? slot % kWarp : lane;
        uint8_t* const step = data + (over ? loose_at(piece, slot / kWarp) : strict_at(piece, strict));
        reinterpret_cast<uint16_t*>(step)[to * kSliceRows + r] = value;
        if (over) {
          reinterpret_cast<uint16_t*>(step + kStepValues)[to * kSliceRows + r] = uint16_t(h * 32 + lane);
        } else {
          step[kStepValues + to * kSliceRows + r] = uint8_t(h);
          ++strict;
        }
      }
      loose += __popc(all_over);
      position += __popc(half);
    }
  }
}

}  // namespace
}  // namespace masked_ops::cuda

int masked_ops_cuda_slice(const uint64_t* words, int64_t N, int64_t K, const int32_t* order,
                          masked_ops::cuda::SlicedPiece* pieces, void* stream) {
  using namespace masked_ops::cuda;
  const PieceBits bits = PieceBits::of(words, order, N, K);
  if (bits.count == 0) return 0;
  if (bits.blocks() > INT32_MAX) return kUnsupported;
  return launch(slice_kernel, uint32_t(bits.blocks()), tuning::kPassThreads, 0, stream, bits, pieces);
}

int masked_ops_cuda_fill_slices(const uint64_t* words, int64_t N, int64_t K, const int64_t* offsets,
                                const int32_t* order, const masked_ops::cuda::SlicedPiece* pieces, const void* values,
                                void* data, void* stream) {
  using namespace masked_ops::cuda;
  const PieceBits bits = PieceBits::of(words, order, N, K);
  if (bits.count == 0) return 0;
  if (bits.blocks() > INT32_MAX) return kUnsupported;
  return launch(fill_slices_kernel, uint32_t(bits.blocks()), tuning::kPassThreads, 0, stream, bits, offsets, pieces,
                static_cast<const uint16_t*>(values), static_cast<uint8_t*>(data));
}
