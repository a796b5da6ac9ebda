// A linear layer on few rows of input, out of the remaining weights: M <= 8 here, more rows in decode_mma.cu.
//
// Eight lanes take a row of the weight, eight remaining weights a lane and step, and look the input up in shared
// memory, where the M values of a column lie together. A warp takes four rows, or some neighbouring segments of them;
// what the warps of a block have of the same rows is summed at the end, always in the same order.
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

constexpr int kWarps = tuning::kGatherThreads / kWarp;
constexpr int64_t kMaxNnz = UINT32_MAX - 64;       // a position may run ahead of the last
constexpr int kLanes = 8, kRows = kWarp / kLanes;  // lanes of a row, rows of a warp

// The M values of a column of the input. One value alone lies there as the float that it is used as.
template <int kDtype, int kM>
struct Column {
  using V = Value<kDtype>;
  using Storage = std::conditional_t<kM == 1, float, typename V::Storage>;
  struct alignas(kM * sizeof(Storage)) Values {
    Storage of[kM];
  };
  Values values;

  MASKED_OPS_DEVICE void set(int m, typename V::Storage x) {
    if constexpr (kM == 1) {
      values.of[m] = V::widen(x);
    } else {
      values.of[m] = x;
    }
  }
  MASKED_OPS_DEVICE void add_to(float (&sums)[kM], float factor) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if constexpr (kM == 1) {
        sums[m] += factor * values.of[m];
      } else {
        sums[m] += factor * V::widen(values.of[m]);
      }
    }
  }
};

// input[m][k] to column[k], zeros beyond M. Two neighbours in a row are loaded at once where they lie in one word.
template <int kDtype, int kM>
MASKED_OPS_DEVICE void stage_input(Column<kDtype, kM>* to, const Decode& decode, int64_t first_m, int64_t first,
                                   int64_t last) {
  using V = Value<kDtype>;
  using Storage = typename V::Storage;
  const Storage* const input = static_cast<const Storage*>(decode.input) + first_m * decode.K;
  const int rows = decode.M - first_m < kM ? int(decode.M - first_m) : kM;
  if (sizeof(Storage) == 2 && decode.K % 2 == 0) {
#pragma unroll(sizeof(Column<kDtype, kM>) < 16 ? 4 : 1)
    for (int64_t k = first + 2 * threadIdx.x; k < last; k += 2 * tuning::kGatherThreads) {
      Column<kDtype, kM> columns[2];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const uint32_t pair = m < rows ? *reinterpret_cast<const uint32_t*>(input + m * decode.K + k) : 0;
        columns[0].set(m, V::of_bits(pair));
        columns[1].set(m, V::of_bits(pair >> 16));
      }
      to[k - first] = columns[0];
      to[k - first + 1] = columns[1];
    }
    return;
  }
#pragma unroll(sizeof(Column<kDtype, kM>) < 16 ? 4 : 1)
  for (int64_t k = first + threadIdx.x; k < last; k += tuning::kGatherThreads) {
    Column<kDtype, kM> column;
#pragma unroll
    for (int m = 0; m < kM; ++m) column.set(m, m < rows ? input[m * decode.K + k] : Storage{});
    to[k - first] = column;
  }
}

// What a lane has of its row: the remaining weights of some neighbouring segments, a group at a time, of which the next
// kAhead are on their way.
template <int kDtype, int kM>
struct Gather {
  using V = Value<kDtype>;
  static constexpr int kGroup = Group<kDtype>::kSize, kStep = kGroup * kLanes;
  static constexpr int kAhead = sizeof(Column<kDtype, kM>) < 16 ? tuning::kGatherAhead : 1;
  static constexpr int64_t kStaged = tuning::kGatherInputBytes / sizeof(Column<kDtype, kM>) / kSegment;  // segments

  const Decode& decode;
  int64_t row;
  int lane;  // of the row
  float sums[kM] = {};
  uint32_t from = 0, to = 0;
  Group<kDtype> groups[kAhead];

  MASKED_OPS_DEVICE Gather(const Decode& of, int64_t row, int lane) : decode(of), row(row), lane(lane) {}
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
    for (int i = 0; i < kAhead; ++i) load(groups[i], first_position() + i * kStep);
  }
  // columns: of the whole row, of which only those of the segments are there.
  MASKED_OPS_DEVICE void add(const Column<kDtype, kM>* columns) {
    for (uint32_t position = first_position(); position < to;) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const Group<kDtype>& group = groups[i];
        if (position >= from && position + kGroup <= to) {
#pragma unroll
          for (int e = 0; e < kGroup; ++e) {
            columns[group.column(e)].add_to(sums, V::widen(group.value(e)));
            // Else wide columns are loaded too far ahead for the registers that there are.
            if (sizeof(Column<kDtype, kM>) >= 16 && e % 2 == 1) asm volatile("" ::: "memory");
          }
        } else {
#pragma unroll
          for (int e = 0; e < kGroup; ++e) {
            if (position + e - from < to - from) {  // unsigned: not before from either
              columns[group.column(e)].add_to(sums, V::widen(group.value(e)));
            }
          }
        }
        load(groups[i], position + kAhead * kStep);
        position += kStep;
      }
    }
  }
};

