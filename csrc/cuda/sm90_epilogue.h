// How gemm_sm90's sums come to memory, in whole lines: turned round through shared memory, or, if the contraction was
// split, added up over the shared memory of the cluster's blocks. The mask of grad_weight is applied here, to the bits
// of the rounded sums, so that a pruned entry is +0 whatever its sum is.
#pragma once

#include "numeric.h"
#include "ptx.h"
#include "sm90.h"
#include "swizzle.h"

namespace masked_ops::cuda::sm90 {

// Sums i of each of the kM / 8 products of 8 input rows: operand rows lane / 4 and, for i of 2 and 3, 8 more.
template <bool kBFloat, GemmMode kMode, int kM>
struct Epilogue {
  using L = Layout<kM>;
  static constexpr bool kMasked = kMode == kGradWeight;
  static constexpr int kWords = (kM + kGroup - 1) / kGroup;

  const Operands& to;
  uint32_t shared;
  int first_m, first_r;  // of the block's tile
  uint64_t words[kWords];
  float bias[2];

  MASKED_OPS_DEVICE static int thread() { return int(threadIdx.x % kGroup); }
  MASKED_OPS_DEVICE static int lane() { return int(threadIdx.x % kWarp); }
  MASKED_OPS_DEVICE static int warp() { return int(threadIdx.x % kGroup / kWarp); }
  MASKED_OPS_DEVICE static int group() { return int(threadIdx.x) / kGroup - 1; }
  MASKED_OPS_DEVICE int group_r() const { return first_r + group() * 64; }

