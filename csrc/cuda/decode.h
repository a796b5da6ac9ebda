// What the two decode kernels share: the index of a mask, and reading neighbouring remaining weights by it.
//
// columns[position] is the column of a value; the values are in row-major order. begins[n * segments + s] is where
// segment s of row n, 256 columns, begins among them.
#pragma once

#include "bits.h"
#include "device.h"
#include "numeric.h"

namespace masked_ops::cuda {

inline constexpr int kSegment = 256;
inline constexpr int64_t kMostDecodeColumns = 65536;

struct DecodeIndex {
  const uint32_t* begins;   // [N * segments + 1]
  const uint16_t* columns;  // [nnz], aligned to 16 bytes, and zeros up to a multiple of 8

  MASKED_OPS_BOTH static int64_t segments(int64_t K) { return ceil_div<int64_t>(K, kSegment); }
  static size_t columns_at(int64_t N, int64_t K) { return ceil_div<size_t>(4 * (N * segments(K) + 1), 16) * 16; }
  static size_t bytes(int64_t N, int64_t K, int64_t nnz) {
    return columns_at(N, K) + ceil_div<size_t>(size_t(nnz), 8) * 16;
  }
  static DecodeIndex of(const void* index, int64_t N, int64_t K) {
    const auto* bytes = static_cast<const uint8_t*>(index);
    return {reinterpret_cast<const uint32_t*>(bytes), reinterpret_cast<const uint16_t*>(bytes + columns_at(N, K))};
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
  MASKED_OPS_DEVICE static uint32_t bits(Storage x) { return x; }
  MASKED_OPS_DEVICE static Storage of_bits(uint32_t bits) { return Storage(bits); }
};
template <>
struct Value<kFloat> {
  using Storage = float;
  MASKED_OPS_DEVICE static float widen(float x) { return x; }
  MASKED_OPS_DEVICE static float round(float x) { return x; }
  MASKED_OPS_DEVICE static uint32_t bits(float x) { return __float_as_uint(x); }
  MASKED_OPS_DEVICE static float of_bits(uint32_t bits) { return __uint_as_float(bits); }
};

// Positions [8 i, 8 i + 8) of the values and of their columns. They may reach into the neighbouring rows, for the sake
// of aligned loads. Kept as they come, in few registers.
template <int kDtype>
struct Group {
  using Storage = typename Value<kDtype>::Storage;
  static constexpr int kSize = 8, kColumnWords = 4, kValueWords = kSize * sizeof(Storage) / 4;
  uint32_t columns[kColumnWords], values[kValueWords];

  MASKED_OPS_DEVICE void load(const void* from, const DecodeIndex& index, uint32_t position, int64_t nnz) {
    load_words(columns, index.columns + position);
    const Storage* const first = static_cast<const Storage*>(from) + position;
    if (position + int64_t{kSize} <= nnz) {
      load_words(values, first);
    } else {  // the last ones, which others' memory may follow
      constexpr int kPerWord = 4 / sizeof(Storage);
      const int64_t left = nnz - position;
#pragma unroll
      for (int i = 0; i < kValueWords; ++i) {
        values[i] = 0;
        if ((i + 1) * kPerWord <= left) {
          values[i] = reinterpret_cast<const uint32_t*>(first)[i];
        } else if (i * kPerWord < left) {
          values[i] = Value<kDtype>::bits(first[i * kPerWord]);
        }
      }
    }
  }
  MASKED_OPS_DEVICE uint32_t column(int i) const { return columns[i / 2] >> (i % 2 * 16) & 0xffff; }
  MASKED_OPS_DEVICE Storage value(int i) const { return Value<kDtype>::of_bits(values[word_of(i)] >> shift(i)); }

 private:
  MASKED_OPS_BOTH static constexpr int word_of(int i) { return i * int(sizeof(Storage)) / 4; }
  MASKED_OPS_BOTH static constexpr int shift(int i) { return i * int(sizeof(Storage)) % 4 * 8; }
  template <int kWords>
  MASKED_OPS_DEVICE static void load_words(uint32_t (&to)[kWords], const void* from) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 v = __ldcs(static_cast<const uint4*>(from) + i);
      to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
    }
  }
};

// decode_mma.cu: M <= 64, kHalf and kBFloat16.
size_t decode_mma_workspace(int64_t M, int64_t N, int64_t K);
int decode_mma(int dtype, const Decode& decode);

}  // namespace masked_ops::cuda
