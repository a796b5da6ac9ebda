// What the two decode kernels share: the index of a mask, and reading four neighbouring remaining weights by it.
//
// The index cuts every row of weight[N][K] into segments of 256 columns. begins[n * segments + s] is where segment s of
// row n begins among the values, which are in row-major order; columns[position] is the column within the segment.
#pragma once

#include "bits.h"
#include "device.h"
#include "numeric.h"

namespace masked_ops::cuda {

inline constexpr int kSegment = 256;

struct DecodeIndex {
  const uint32_t* begins;  // [N * segments + 1]
  const uint8_t* columns;  // [nnz], aligned to 16 bytes, and readable up to a multiple of 16

  MASKED_OPS_BOTH static int64_t segments(int64_t K) { return ceil_div<int64_t>(K, kSegment); }
  static size_t columns_at(int64_t N, int64_t K) { return ceil_div<size_t>(4 * (N * segments(K) + 1), 16) * 16; }
  static size_t bytes(int64_t N, int64_t K, int64_t nnz) {
    return columns_at(N, K) + ceil_div<size_t>(size_t(nnz), 16) * 16;
  }
  static DecodeIndex of(const void* index, int64_t N, int64_t K) {
    const auto* bytes = static_cast<const uint8_t*>(index);
    return {reinterpret_cast<const uint32_t*>(bytes), bytes + columns_at(N, K)};
  }
};

struct Decode {
  int64_t M, N, K, nnz;
  const void* input;
  const void* values;
  DecodeIndex index;
  const void* bias;
  void* output;
  void* workspace;
  void* stream;
};

// A 16-bit float, or float.
template <int kDtype>
struct Value {
  using Storage = uint16_t;
  MASKED_OPS_DEVICE static float widen(Storage x) { return to_float<kDtype == kBFloat16>(x); }
  MASKED_OPS_DEVICE static Storage round(float x) { return Storage(round_pair<kDtype == kBFloat16>(x, 0.f)); }
};
template <>
struct Value<kFloat> {
  using Storage = float;
  MASKED_OPS_DEVICE static float widen(float x) { return x; }
  MASKED_OPS_DEVICE static float round(float x) { return x; }
};

// Positions [4 i, 4 i + 4) of the values and of their columns. They may reach into the neighbouring segments, for the
// sake of one aligned load each; whoever uses them looks at has().
template <typename Storage>
struct alignas(4 * sizeof(Storage)) Four {
  Storage of[4];
};
template <typename Storage>
struct Group {
  uint32_t columns;
  Four<Storage> values;

  MASKED_OPS_DEVICE void load(const Storage* from, const DecodeIndex& index, uint32_t position, int64_t nnz) {
    columns = *reinterpret_cast<const uint32_t*>(index.columns + position);
    if (position + int64_t{4} <= nnz) {
      values = *reinterpret_cast<const Four<Storage>*>(from + position);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) values.of[i] = position + int64_t{i} < nnz ? from[position + i] : Storage{};
    }
  }
  MASKED_OPS_DEVICE uint32_t column(int i) const { return columns >> (8 * i) & 255; }
};

// decode_mma.cu: 8 < M <= 64, kHalf and kBFloat16.
size_t decode_mma_workspace(int64_t M, int64_t N, int64_t K);
int decode_mma(int dtype, const Decode& decode);

}  // namespace masked_ops::cuda
