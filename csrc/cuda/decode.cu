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

template <typename Column>
__global__ void __launch_bounds__(tuning::kPassThreads, tuning::kPassBlocks)
    decode_index_kernel(Pieces pieces, int64_t segments, uint32_t* __restrict__ begins, Column* __restrict__ columns) {
  for_columns(pieces, [&](int64_t row, int64_t col, bool set, int64_t position) {
    if (col % kSegment == 0) begins[row * segments + col / kSegment] = uint32_t(position);
    if (set) columns[position] = Column(sizeof(Column) == 1 ? col % kSegment : col);
    if (row + 1 == pieces.rows && col + 1 == pieces.cols) {
      position += set;
      begins[pieces.rows * segments] = uint32_t(position);
      for (; position % 8 != 0; ++position) columns[position] = 0;
    }
  });
}

constexpr int kWarps = tuning::kGatherThreads / kWarp;
constexpr int64_t kMaxNnz = UINT32_MAX - 4096;     // a position may run ahead of the last
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

// Goes through neighbouring values of a row a step at a time: with a narrow index to the end of a segment, and on with
// the next.
template <bool kNarrow>
struct Cursor {
  static constexpr int kGroup = 8, kStep = kGroup * kLanes;
  const uint32_t* next = nullptr;           // where the segment after this one ends
  int64_t left = 0;                         // segments after this one
  uint32_t from = 0, to = 0, position = 0;  // of the values that are taken; of the first lane's group
  uint32_t column = 0;                      // of the segment

  // Segments first to last - 1 of a row.
  MASKED_OPS_DEVICE void begin(const uint32_t* begins, int64_t first_segment, int64_t last_segment) {
    from = begins[first_segment], to = begins[kNarrow ? first_segment + 1 : last_segment];
    next = begins + first_segment + 2, left = last_segment - first_segment - 1;
    position = from / kGroup * kGroup;
    column = kNarrow ? uint32_t(first_segment) * kSegment : 0;
    if (kNarrow && first_segment == last_segment) to = from;
    skip();
  }
  MASKED_OPS_DEVICE void step() {
    position += kStep;
    skip();
  }

 private:
  MASKED_OPS_DEVICE void skip() {
    while (kNarrow && position >= to && left > 0) {
      from = to, to = *next++, --left;
      position = from / kGroup * kGroup;
      column += kSegment;
    }
  }
};

// What a lane has of its row: the remaining weights of some neighbouring segments, a group at a time, of which the next
// kAhead are on their way.
template <int kDtype, int kM, bool kNarrow>
struct Gather {
  using V = Value<kDtype>;
  using Values = Group<kDtype, kNarrow>;
  static constexpr int kGroup = Values::kSize;
  static constexpr int kAhead = kDtype != kFloat && kM == 1 ? tuning::kGatherAhead : 1;
  static constexpr int64_t kStaged = tuning::kGatherInputBytes / sizeof(Column<kDtype, kM>) / kSegment;  // segments

  const Decode& decode;
  int64_t row;
  int lane;  // of the row
  float sums[kM] = {};
  Cursor<kNarrow> cursor;
  // A group under way: which of its values are of the segment, from the first to before the last, and the segment's
  // column. There is none once the row has come to its end.
  struct {
    bool there;
    int first, last;
    uint32_t column;
    Values values;
  } ahead[kAhead];

  MASKED_OPS_DEVICE Gather(const Decode& of, int64_t row, int lane) : decode(of), row(row), lane(lane) {}
  MASKED_OPS_DEVICE void fetch(int i) {
    const uint32_t position = cursor.position + lane * kGroup;
    ahead[i].there = cursor.position < cursor.to;
    ahead[i].first = position < cursor.from ? int(cursor.from - position) : 0;
    ahead[i].last = position >= cursor.to ? 0 : cursor.to - position < kGroup ? int(cursor.to - position) : kGroup;
    ahead[i].column = cursor.column;
    if (position < cursor.to) ahead[i].values.load(decode.values, decode.index, position, decode.nnz);
    cursor.step();
  }
  MASKED_OPS_DEVICE void begin(int64_t first, int64_t last) {
    cursor = {};
    if (row < decode.N) cursor.begin(decode.index.begins + row * DecodeIndex::segments(decode.K), first, last);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetch(i);
  }
  // columns: of the whole row, of which only those of the segments are there.
  MASKED_OPS_DEVICE void add(const Column<kDtype, kM>* columns) {
    while (ahead[0].there) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const Column<kDtype, kM>* const segment = columns + (kNarrow ? ahead[i].column : 0);
        const Values& values = ahead[i].values;
        const int first = ahead[i].first, last = ahead[i].last;
        if (last - first == kGroup) {
#pragma unroll
          for (int e = 0; e < kGroup; ++e) {
            segment[values.column(e)].add_to(sums, V::widen(values.value(e)));
            // Else wide columns are loaded too far ahead for the registers that there are.
            if (kM >= 4 && e % 2 == 1) asm volatile("" ::: "memory");
          }
        } else {
#pragma unroll
          for (int e = 0; e < kGroup; ++e) {
            if (e >= first && e < last) segment[values.column(e)].add_to(sums, V::widen(values.value(e)));
          }
        }
        fetch(i);
      }
    }
  }
};

