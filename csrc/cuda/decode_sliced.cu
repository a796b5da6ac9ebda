// A linear layer on up to four rows of input, out of weights in slices (sliced.h), bf16 and fp16.
//
// A block keeps the input in shared memory, as floats, where a column's place is made of a lane's base and the byte
// that says which of its columns it is: one instruction. Some warps share a slice's steps, and what they have is added
// up at the end, always in the same order.
#include "numeric.h"
#include "ptx.h"
#include "sliced.h"
#include "tuning.h"

namespace masked_ops::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int64_t kMostSlicedColumns = 1 << 28;  // four rows of input are 2^31 bytes

struct SlicedDecode {
  int64_t M, N, K;
  const uint16_t* input;
  const int32_t* order;
  const SlicedPiece* pieces;
  const uint8_t* data;
  const uint16_t* bias;
  uint16_t* output;
  int log_parts, rounds;  // warps of a slice, a power of 2; slices that a warp takes, one after the other

  MASKED_OPS_BOTH int parts() const { return 1 << log_parts; }
  MASKED_OPS_BOTH int at_once() const { return kWarps >> log_parts; }  // slices of a block
  // Neighbours are about as long: they are dealt out over blocks.
  MASKED_OPS_DEVICE int64_t slice(int round, int i) const {
    return (int64_t(round) * at_once() + i) * gridDim.x + blockIdx.x;
  }
};

// The input in shared memory, kM rows of it, in lines of 256 bytes: 32 columns of 4 (of two segments side by side) or 8
// bytes, or 16 of 16 bytes, of which the upper half of the lanes has a table of its own.
template <int kM>
struct Table {
  static constexpr int kColumnBytes = 4 * kM, kSegments = kM == 1 ? 2 : 1;
  static constexpr bool kHalves = kColumnBytes == 16;
  static constexpr int kLine = 256, kUpper = 65536;

  MASKED_OPS_BOTH static uint32_t base(uint32_t lane, int segment) {
    return kHalves ? lane % 16 * 16 + lane / 16 * kUpper : lane * kColumnBytes + segment * 128;
  }
  MASKED_OPS_BOTH static uint32_t at(uint32_t column, int segment) {
    return column / 32 * kLine + base(column % 32, segment);
  }
  static size_t bytes(int64_t columns) {
    const int64_t lines = ceil_div<int64_t>(columns < kSliceColumns ? columns : kSliceColumns, 32);
    return size_t(lines * kLine + (kHalves ? kUpper : 0));
  }
};

// What a warp has of a piece.
struct Steps {
  const uint8_t* strict = nullptr;  // the first of each kind
  const uint8_t* loose = nullptr;
  int stricts = 0, looses = 0;

  MASKED_OPS_DEVICE void find(const SlicedDecode& of, int64_t slice, int64_t segment, int part) {
    stricts = looses = 0;
    const int64_t segments = slice_segments(of.K);
    if (slice >= slices_of(of.N) || segment >= segments) return;
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(of.pieces) + slice * segments + segment);
    const SlicedPiece piece = {words.x, words.y, words.z, words.w};
    const uint32_t first = piece.strict * part >> of.log_parts;
    // Loose steps the other way round, so that the last part, which is the longest, has the fewest.
    const uint32_t back = of.parts() - 1 - part, first_loose = piece.loose * back >> of.log_parts;
    stricts = int((piece.strict * (part + 1) >> of.log_parts) - first);
    looses = int((piece.loose * (back + 1) >> of.log_parts) - first_loose);
    strict = of.data + strict_at(piece, first);
    loose = of.data + loose_at(piece, first_loose);
  }
};

template <int kDtype>
MASKED_OPS_DEVICE float low(uint32_t pair) {
  return kDtype == kBFloat16 ? __uint_as_float(pair << 16) : to_float<false>(uint16_t(pair));
}
template <int kDtype>
MASKED_OPS_DEVICE float high(uint32_t pair) {
  return kDtype == kBFloat16 ? __uint_as_float(pair & 0xffff0000) : to_float<false>(uint16_t(pair >> 16));
}

template <int kDtype, int kM>
struct Lookup {
  using T = Table<kM>;
  static constexpr int kAhead = kM == 4 ? 4 : 2, kSums = kSliceRows * kM;
  struct Strict {
    uint4 values;
    uint2 lines;
  };
  const SlicedDecode& decode;
  float sums[kSums] = {};
  Steps steps;
  Strict ahead[kAhead];