template <int kDtype, int kM>
__global__ void __launch_bounds__(tuning::kGatherThreads, tuning::kGatherBlocks)
    decode_gather_kernel(const __grid_constant__ Decode decode, int splits) {
  using G = Gather<kDtype, kM>;
  using Storage = typename G::V::Storage;
  auto* const staged = reinterpret_cast<Column<kDtype, kM>*>(dynamic_shared);
  __shared__ float partial[kWarps][kRows * kM];
  const int groups = kWarps / splits, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = warp % groups, split = warp / groups;
  const int64_t first_row = int64_t(blockIdx.x) * groups * kRows, first_m = int64_t(blockIdx.y) * kM;
  const int64_t segments = DecodeIndex::segments(decode.K);
  G gather(decode, first_row + group * kRows + lane / kLanes, lane % kLanes);
  for (int64_t stage = 0; stage < segments; stage += G::kStaged) {
    const int64_t count = segments - stage < G::kStaged ? segments - stage : G::kStaged;
    gather.begin(stage + count * split / splits, stage + count * (split + 1) / splits);
    const int64_t first = stage * kSegment, last = first + count * kSegment;
    if (stage > 0) __syncthreads();  // nobody reads the columns any more
    stage_input<kDtype, kM>(staged, decode, first_m, first, last < decode.K ? last : decode.K);
    __syncthreads();
    gather.add(staged - first);
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      gather.sums[m] += __shfl_xor_sync(kAllLanes, gather.sums[m], step);
    }
    if (lane % kLanes == 0) partial[warp][m * kRows + lane / kLanes] = gather.sums[m];
  }
  __syncthreads();
  const int rows = groups * kRows;
  for (int i = threadIdx.x; i < rows * kM; i += tuning::kGatherThreads) {
    const int m = i / rows, r = i % rows;
    const int64_t row = first_row + r;
    if (row >= decode.N || first_m + m >= decode.M) continue;
    float sum = decode.bias ? G::V::widen(static_cast<const Storage*>(decode.bias)[row]) : 0.f;
    for (int s = 0; s < splits; ++s) sum += partial[s * groups + r / kRows][m * kRows + r % kRows];
    static_cast<Storage*>(decode.output)[(first_m + m) * decode.N + row] = G::V::round(sum);
  }
}

template <int kDtype, int kM>
int gather(const Decode& decode) {
  using G = Gather<kDtype, kM>;
  const int64_t segments = DecodeIndex::segments(decode.K), warps = ceil_div<int64_t>(decode.N, kRows);
  int splits = 1;
  while (splits < kWarps && splits < segments && ceil_div<int64_t>(warps * splits, kWarps) < tuning::kDecodeBlocks) {
    splits *= 2;
  }
  // One step back from where there would be more blocks than run at once.
  if (splits > 1 && ceil_div<int64_t>(warps * splits, kWarps) > tuning::kDecodeBlocks) splits /= 2;
  const int64_t blocks = ceil_div<int64_t>(warps * splits, kWarps);
  if (blocks > INT32_MAX) return kUnsupported;
  const int64_t staged = G::kStaged < segments ? G::kStaged : segments;
  return launch(decode_gather_kernel<kDtype, kM>, dim3(uint32_t(blocks), uint32_t(ceil_div<int64_t>(decode.M, kM))),
                tuning::kGatherThreads, size_t(staged) * kSegment * sizeof(Column<kDtype, kM>), decode.stream, decode,
                splits);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool takes_mma(int dtype, int64_t M) { return M > 8 && dtype != kFloat; }

template <int kDtype>
int gather_some(const Decode& decode) {
  if (decode.M == 1) return gather<kDtype, 1>(decode);
  if (decode.M == 2) return gather<kDtype, 2>(decode);
  // 16 bytes a column at most: what one load from shared memory takes.
  return decode.M <= 4 ? gather<kDtype, 4>(decode) : gather<kDtype, kDtype == kFloat ? 4 : 8>(decode);
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
  if (M > 64 || nnz > kMaxNnz || K > kMostDecodeColumns || !aligned(input) || !aligned(values) || !aligned(index))
    return kUnsupported;
  if (M == 0 || N == 0) return 0;
  const Decode decode{M, N, K, nnz, input, values, DecodeIndex::of(index, N, K), bias, output, workspace, stream};
  if (takes_mma(dtype, M)) return decode_mma(dtype, decode);
  if (dtype == kFloat) return gather_some<kFloat>(decode);
  return dtype == kHalf ? gather_some<kHalf>(decode) : gather_some<kBFloat16>(decode);
}