  // What is needed from memory is asked for while the last products run.
  MASKED_OPS_DEVICE void fetch() {
    if constexpr (kMasked) {
      const int64_t per_row = words_per_row(to.shape.R);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int row = i * kGroup + thread();
        const bool there = row < kM && first_m + row < to.shape.M && group_r() < to.shape.R;
        words[i] = there ? to.words[(first_m + row) * per_row + group_r() / 64] : 0;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = group_r() + warp() * 16 + lane() / 4 + i * 8;
        bias[i] = to.bias && r < to.shape.R ? to_float<kBFloat>(to.bias[r]) : 0.f;
      }
    }
  }
  MASKED_OPS_DEVICE void share_words() const {
    if constexpr (kMasked) {
      auto* const place = reinterpret_cast<uint64_t*>(dynamic_shared + L::kMasks + group() * L::kWordsBytes);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if (const int row = i * kGroup + thread(); row < kM) place[row] = words[i];
      }
    }
  }
  // The bits of 8 or, if wide, 4 entries from (m, r) of the tile on.
  template <bool kWide>
  MASKED_OPS_DEVICE static uint32_t bits_at(int m, int r) {
    const uint32_t byte = dynamic_shared[L::kMasks + r / 64 * L::kWordsBytes + m * 8 + r % 64 / 8];
    return kWide ? byte >> (r & 4) : byte;
  }
  template <bool kWide>
  MASKED_OPS_DEVICE static uint32_t masked(uint32_t bytes, uint32_t bits, int i) {
    return bytes & (kWide ? spread_bits<4>(bits >> i) : spread_bits<2>(bits >> (2 * i)));
  }

  // --- of a whole contraction: 8 KB at a time, 64 columns ---

  // Where a byte of a row of 64 floats is staged. Four pairs of rows are written at once, 32 bytes of each.
  MASKED_OPS_DEVICE static int wide_at(int m, int byte) { return m * 256 + (byte ^ (m / 2 & 3) << 5); }

  // 64 input rows, rounded.
  MASKED_OPS_DEVICE void stage(const float* sums) const {
    const uint32_t address = shared + L::kOut + group() * kBoxBytes;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* sum = sums + (j + i / 2) * 4 + i % 2 * 2;
        const float more = kMasked ? 0.f : bias[i % 2];
        pairs[i] = round_pair<kBFloat>(sum[0] + more, sum[1] + more);
      }
      const int m = (j + lane() / 16) * 8 + lane() % 8, byte = (warp() * 16 + lane() / 8 % 2 * 8) * 2;
      stmatrix_x4<true>(address + swizzled<kRow>(m, byte), pairs);
    }
  }
  // 32 input rows, as they are.
  MASKED_OPS_DEVICE void stage_wide(uint8_t* tile, const float* sums) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int m = i / 4 * 8 + lane() % 4 * 2 + i % 2, col = warp() * 16 + lane() / 4 + i / 2 % 2 * 8;
      *reinterpret_cast<float*>(tile + wide_at(m, col * 4)) = sums[i];
    }
  }
  // Input rows first to first + kAll - 1 of the tile.
  template <bool kWide, int kAll>
  MASKED_OPS_DEVICE void store_rows(const float (&sums)[kAll / 2], int first) const {
    constexpr int kRows = kWide ? 32 : 64, kSize = kWide ? 4 : 2, kPer = 16 / kSize;
    constexpr int kChunks = 64 / kPer, kStep = kGroup / kChunks;  // rows that are read back at once
    const int m = thread() / kChunks, col = thread() % kChunks * kPer, R = to.shape.R, r = group_r() + col;
    const int rows = r < R ? to.shape.M - first_m - first - m : 0;
    uint8_t* const tile = dynamic_shared + L::kOut + group() * kBoxBytes;
    const uint8_t* const from = tile + (kWide ? wide_at(m, col * 4) : swizzled<kRow>(m, col * 2));
    uint8_t* out = static_cast<uint8_t*>(to.output) + (int64_t(first_m + first + m) * R + r) * kSize;
#pragma unroll
    for (int part = 0; part < kAll / kRows; ++part) {
      named_barrier(1 + group(), kGroup);  // the part before has been read
      if (part == 0) share_words();
      if constexpr (kWide) {
        stage_wide(tile, sums + part * kRows / 2);
      } else {
        stage(sums + part * kRows / 2);
      }
      named_barrier(1 + group(), kGroup);
#pragma unroll
      for (int i = 0; i < kRows; i += kStep) {
        if (part * kRows + i < rows) {
          store16<kWide>(out, from + i * kRow * kSize / 2, first + part * kRows + i + m, col);
        }
        out += int64_t(R) * kSize * kStep;
      }
    }
  }
  // The entries from (m, col) of the consumer's tile on.
  template <bool kWide>
  MASKED_OPS_DEVICE void store16(uint8_t* out, const uint8_t* from, int m, int col) const {
    if (kMasked || to.shape.R % 8 == 0) {
      uint4 bytes = *reinterpret_cast<const uint4*>(from);
      if constexpr (kMasked) {
        const uint32_t bits = bits_at<kWide>(m, group() * 64 + col);
        bytes = make_uint4(masked<kWide>(bytes.x, bits, 0), masked<kWide>(bytes.y, bits, 1),
                           masked<kWide>(bytes.z, bits, 2), masked<kWide>(bytes.w, bits, 3));
      }
      *reinterpret_cast<uint4*>(out) = bytes;
    } else {
      const int left = to.shape.R - group_r() - col;
#pragma unroll 1
      for (int e = 0; e < 8 && e < left; ++e) {
        reinterpret_cast<uint16_t*>(out)[e] = reinterpret_cast<const uint16_t*>(from)[e];
      }
    }
  }
  template <int kAll>
  MASKED_OPS_DEVICE void store(const float (&sums)[kAll / 2], int first) const {
    if (kMasked && to.wide) {
      store_rows<kMasked, kAll>(sums, first);
    } else {
      store_rows<false, kAll>(sums, first);
    }
  }
  MASKED_OPS_DEVICE void store(const float (&sums)[kM / 2]) const { store<kM>(sums, 0); }

  // --- of a contraction split in two: each block keeps half of the rows, and gets the other's sums of them ---

  static constexpr bool kTrades = kM % 128 == 0;  // whole parts of store_rows
  MASKED_OPS_DEVICE static int traded_at(int i) {
    return (i * kConsumers * kGroup + int(threadIdx.x) - kGroup) * 16;  // the consumers come second
  }
  // Sums kFrom to kFrom + kM / 4 - 1.
  template <int kFrom>
  MASKED_OPS_DEVICE void give(const float (&sums)[kM / 2]) const {
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) {
      const float* const sum = sums + kFrom + 4 * i;
      *reinterpret_cast<float4*>(dynamic_shared + traded_at(i)) = {sum[0], sum[1], sum[2], sum[3]};
    }
  }
  template <int kFrom>
  MASKED_OPS_DEVICE void take(const float (&sums)[kM / 2], int other, float (&all)[kM / 4]) const {
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) {
      const float4 more = load_shared_of(other, shared + traded_at(i));
      const float* const sum = sums + kFrom + 4 * i;
      all[4 * i] = sum[0] + more.x, all[4 * i + 1] = sum[1] + more.y;
      all[4 * i + 2] = sum[2] + more.z, all[4 * i + 3] = sum[3] + more.w;
    }
  }
  MASKED_OPS_DEVICE void store_traded(const float (&sums)[kM / 2], int rank) const {
    if constexpr (kTrades) {
      float all[kM / 4];
      if (rank == 0) {
        take<0>(sums, 1, all);
      } else {
        take<kM / 4>(sums, 0, all);
      }
      store<kM / 2>(all, rank * kM / 2);
    }
  }

  // --- of a split contraction: each block adds up some rows ---

  // For the other blocks, who may read it after the cluster's barrier.
  MASKED_OPS_DEVICE void share(const float (&sums)[kM / 2], int rank) const {
    named_barrier(1 + kConsumers, kConsumers * kGroup);  // both consumers have read the tiles
    if (kTrades && to.trade) {
      if (rank == 0) {
        give<kM / 4>(sums);
      } else {
        give<0>(sums);
      }
      return;
    }
    share_words();
    float* const out = reinterpret_cast<float*>(dynamic_shared) + group() * 64 + warp() * 16 + lane() / 4;
#pragma unroll
    for (int i = 0; i < kM / 2; ++i) {
      out[(i / 4 * 8 + lane() % 4 * 2 + i % 2) * L::kPitch + i / 2 % 2 * 8] = sums[i];
    }
  }
  // Rows m, m + kStep, ... of the tile, four columns. Every sum that is read is also written, so that no reading is
  // under way any more when the thread comes to the cluster's last barrier.
  template <int kSplits, int kRows, int kStep>
  MASKED_OPS_DEVICE void add_up(int m, int col, const float (&more)[4]) const {
    float4 sums[kRows][kSplits];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int s = 0; s < kSplits; ++s) {
        sums[i][s] = load_shared_of(s, shared + ((m + i * kStep) * L::kPitch + col) * 4);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float4 sum = sums[i][0];
#pragma unroll
      for (int s = 1; s < kSplits; ++s) {
        const float4& next = sums[i][s];
        sum = {sum.x + next.x, sum.y + next.y, sum.z + next.z, sum.w + next.w};
      }
      store4({sum.x + more[0], sum.y + more[1], sum.z + more[2], sum.w + more[3]}, m + i * kStep, col);
    }
  }
  template <int kSplits>
  MASKED_OPS_DEVICE void store_shared(int rank) const {
    constexpr int kWarps = kConsumers * kGroup / kWarp, kAtOnce = 8 / kSplits;
    const int col = lane() * 4, r = first_r + col;
    if (r >= to.shape.R) return;
    float more[4] = {};
    if (!kMasked && to.bias) {
#pragma unroll
      for (int e = 0; e < 4; ++e) more[e] = r + e < to.shape.R ? to_float<kBFloat>(to.bias[r + e]) : 0.f;
    }
    const int left = to.shape.M - first_m, last = (rank + 1) * kM / kSplits, end = left < last ? left : last;
    int m = rank * kM / kSplits + group() * (kGroup / kWarp) + warp();
#pragma unroll 1
    for (; m + (kAtOnce - 1) * kWarps < end; m += kAtOnce * kWarps) add_up<kSplits, kAtOnce, kWarps>(m, col, more);
#pragma unroll 1
    for (; m < end; m += kWarps) add_up<kSplits, 1, kWarps>(m, col, more);
  }
  // Entries (m, r) to (m, r + 3) of the tile.
  MASKED_OPS_DEVICE void store4(const float4& sum, int m, int r) const {
    const int R = to.shape.R;
    const int64_t place = int64_t(first_m + m) * R + first_r + r;
    const uint32_t bits = kMasked ? bits_at<true>(m, r) : 15;
    if (kMasked && to.wide) {
      const uint4 bytes =
          make_uint4(masked<true>(__float_as_uint(sum.x), bits, 0), masked<true>(__float_as_uint(sum.y), bits, 1),
                     masked<true>(__float_as_uint(sum.z), bits, 2), masked<true>(__float_as_uint(sum.w), bits, 3));
      *reinterpret_cast<uint4*>(static_cast<float*>(to.output) + place) = bytes;
      return;
    }
    const uint32_t pairs[2] = {masked<false>(round_pair<kBFloat>(sum.x, sum.y), bits, 0),
                               masked<false>(round_pair<kBFloat>(sum.z, sum.w), bits, 1)};
    uint16_t* const out = static_cast<uint16_t*>(to.output) + place;
    if (kMasked || R % 8 == 0) {
      *reinterpret_cast<uint2*>(out) = make_uint2(pairs[0], pairs[1]);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (first_r + r + e < R) out[e] = uint16_t(pairs[e / 2] >> (e % 2 * 16));
      }
    }
  }
  MASKED_OPS_DEVICE void store_shared(int rank) const {
    if (to.splits == 2) store_shared<2>(rank);
    if (to.splits == 3) store_shared<3>(rank);
    if (to.splits == 4) store_shared<4>(rank);
    if (to.splits == 8) store_shared<8>(rank);
  }
};

}  // namespace masked_ops::cuda::sm90