  MASKED_OPS_DEVICE explicit Lookup(const SlicedDecode& of) : decode(of) {}
  MASKED_OPS_DEVICE static int lane() { return int(threadIdx.x % kWarp); }

  MASKED_OPS_DEVICE void load(Strict& to, int step) const {
    const uint8_t* const from = steps.strict + step * kStrictBytes;
    to.values = __ldcs(reinterpret_cast<const uint4*>(from) + lane());
    to.lines = __ldcs(reinterpret_cast<const uint2*>(from + kStepValues) + lane());
  }
  // One row of the slice.
  template <int kRow>
  MASKED_OPS_DEVICE void add(const uint4& values, uint32_t place) {
    const uint32_t pair = kRow < 2 ? values.x : kRow < 4 ? values.y : kRow < 6 ? values.z : values.w;
    const float value = kRow % 2 ? high<kDtype>(pair) : low<kDtype>(pair);
    if constexpr (kM == 1) {
      sums[kRow] += value * *reinterpret_cast<const float*>(dynamic_shared + place);
    } else if constexpr (kM == 2) {
      const float2 x = *reinterpret_cast<const float2*>(dynamic_shared + place);
      sums[2 * kRow] += value * x.x;
      sums[2 * kRow + 1] += value * x.y;
    } else {
      const float4 x = *reinterpret_cast<const float4*>(dynamic_shared + place);
      sums[4 * kRow] += value * x.x;
      sums[4 * kRow + 1] += value * x.y;
      sums[4 * kRow + 2] += value * x.z;
      sums[4 * kRow + 3] += value * x.w;
    }
  }
  template <int kRow = 0>
  MASKED_OPS_DEVICE void add_strict(const Strict& step, uint32_t base) {
    // The byte becomes the place's second.
    add<kRow>(step.values, select_bytes<0x7604 | kRow % 4 << 4>(kRow < 4 ? step.lines.x : step.lines.y, base));
    if constexpr (kRow + 1 < kSliceRows) add_strict<kRow + 1>(step, base);
  }
  template <int kRow = 0>
  MASKED_OPS_DEVICE void add_loose(const uint4& values, const uint4& columns, int segment) {
    const uint32_t pair = kRow < 2 ? columns.x : kRow < 4 ? columns.y : kRow < 6 ? columns.z : columns.w;
    add<kRow>(values, T::at(kRow % 2 ? pair >> 16 : pair & 0xffff, segment));
    if constexpr (kRow + 1 < kSliceRows) add_loose<kRow + 1>(values, columns, segment);
  }

  MASKED_OPS_DEVICE void begin(int64_t slice, int64_t segment, int part) {
    steps.find(decode, slice, segment, part);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < steps.stricts) load(ahead[i], i);
    }
  }
  // The segment that was begun, which lies in shared memory as this one of those that are there.
  MASKED_OPS_DEVICE void finish(int segment) {
    const uint32_t base = T::base(lane(), segment);
    uint4 values = {}, columns = {};
    const uint8_t* from = steps.loose + lane() * 16;
    if (steps.looses > 0) values = load16(from), columns = load16(from + kStepValues);
    for (int step = 0; step < steps.stricts; step += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (step + i < steps.stricts) add_strict(ahead[i], base);
        if (step + i + kAhead < steps.stricts) load(ahead[i], step + i + kAhead);
      }
    }
    for (int step = 0; step < steps.looses; ++step) {
      if (step > 0) values = load16(from), columns = load16(from + kStepValues);
      add_loose(values, columns, segment);
      from += kLooseBytes;
    }
  }
  MASKED_OPS_DEVICE static uint4 load16(const uint8_t* from) { return __ldcs(reinterpret_cast<const uint4*>(from)); }

  // Adds the sums up over the lanes: halves of them against halves of the lanes, until each has one.
  template <int kCount, int kStep>
  MASKED_OPS_DEVICE void fold() {
    if constexpr (kCount > 1) {
      const bool upper = lane() & kStep;
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        const float mine = upper ? sums[i + kCount / 2] : sums[i], other = upper ? sums[i] : sums[i + kCount / 2];
        sums[i] = mine + __shfl_xor_sync(kAllLanes, other, kStep);
      }
      fold<kCount / 2, kStep / 2>();
    } else if constexpr (kStep > 0) {
      sums[0] += __shfl_xor_sync(kAllLanes, sums[0], kStep);
      fold<1, kStep / 2>();
    }
  }
  MASKED_OPS_DEVICE void leave(float* to) {
    fold<kSums, kWarp / 2>();
    constexpr int kLanes = kWarp / kSums;  // that have the same
    if (lane() % kLanes == 0) to[lane() / kLanes] = sums[0];
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0.f;
  }
};

