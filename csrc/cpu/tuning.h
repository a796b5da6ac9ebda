// The numbers that steer, per capability; each with the measurement that chose it. Machine: two Zen 5 cores, 48 KB L1d,
// 1 MB L2 a core, 32 MB L3.
#pragma once

#include "simd.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY::tuning {

// Register tile of the microkernel, kMR x kNV vectors: as many accumulators as leave room for kNV operands and a
// broadcast, and on AVX-512 for four rows that are being packed. AVX-512: 11 loads for 24 FMAs. The others: 7 for 12.
#if defined(__AVX512F__)
constexpr int kMR = 8, kNV = 3;
#else
constexpr int kMR = 4, kNV = 3;
#endif
constexpr int kNR = kNV * Vec::kLanes;

// Depth of a packed panel of B: kKC x kNR floats stay in L2 beside the A panels that pass.
constexpr int64_t kKC = 768;

// Packed A is shared by the team; more rows than fit here are taken in chunks, each of which packs B again.
constexpr int64_t kPanelABytes = int64_t{16} << 20;

// Rows of a task below which splitting a panel of B among threads costs more (B is packed twice) than it gains.
constexpr int64_t kMinRowsPerTask = 64;

// Packing of B: depths per run of a few rows, and how many steps the prefetch is ahead, from rows (a step is a vector
// of four rows) and from columns (a step is a depth). The time between two steps is some hundred cycles at M = 128 and
// some tens at M = 16. 128, 4096 -> 4096: runs of 16, 64, 256 depths reach 86%, 92%, 91% of the peak.
constexpr int64_t kPackRun = 64;
constexpr int64_t kRowsAhead = 12;
constexpr int64_t kColumnsAhead = 32;

// Elements per task of the passes over a mask or a weight (64 KB of floats: several tasks a thread, little overhead).
constexpr int64_t kPassGrain = int64_t{1} << 14;

// Sparse kernels. A block of packed input, block_cols x vectors(block_cols) vectors, fills kBlockFloats (32 KB: two
// thirds of L1d, the rest is for what streams by).
constexpr int64_t kBlockFloats = 8192;

// Columns of a block: at most 256, and so many that a row has a dozen weights or more in one; wider blocks have
// narrower tiles, which broadcast each value for fewer FMAs.
constexpr int64_t block_cols(double density) { return density >= 0.25 ? 64 : density >= 0.07 ? 128 : 256; }
constexpr int spmm_vectors(int64_t block_cols) { return int(min<int64_t>(8, kBlockFloats / Vec::kLanes / block_cols)); }

// Rows of a panel, whose part of the output stays in L2 (kPanelRows x kTaskLanes floats, 256 KB) while the blocks pass.
constexpr int64_t kPanelRows = 512, kTaskLanes = 128;
// Below this many rows, the runs of equal rows get too short.
constexpr int64_t kMinPanelRows = 64;
constexpr int64_t kTasksPerThread = 2;

// Packed input of all lanes that are taken at a time; at least one tile.
constexpr int64_t kPackedBytes = int64_t{16} << 20;
constexpr int64_t kPackSlice = 128;  // columns packed by one task

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY::tuning
