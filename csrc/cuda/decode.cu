// A linear layer on few rows of input, out of the remaining weights; more rows are in decode_mma.cu.
//
// Eight lanes take a row of the weight, eight remaining weights a lane and step, and look the input up in shared
// memory, where the M values of a column lie together. (From 8 rows of input on it is eight pairs of lanes, of which
// each lane adds up half of the rows.) A warp takes four rows of the weight, or two, or some neighbouring segments of
// them; what the warps of a block have of the same rows is summed at the end, always in the same order.
#include "decode.h"

#include "ptx.h"
#include "remaining.h"
#include "tuning.h"

#include <type_traits>

namespace masked_ops::cuda {
namespace {

__global__ void __launch_bounds__(tuning::kPassThreads, tuning::kPassBlocks)
    decode_index_kernel(Pieces pieces, int64_t segments, uint32_t* __restrict__ begins,
                        uint16_t* __restrict__ columns) {
  for_columns(pieces, [&](int64_t row, int64_t col, bool set, int64_t position) {
    if (col % kSegment == 0) begins[row * segments + col / kSegment] = uint32_t(position);
    if (set) columns[position] = uint16_t(col);
    if (row + 1 == pieces.rows && col + 1 == pieces.cols) {
      position += set;
      begins[pieces.rows * segments] = uint32_t(position);
      for (; position % 8 != 0; ++position) columns[position] = 0;
    }
  });
}

constexpr int64_t kMaxNnz = UINT32_MAX - 4096;  // a position may run ahead of the last

// How kM rows of input are taken.
template <int kDtype, int kM>
struct Way {
  using V = Value<kDtype>;
  using Storage = typename V::Storage;
  // One row alone is staged as the floats that it is used as.
  using Staged = std::conditional_t<kM == 1, float, Storage>;
  // A column is 16 bytes, what one load from shared memory takes, or is shared by two neighbouring lanes, which then
  // also have registers for two groups under way.
  static constexpr int kParts = kM >= 8 ? 2 : 1, kPart = kM / kParts;
  // Lanes of a row, of which each kParts have the same values; rows of a warp.
  static constexpr int kLanes = 8 * kParts, kRows = kWarp / kLanes;
  // Two blocks a multiprocessor; large inputs only one, which then stages twice as much.
  static constexpr int kBlocks = kM * sizeof(Staged) <= 4 ? 2 : 1, kThreads = 1024 / kBlocks, kWarps = kThreads / kWarp;
  static constexpr int kStagedBytes = (192 << 10) / kBlocks;
  static constexpr int kStaged = kStagedBytes / (kM * sizeof(Staged)) / kSegment;  // segments
  // Groups of values that a lane has under way, as many as registers are left for. (Three and four for one row of input
  // were no faster than two.)
  static constexpr int kAhead = kDtype == kFloat ? 1 : 2;

  struct alignas(kPart * sizeof(Staged)) Part {
    Staged of[kPart];

    MASKED_OPS_DEVICE void set(int m, Storage x) {
      if constexpr (kM == 1) {
        of[m] = V::widen(x);
      } else {
        of[m] = x;
      }
    }
    MASKED_OPS_DEVICE void add_to(float (&sums)[kPart], float factor) const {
#pragma unroll
      for (int m = 0; m < kPart; ++m) {
        if constexpr (kM == 1) {
          sums[m] += factor * of[m];
        } else {
          sums[m] += factor * V::widen(of[m]);
        }
      }
    }
  };
};

// input[m][k] to parts[k][m / kPart], zeros beyond M. Two neighbours in a row are loaded at once where they lie in one
// word.
template <int kDtype, int kM>
MASKED_OPS_DEVICE void stage_input(typename Way<kDtype, kM>::Part* to, const Decode& decode, int64_t first_m,
                                   int64_t first, int64_t last) {
  using W = Way<kDtype, kM>;
  using Storage = typename W::Storage;
  const Storage* const input = static_cast<const Storage*>(decode.input) + first_m * decode.K;
  const int rows = decode.M - first_m < kM ? int(decode.M - first_m) : kM;
  const bool pairs = sizeof(Storage) == 2 && decode.K % 2 == 0;
  const int step = pairs ? 2 : 1;
#pragma unroll(kM < 4 ? 4 : 1)
  for (int64_t k = first + step * threadIdx.x; k < last; k += step * W::kThreads) {
#pragma unroll
    for (int part = 0; part < W::kParts; ++part) {
      typename W::Part columns[2];
#pragma unroll
      for (int i = 0; i < W::kPart; ++i) {
        const int m = part * W::kPart + i;
        const Storage* const from = input + m * decode.K + k;
        if (pairs) {
          const uint32_t pair = m < rows ? *reinterpret_cast<const uint32_t*>(from) : 0;
          columns[0].set(i, W::V::of_bits(pair));
          columns[1].set(i, W::V::of_bits(pair >> 16));
        } else {
          columns[0].set(i, m < rows ? *from : Storage{});
        }
      }
      to[(k - first) * W::kParts + part] = columns[0];
      if (pairs) to[(k - first + 1) * W::kParts + part] = columns[1];
    }
  }
}

// What a lane has of its row: the remaining weights of some neighbouring segments, a group at a time, of which the next
// kAhead are on their way.
template <int kDtype, int kM>
struct Gather {
  using W = Way<kDtype, kM>;
  static constexpr int kGroup = Group<kDtype>::kSize, kStep = kGroup * W::kLanes / W::kParts;