// --- staging ---

// Two neighbouring columns of some rows, from words of two values each, to place and behind it.
template <int kDtype, int kM>
MASKED_OPS_DEVICE void put_columns(uint32_t place, const uint32_t (&words)[kM]) {
  uint8_t* const to = dynamic_shared + place;
  if constexpr (kM == 1) {
    *reinterpret_cast<float2*>(to) = {low<kDtype>(words[0]), high<kDtype>(words[0])};
  } else if constexpr (kM == 2) {
    *reinterpret_cast<float4*>(to) = {low<kDtype>(words[0]), low<kDtype>(words[1]), high<kDtype>(words[0]),
                                      high<kDtype>(words[1])};
  } else {
    reinterpret_cast<float4*>(to)[0] = {low<kDtype>(words[0]), low<kDtype>(words[1]), low<kDtype>(words[2]),
                                        low<kDtype>(words[3])};
    reinterpret_cast<float4*>(to)[1] = {high<kDtype>(words[0]), high<kDtype>(words[1]), high<kDtype>(words[2]),
                                        high<kDtype>(words[3])};
  }
}

// Brings columns from a segment on to the table, zeros up to a multiple of 32 and for rows beyond M: first() asks for
// what the first batch needs, and the rest is done by finish().
template <int kDtype, int kM>
struct Staging {
  using T = Table<kM>;
  static constexpr int kBatch = kM == 2 ? 2 : 4, kStep = kBatch * 2 * kThreads;
  const uint8_t* input;
  uint32_t stride;  // bytes
  int columns, rows;
  uint32_t words[kBatch][kM];

  MASKED_OPS_DEVICE static int column(int from, int i) { return from + 2 * int(i * kThreads + threadIdx.x); }
  MASKED_OPS_DEVICE void load(int from) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int k = column(from, i);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const uint8_t* const from = input + (m * stride + 2 * uint32_t(k));
        words[i][m] = m < rows && k < columns ? __ldg(reinterpret_cast<const uint32_t*>(from)) : 0;
      }
    }
  }
  MASKED_OPS_DEVICE void first(const SlicedDecode& decode, int64_t segment) {
    const int64_t first = segment * kSliceColumns, left = decode.K - first;
    input = reinterpret_cast<const uint8_t*>(decode.input + first);
    stride = uint32_t(2 * decode.K);
    columns = int(left < T::kSegments * kSliceColumns ? left : T::kSegments * kSliceColumns);
    rows = int(decode.M);
    load(0);
  }
  MASKED_OPS_DEVICE void finish() {
    const int padded = ceil_div(columns, 32) * 32;
#pragma unroll 1
    for (int from = 0; from < padded; from += kStep) {
      if (from > 0) load(from);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int k = column(from, i);
        if (k < padded) put_columns<kDtype, kM>(T::at(k % kSliceColumns, k / kSliceColumns), words[i]);
      }
    }
  }
};

// --- the kernel ---

template <int kM>
constexpr int kBlocks = Table<kM>::kHalves ? 1 : 2;  // of a multiprocessor