template <int kDtype, int kM, bool kNarrow>
__global__ void __launch_bounds__(tuning::kGatherThreads, tuning::kGatherBlocks)
    decode_gather_kernel(const __grid_constant__ Decode decode, int splits) {
  using G = Gather<kDtype, kM, kNarrow>;
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

template <int kDtype, int kM, bool kNarrow>
int gather(const Decode& decode) {
  using G = Gather<kDtype, kM, kNarrow>;
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
  return launch(decode_gather_kernel<kDtype, kM, kNarrow>,
                dim3(uint32_t(blocks), uint32_t(ceil_div<int64_t>(decode.M, kM))), tuning::kGatherThreads,
                size_t(staged) * kSegment * sizeof(Column<kDtype, kM>), decode.stream, decode, splits);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool takes_mma(int dtype, int64_t M) { return M > 8 && dtype != kFloat; }

template <int kDtype, bool kNarrow>
int gather_some(const Decode& decode) {
  if (decode.M == 1) return gather<kDtype, 1, kNarrow>(decode);
  if (decode.M == 2) return gather<kDtype, 2, kNarrow>(decode);
  // 16 bytes a column at most: what one load from shared memory takes.
  if (decode.M <= 4) return gather<kDtype, 4, kNarrow>(decode);
  return gather<kDtype, kDtype == kFloat ? 4 : 8, kNarrow>(decode);
}

template <bool kNarrow>
int decode_some(int dtype, const Decode& decode) {
  if (takes_mma(dtype, decode.M)) return decode_mma(dtype, decode);
  if (dtype == kFloat) return gather_some<kFloat, kNarrow>(decode);
  return dtype == kHalf ? gather_some<kHalf, kNarrow>(decode) : gather_some<kBFloat16, kNarrow>(decode);
}

}  // namespace
}  // namespace masked_ops::cuda

size_t masked_ops_cuda_decode_index_bytes(int64_t N, int64_t K, int64_t nnz) {
  using namespace masked_ops::cuda;
  return nnz > kMaxNnz ? 0 : DecodeIndex::bytes(N, K, nnz);
}

int masked_ops_cuda_decode_index(const uint64_t* words, int64_t N, int64_t K, int64_t nnz, const int64_t* offsets,
                                 void* index, void* stream) {
  using namespace masked_ops::cuda;
  if (nnz > kMaxNnz) return kUnsupported;
  if (N == 0 || K == 0) return 0;
  const DecodeIndex to = DecodeIndex::of(index, N, K);
  const Pieces pieces = Pieces::of(words, offsets, N, K);
  if (pieces.blocks() > INT32_MAX) return kUnsupported;
  const auto put = [&](auto kernel, auto* columns) {
    return launch(kernel, uint32_t(pieces.blocks()), tuning::kPassThreads, 0, stream, pieces, DecodeIndex::segments(K),
                  const_cast<uint32_t*>(to.begins), columns);
  };
  uint8_t* const columns = const_cast<uint8_t*>(to.columns);
  return DecodeIndex::narrow(N, K, nnz) ? put(decode_index_kernel<uint8_t>, columns)
                                        : put(decode_index_kernel<uint16_t>, reinterpret_cast<uint16_t*>(columns));
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
  if (M > 64 || nnz > kMaxNnz || !aligned(input) || !aligned(values) || !aligned(index)) return kUnsupported;
  if (M == 0 || N == 0) return 0;
  const Decode decode{M, N, K, nnz, input, values, DecodeIndex::of(index, N, K), bias, output, workspace, stream};
  return DecodeIndex::narrow(N, K, nnz) ? decode_some<true>(dtype, decode) : decode_some<false>(dtype, decode);
}