  const Decode& decode;
  int64_t row;
  int lane, part;  // of the row; of the columns
  float sums[W::kPart] = {};
  uint32_t from = 0, to = 0;
  Group<kDtype> groups[W::kAhead];

  MASKED_OPS_DEVICE Gather(const Decode& of, int64_t row, int lane)
      : decode(of), row(row), lane(lane / W::kParts), part(lane % W::kParts) {}
  MASKED_OPS_DEVICE uint32_t first_position() const { return from / kGroup * kGroup + lane * kGroup; }
  MASKED_OPS_DEVICE void load(Group<kDtype>& group, uint32_t position) const {
    if (position < to) group.load(decode.values, decode.index, position, decode.nnz);
  }
  // Segments first to last - 1.
  MASKED_OPS_DEVICE void begin(int64_t first, int64_t last) {
    from = to = 0;
    if (row < decode.N) {
      const uint32_t* const begins = decode.index.begins + row * DecodeIndex::segments(decode.K);
      from = begins[first], to = begins[last];
    }
#pragma unroll
    for (int i = 0; i < W::kAhead; ++i) load(groups[i], first_position() + i * kStep);
  }
  // parts: of the whole row, of which only those of the segments are there.
  MASKED_OPS_DEVICE void add(const typename W::Part* parts) {
    parts += part;
    for (uint32_t position = first_position(); position < to;) {
#pragma unroll
      for (int i = 0; i < W::kAhead; ++i) {
        const Group<kDtype>& group = groups[i];
        if (position >= from && position + kGroup <= to) {
#pragma unroll
          for (int e = 0; e < kGroup; ++e) {
            parts[group.column(e) * W::kParts].add_to(sums, W::V::widen(group.value(e)));
            // Else wide columns are loaded too far ahead for the registers that there are.
            if (W::kPart >= 4 && e % 2 == 1) asm volatile("" ::: "memory");
          }
        } else {
#pragma unroll
          for (int e = 0; e < kGroup; ++e) {
            if (position + e - from < to - from) {  // unsigned: not before from either
              parts[group.column(e) * W::kParts].add_to(sums, W::V::widen(group.value(e)));
            }
          }
        }
        load(groups[i], position + W::kAhead * kStep);
        position += kStep;
      }
    }
  }
};

template <int kDtype, int kM>
__global__ void __launch_bounds__(Way<kDtype, kM>::kThreads, Way<kDtype, kM>::kBlocks)
    decode_gather_kernel(const __grid_constant__ Decode decode, int splits) {
  using W = Way<kDtype, kM>;
  using Storage = typename W::Storage;
  auto* const staged = reinterpret_cast<typename W::Part*>(dynamic_shared);
  __shared__ float partial[W::kWarps][W::kRows * kM];
  const int groups = W::kWarps / splits, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = warp % groups, split = warp / groups, row_in_warp = lane / W::kLanes;
  const int64_t first_row = int64_t(blockIdx.x) * groups * W::kRows, first_m = int64_t(blockIdx.y) * kM;
  const int64_t segments = DecodeIndex::segments(decode.K);
  Gather<kDtype, kM> gather(decode, first_row + group * W::kRows + row_in_warp, lane % W::kLanes);
  for (int64_t stage = 0; stage < segments; stage += W::kStaged) {
    const int64_t count = segments - stage < W::kStaged ? segments - stage : W::kStaged;
    gather.begin(stage + count * split / splits, stage + count * (split + 1) / splits);
    const int64_t first = stage * kSegment, last = first + count * kSegment;
    if (stage > 0) __syncthreads();  // nobody reads the columns any more
    stage_input<kDtype, kM>(staged, decode, first_m, first, last < decode.K ? last : decode.K);
    __syncthreads();
    gather.add(staged - first * W::kParts);
  }
#pragma unroll
  for (int i = 0; i < W::kPart; ++i) {
#pragma unroll
    for (int step = W::kLanes / 2; step >= W::kParts; step /= 2) {
      gather.sums[i] += __shfl_xor_sync(kAllLanes, gather.sums[i], step);
    }
    const int m = gather.part * W::kPart + i;
    if (gather.lane == 0) partial[warp][m * W::kRows + row_in_warp] = gather.sums[i];
  }
  __syncthreads();
  const int rows = groups * W::kRows;
  for (int i = threadIdx.x; i < rows * kM; i += W::kThreads) {
    const int m = i / rows, r = i % rows;
    const int64_t row = first_row + r;
    if (row >= decode.N || first_m + m >= decode.M) continue;
    float sum = decode.bias ? W::V::widen(static_cast<const Storage*>(decode.bias)[row]) : 0.f;
    for (int s = 0; s < splits; ++s) sum += partial[s * groups + r / W::kRows][m * W::kRows + r % W::kRows];
    static_cast<Storage*>(decode.output)[(first_m + m) * decode.N + row] = W::V::round(sum);
  }
}

template <int kDtype, int kM>
int gather(const Decode& decode) {
  using W = Way<kDtype, kM>;
  constexpr int kBlocks = tuning::kDecodeMultiprocessors * W::kBlocks;
  const int64_t segments = DecodeIndex::segments(decode.K), warps = ceil_div<int64_t>(decode.N, W::kRows);
  int splits = 1;
  while (splits < W::kWarps && splits < segments && ceil_div<int64_t>(warps * splits, W::kWarps) < kBlocks) splits *= 2;
  // One step back from where there would be more blocks than run at once.
  if (splits > 1 && ceil_div<int64_t>(warps * splits, W::kWarps) > kBlocks) splits /= 2;
  const int64_t blocks = ceil_div<int64_t>(warps * splits, W::kWarps);
  if (blocks > INT32_MAX) return kUnsupported;
  const int64_t staged = W::kStaged < segments ? W::kStaged : segments;
  return launch(decode_gather_kernel<kDtype, kM>, dim3(uint32_t(blocks), uint32_t(ceil_div<int64_t>(decode.M, kM))),
                W::kThreads, size_t(staged) * kSegment * kM * sizeof(typename W::Staged), decode.stream, decode,
                splits);
}

bool takes_mma(int dtype, int64_t M) { return M > tuning::kLeastMmaRows && dtype != kFloat; }

// Up to kMostGatherRows, few values are still gathered faster.
bool takes_mma(int dtype, const Decode& d) {
  const bool few = double(d.nnz) < tuning::kGatherDensity * double(d.N) * double(d.K);
  return takes_mma(dtype, d.M) && (d.M > tuning::kMostGatherRows || !few);
}

template <int kDtype>
int gather_some(const Decode& decode) {
  if (decode.M == 1) return gather<kDtype, 1>(decode);
  if (decode.M == 2) return gather<kDtype, 2>(decode);
  if (decode.M <= 4) return gather<kDtype, 4>(decode);
  return decode.M <= 8 || kDtype == kFloat ? gather<kDtype, 8>(decode) : gather<kDtype, 16>(decode);
}

}  // namespace
}  // namespace masked_ops::cuda