template <int kDtype, int kM>
__global__ void __launch_bounds__(kThreads, kBlocks<kM>)
    decode_sliced_kernel(const __grid_constant__ SlicedDecode decode) {
  using T = Table<kM>;
  __shared__ float partial[kWarps][kSliceRows * kM];
  const int warp = threadIdx.x / kWarp, part = warp % decode.parts();
  const int64_t segments = slice_segments(decode.K);
  Lookup<kDtype, kM> reader(decode);
  Staging<kDtype, kM> staging;
  for (int round = 0; round < decode.rounds; ++round) {
    const int64_t slice = decode.slice(round, warp >> decode.log_parts);
    for (int64_t stage = 0; stage < segments; stage += T::kSegments) {
      const bool fresh = round == 0 || segments > T::kSegments;
      if (fresh) {
        if (round + stage > 0) __syncthreads();  // nobody reads the columns any more
        staging.first(decode, stage);
      }
      reader.begin(slice, stage, part);
      if (fresh) {
        staging.finish();
        __syncthreads();
      }
#pragma unroll 1
      for (int s = 0; s < T::kSegments && stage + s < segments; ++s) {
        if (s > 0) reader.begin(slice, stage + s, part);
        reader.finish(s);
      }
    }
    reader.leave(partial[warp]);
    __syncthreads();
    const int mine = threadIdx.x / (kSliceRows * kM), i = threadIdx.x % (kSliceRows * kM);
#pragma unroll 1
    for (int s = mine; s < decode.at_once(); s += kThreads / (kSliceRows * kM)) {
      const int64_t slice_of_s = decode.slice(round, s), m = i % kM;
      const int32_t row = slice_of_s < slices_of(decode.N) ? decode.order[slice_of_s * kSliceRows + i / kM] : -1;
      if (row < 0 || m >= decode.M) continue;
      float sum = decode.bias ? to_float<kDtype == kBFloat16>(decode.bias[row]) : 0.f;
#pragma unroll 1
      for (int p = 0; p < decode.parts(); ++p) sum += partial[(s << decode.log_parts) + p][i];
      decode.output[m * decode.N + row] = uint16_t(round_pair<kDtype == kBFloat16>(sum, 0.f));
    }
    if (round + 1 < decode.rounds) __syncthreads();  // before the sums are written anew
  }
}

// So many warps share a slice that all are done first; as few as do.
template <int kM>
int64_t deal_out(SlicedDecode& decode) {
  const int64_t slices = slices_of(decode.N), most = tuning::kDecodeMultiprocessors * kBlocks<kM>;
  double best = 0;
  for (int log_parts = 0; 1 << log_parts <= kWarps; ++log_parts) {
    const int64_t rounds = ceil_div<int64_t>(slices, most * (kWarps >> log_parts));
    const double time = double(rounds) / (1 << log_parts);
    if (log_parts > 0 && time >= best) continue;
    best = time, decode.log_parts = log_parts, decode.rounds = int(rounds);
  }
  return ceil_div<int64_t>(slices, int64_t(decode.rounds) * decode.at_once());
}

template <int kDtype, int kM>
int run(SlicedDecode decode, void* stream) {
  const int64_t blocks = deal_out<kM>(decode);
  if (ceil_div<int64_t>(slices_of(decode.N), kWarps) > INT32_MAX) return kUnsupported;
  const size_t bytes = Table<kM>::bytes(decode.K);
  return launch(decode_sliced_kernel<kDtype, kM>, uint32_t(blocks), kThreads, bytes, stream, decode);
}

template <int kDtype>
int run(const SlicedDecode& decode, void* stream) {
  if (decode.M == 1) return run<kDtype, 1>(decode, stream);
  return decode.M == 2 ? run<kDtype, 2>(decode, stream) : run<kDtype, 4>(decode, stream);
}

}  // namespace
}  // namespace masked_ops::cuda

int masked_ops_cuda_decode_sliced(int dtype, int64_t M, int64_t N, int64_t K, const void* input, const int32_t* order,
                                  const masked_ops::cuda::SlicedPiece* pieces, const void* data, const void* bias,
                                  void* output, void* stream) {
  using namespace masked_ops::cuda;
  if (dtype != kBFloat16 && dtype != kHalf) return kUnsupported;
  if (M > kMostSlicedRows || K % 2 != 0 || K > kMostSlicedColumns || !is_aligned(input, 16) || !is_aligned(data, 16) ||
      !is_aligned(pieces, 16)) {
    return kUnsupported;
  }
  if (M == 0 || N == 0) return 0;
  const SlicedDecode decode{M,
                            N,
                            K,
                            static_cast<const uint16_t*>(input),
                            order,
                            pieces,
                            static_cast<const uint8_t*>(data),
                            static_cast<const uint16_t*>(bias),
                            static_cast<uint16_t*>(output),
                            0,
                            0};
  return dtype == kHalf ? run<kHalf>(decode, stream) : run<kBFloat16>(decode, stream);
}
