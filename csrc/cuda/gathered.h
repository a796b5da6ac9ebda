// The remaining weights as decode_gathered reads them: as operands of the tensor cores of which only what remains is
// kept.
//
// A strip is 16 rows. A step is one operand A of mma.m16n8k16: 16 columns that may be any of a segment's 4,096, each in
// a slot. So that ldmatrix finds the input's columns in different banks, a slot takes one kind of column only: slot s
// of a group's step j, which is in its phase p = 2 j + s / 8, those whose number by 16 is s & 8 | (s ^ p) & 7
// (slot_column), and a byte, the line, says which of 256.
//
// A group is `steps` steps, 2 or 4, for which a lane has two words of two values: of rows l / 4 and l / 4 + 8, the
// lower half for slots 2 (l % 4) and the upper one for slots 2 (l % 4) + 1 of all phases. That is, of the columns in
// slots s % 8 of a group's phases no two may have a weight in the same row. To which phase a value belongs is its
// position; in all others its place is 0, as it is where a word's half holds none. A column of which not all rows fit
// is in more than one slot. A batch is eight steps:
//
//   lines      128 bytes, [slot][those of steps 0, 2, 4, 6, 1, 3, 5, 7]
//   positions  a word a lane. In nibble 2 h + e of its lower and upper half: of row l / 4 + 8 h, half e. With 4 steps a
//              half is a group's; with 2, two groups have two bits each of every nibble
//   values     16 bytes a lane for each two groups: {row l / 4, row l / 4 + 8} of one, then of the other
//
// A piece has groups of 2 or of 4 steps, whichever takes fewer bytes. 8192 x 8192 at random: 3.7 bytes a value at
// density .1, 3.0 at .25, 2.7 at .5.
#pragma once

#include "bits.h"
#include "device.h"

namespace masked_ops::cuda {

inline constexpr int kBatchSteps = 8, kSlots = 16, kHalfSlots = kSlots / 2;
inline constexpr int kLinesBytes = kSlots * kBatchSteps, kPositionsBytes = kWarp * 4, kTwoGroupsBytes = kWarp * 16;
// Of a piece, at most: as many bins, eight of a group, as columns.
inline constexpr int kMostGroups = kGatherColumns / kHalfSlots;

MASKED_OPS_BOTH int64_t strips_of(int64_t N) { return ceil_div<int64_t>(N, kStripRows); }
MASKED_OPS_BOTH int64_t gather_segments(int64_t K) { return ceil_div<int64_t>(K, kGatherColumns); }

// The lower four bits of a column in slot s of step j of its group.
MASKED_OPS_BOTH constexpr int slot_column(int slot, int step) {
  return (slot & kHalfSlots) | ((slot ^ (2 * step + slot / kHalfSlots)) & (kHalfSlots - 1));
}

template <int kSteps>
struct BatchOf {
  static constexpr int kGroups = kBatchSteps / kSteps, kWords = kGroups / 2;  // of 16 bytes
  static constexpr int kValuesAt = kLinesBytes + kPositionsBytes;
  static constexpr int kBytes = kValuesAt + kWords * kTwoGroupsBytes;
  static constexpr uint32_t kUnits = kBytes / kGatherUnit;
  static_assert(kBytes % kGatherUnit == 0);

  // By how much the positions of group t of a batch are shifted.
  MASKED_OPS_BOTH static constexpr int shift(int t) { return t % (4 / kSteps) * kSteps + t / (4 / kSteps) * 16; }
};

MASKED_OPS_BOTH uint32_t batch_units(int steps) { return steps == 4 ? BatchOf<4>::kUnits : BatchOf<2>::kUnits; }

}  // namespace masked_ops::cuda