size_t masked_ops_cuda_decode_index_bytes(int64_t N, int64_t K, int64_t nnz) {
  using namespace masked_ops::cuda;
  return nnz > kMaxNnz || K > kMostDecodeColumns ? 0 : DecodeIndex::bytes(N, K, nnz);
}

int masked_ops_cuda_decode_index(const uint64_t* words, int64_t N, int64_t K, int64_t nnz, const int64_t* offsets,
                                 void* index, void* stream) {
  using namespace masked_ops::cuda;
  if (nnz > kMaxNnz || K > kMostDecodeColumns) return kUnsupported;
  if (N == 0 || K == 0) return 0;
  const DecodeIndex to = DecodeIndex::of(index, N, K);
  const Pieces pieces = Pieces::of(words, offsets, N, K);
  if (pieces.blocks() > INT32_MAX) return kUnsupported;
  return launch(decode_index_kernel, uint32_t(pieces.blocks()), tuning::kPassThreads, 0, stream, pieces,
                DecodeIndex::segments(K), const_cast<uint32_t*>(to.begins), const_cast<uint16_t*>(to.columns));
}

size_t masked_ops_cuda_decode_workspace(int dtype, int64_t M, int64_t N, int64_t K) {
  using namespace masked_ops::cuda;
  return takes_mma(dtype, M) ? decode_mma_workspace(M, N, K) : 0;
}

int masked_ops_cuda_decode(int dtype, int64_t M, int64_t N, int64_t K, int64_t nnz, const void* input,
                           const void* values, const void* index, const void* bias, void* output, void* workspace,
                           void* stream) {
  using namespace masked_ops::cuda;
  if (dtype != kFloat && dtype != kBFloat16 && dtype != kHalf) return kUnsupported;
  if (M > 64 || nnz > kMaxNnz || K > kMostDecodeColumns || !is_aligned(input, 16) || !is_aligned(values, 16) ||
      !is_aligned(index, 16)) {
    return kUnsupported;
  }
  if (M == 0 || N == 0) return 0;
  const Decode decode{M, N, K, nnz, input, values, DecodeIndex::of(index, N, K), bias, output, workspace, stream};
  if (takes_mma(dtype, decode)) return decode_mma(dtype, decode);
  if (dtype == kFloat) return gather_some<kFloat>(decode);
  return dtype == kHalf ? gather_some<kHalf>(decode) : gather_some<kBFloat16>(decode);
}
