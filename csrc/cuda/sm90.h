// What the parts of gemm_sm90 share: its arguments, its tiles, and where things are in shared memory.
#pragma once

#include "gemm.h"
#include "gemm_tiles.h"
#include "tensor_map.h"

namespace masked_ops::cuda::sm90 {

inline constexpr int kConsumers = 2, kGroup = 128, kThreads = kGroup * (1 + kConsumers);
inline constexpr int kR = kSm90R, kC = kSm90C;
inline constexpr int kRow = 128;             // bytes of a row of every box
inline constexpr int kBoxBytes = 64 * kRow;  // one warpgroup's part of the operand's tile

struct Operands {
  TensorMap operand, input;
  GemmShape shape;
  const uint32_t* fragments;
  const uint64_t* words;
  const uint16_t* bias;
  void* output;
  int tiles, splits;
  bool wide;   // the output is float
  bool trade;  // how the sums of two splits are added up
};

// A tile, and the steps over the contraction that a block of the cluster takes: always an even number, so that the last
// may be zeros.
struct Piece {
  int m, r, first_step, last_step;
};
template <int kM>
[[maybe_unused]] MASKED_OPS_DEVICE Piece piece_of(const Operands& of, int tile, int rank) {
  const int m_tiles = ceil_div(of.shape.M, kM), pairs = ceil_div(of.shape.C, 2 * kC);
  return {tile % m_tiles * kM, tile / m_tiles * kR, pairs * rank / of.splits * 2, pairs * (rank + 1) / of.splits * 2};
}

// Tiles first: the swizzle wants them aligned to 1024 bytes.
template <int kM>
struct Layout {
  static constexpr int kOperand = kConsumers * kBoxBytes, kInput = kM * kRow, kTiles = kOperand + kInput;
  static constexpr int kOutBytes = kConsumers * kBoxBytes;  // 64 x 64 of the output for each consumer
  static constexpr int kMaskBytes = kConsumers * kFragmentTileBytes;
  static constexpr int kStages = (227 * 1024 - kOutBytes) / (kTiles + kMaskBytes + 16);
  static constexpr int kOut = kStages * kTiles, kMasks = kOut + kOutBytes;
  static constexpr int kFull = kMasks + kStages * kMaskBytes, kEmpty = kFull + 8 * kStages;
  static constexpr int kBytes = kEmpty + 8 * kStages;
  // A cluster's blocks leave their sums [kM][kPitch] in the place of the tiles; with this pitch neither writing them
  // out of the accumulators nor reading rows meets a bank twice.
  static constexpr int kPitch = kR + 4;
  static_assert(kM * kPitch * 4 <= kStages * kTiles && kBytes <= 227 * 1024);
  // Of grad_weight, in the place of the masks: the mask's bits of each consumer's 64 columns, a word per row.
  static constexpr int kWordsBytes = kM * 8;
  static_assert(kConsumers * kWordsBytes <= kStages * kMaskBytes);
};

}  // namespace masked_ops::cuda::sm90
