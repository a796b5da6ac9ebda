// How a warp of decode_tiles comes by the values of a tile: from memory to registers, and from there to slots in shared
// memory, out of which they are laid out place by place.
//
// A lane's slots lie in a bank of its own. Slot j has its values j and j + 1: whichever of two neighbouring places are
// taken, one load brings what they need, and two instructions move or clear the halves (expand_byte).
#pragma once

#include "ptx.h"
#include "tiles.h"

namespace masked_ops::cuda {

inline constexpr int kSlotBytes = kWarp * 4;
inline constexpr int kWarpSlots =
    kMostLaneValues + 2;  // one before the first and one behind the last, which are not used

// A TilePiece in two registers.
struct Tile {
  uint32_t at, counts;

  MASKED_OPS_DEVICE int batches() const { return int(counts & 0xffff); }
  MASKED_OPS_DEVICE int loose() const { return int(counts >> 16); }
  MASKED_OPS_DEVICE bool dense() const { return counts == kDense; }
  MASKED_OPS_DEVICE bool empty() const { return counts == 0; }
  MASKED_OPS_DEVICE uint32_t bytes() const {
    return tile_units({at, uint16_t(batches()), uint16_t(loose())}) * uint32_t{kTileUnit};
  }
};

// A warp's tiles in memory, one behind the other: 32 bits find them all from the first on.
struct Stream {
  const uint8_t* first;
  uint32_t first_at;

  MASKED_OPS_DEVICE static uint32_t lane() { return threadIdx.x % kWarp; }
  MASKED_OPS_DEVICE const uint8_t* at(const Tile& tile, uint32_t bytes) const {
    return computed(first + ((tile.at - first_at) * uint32_t{kTileUnit} + bytes));
  }
  MASKED_OPS_DEVICE const uint8_t* batches(const Tile& tile, int from) const {
    return at(tile, kBitsBytes + from * kBatchBytes + lane() * 8);
  }
  MASKED_OPS_DEVICE const uint8_t* loose(const Tile& tile, int from) const {
    return at(tile, kBitsBytes + tile.batches() * kBatchBytes + from * kLooseStepBytes + lane() * 4);
  }
  MASKED_OPS_DEVICE void prefetch(const Tile& tile) const {
    const uint8_t* const from = at(tile, 0);
    const uint32_t end = tile.bytes();
#pragma unroll 1
    for (uint32_t i = lane() * kTileUnit; i < end; i += kWarp * kTileUnit) prefetch_l2(from + i);
  }
};

// What a lane has of a sparse tile in registers: all of it, where it is little.
struct Ahead {
  static constexpr int kBatches = 4, kLoose = 2;
  uint4 bits;
  uint2 batches[kBatches];
  uint32_t loose[kLoose];

  // Batches and loose steps from these on.
  MASKED_OPS_DEVICE void load_batches(const Stream& stream, const Tile& tile, int from) {
    const uint8_t* const at = stream.batches(tile, from);
#pragma unroll
    for (int i = 0; i < kBatches; ++i) {
      if (from + i < tile.batches()) batches[i] = __ldcs(reinterpret_cast<const uint2*>(at + i * kBatchBytes));
    }
  }
  MASKED_OPS_DEVICE void load_loose(const Stream& stream, const Tile& tile, int from) {
    const uint8_t* const at = stream.loose(tile, from);
#pragma unroll
    for (int i = 0; i < kLoose; ++i) {
      if (from + i < tile.loose()) loose[i] = __ldcs(reinterpret_cast<const uint32_t*>(at + i * kLooseStepBytes));
    }
  }
  MASKED_OPS_DEVICE void load(const Stream& stream, const Tile& tile) {
    if (tile.dense() || tile.empty()) return;
    bits = __ldcs(reinterpret_cast<const uint4*>(stream.at(tile, Stream::lane() * 16)));
    load_batches(stream, tile, 0);
    load_loose(stream, tile, 0);
  }
};

// A lane's slots.
struct Slots {
  uint32_t first;  // of the lane

  MASKED_OPS_DEVICE Slots() { first = (threadIdx.x / kWarp * kWarpSlots + 1) * kSlotBytes + threadIdx.x % kWarp * 4; }
  MASKED_OPS_DEVICE static void put_word(uint32_t place, uint32_t word) {
    *reinterpret_cast<uint32_t*>(dynamic_shared + place) = word;
  }
  MASKED_OPS_DEVICE static void put_half(uint32_t place, uint32_t value) {
    *reinterpret_cast<uint16_t*>(dynamic_shared + place) = uint16_t(value);
  }
  // Strict batches from this one on; last: the upper half of the batch before, and then of these.
  MASKED_OPS_DEVICE void put_batches(const Ahead& ahead, const Tile& tile, int from, uint32_t& last) const {
    const uint32_t place = first + from * (kBatch * kSlotBytes);
#pragma unroll
    for (int i = 0; i < Ahead::kBatches; ++i) {
      if (from + i < tile.batches()) {
        const uint2 four = ahead.batches[i];
        const uint32_t to = place + i * (kBatch * kSlotBytes);
        put_word(to - kSlotBytes, select_bytes<0x5432>(last, four.x));
        put_word(to, four.x);
        put_word(to + kSlotBytes, select_bytes<0x5432>(four.x, four.y));
        put_word(to + 2 * kSlotBytes, four.y);
        last = four.y;
      }
    }
  }
  MASKED_OPS_DEVICE void put_loose(const Ahead& ahead, const Tile& tile, int from) const {
#pragma unroll
    for (int i = 0; i < Ahead::kLoose; ++i) {
      if (from + i < tile.loose()) {
        const uint32_t place = (ahead.loose[i] >> 16) + (first - threadIdx.x % kWarp * 4);
        put_half(place, ahead.loose[i]);
        put_half(place - kSlotBytes + 2, ahead.loose[i]);
      }
    }
  }
  // What is ahead, and all others of the tile.
  MASKED_OPS_DEVICE void fill(const Ahead& ahead, const Stream& stream, const Tile& tile) const {
    Ahead more;
    uint32_t last = 0;
    put_batches(ahead, tile, 0, last);
#pragma unroll 1
    for (int from = Ahead::kBatches; from < tile.batches(); from += Ahead::kBatches) {
      more.load_batches(stream, tile, from);
      put_batches(more, tile, from, last);
    }
    put_word(first + (tile.batches() * kBatch - 1) * kSlotBytes, last >> 16);
    __syncwarp();  // and all lanes are done with the tile before
    put_loose(ahead, tile, 0);
#pragma unroll 1
    for (int from = Ahead::kLoose; from < tile.loose(); from += Ahead::kLoose) {
      more.load_loose(stream, tile, from);
      put_loose(more, tile, from);
    }
    __syncwarp();
  }
};

}  // namespace masked_ops::cuda
