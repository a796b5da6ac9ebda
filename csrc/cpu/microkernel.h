// The microkernel of the masked GEMM: a tile of C from a panel of packed A and a block of a panel of packed B. It packs
// on the side, bit by bit, the block of B that is next.
#pragma once

#include "pack.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

using tuning::kMR;
using tuning::kNR;
using tuning::kNV;

template <typename T>
struct Tile {
  T* C;  // the tile's corner
  int64_t ldc;
  float* sums;  // what one block of K leaves for the next; C itself, if that is of floats
  int64_t ld_sums;
  int64_t columns;       // valid ones, at most kNR
  bool first, last;      // of the blocks of K
  bool fetches;          // lines of C, ahead
  bool streams;          // a masked C goes past the caches, where whole lines are written
  const T* bias;         // added to the first; null for none
  const uint64_t* bits;  // of the tile's first row, set on the last block of K if C is to be masked; else null
  int64_t bits_stride;   // words
  int64_t column;        // of the tile's corner in its row of bits
  int64_t ahead;         // by which the panel of A is fetched, floats
};

// Whether a line of C is one vector of a tile, or two that are stored at once.
template <typename T>
constexpr bool kStreamsTiles = Vec::kLanes == 16 && (kIsFloat<T> || kStoresTwo<T>);

template <bool kFull, typename T, int MR, int NV>
MASKED_OPS_INLINE void load_sums(const Tile<T>& tile, Vec (&c)[MR][NV]) {
  constexpr int L = Vec::kLanes;
  const float* row = opaque(tile.sums);
  const int64_t ld = opaque(tile.ld_sums), columns = tile.columns;
  MASKED_OPS_UNROLL
  for (int i = 0; i < MR; ++i) {
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      c[i][j] = kFull ? Vec::loadu(row + j * L) : Vec::loadu(Vec::first(columns - j * L), row + j * L);
    }
    row += ld;
  }
}

// To C or to the sums, where all vectors are whole. Vectors are stored by pairs, where that can be, from kFirst on;
// lines that are written whole go past the caches, if kStreamed.
template <bool kMasked, bool kStreamed = false, int kFirst = 0, typename T, typename To, int MR, int NV>
MASKED_OPS_INLINE void store_tile(const Tile<T>& tile, To* to, int64_t ld_to, const Vec (&c)[MR][NV]) {
  constexpr int L = Vec::kLanes;
  To* row = opaque(to);
  const uint64_t* bits = opaque(tile.bits);
  const int64_t ld = opaque(ld_to), bits_stride = opaque(tile.bits_stride), column = tile.column;
  MASKED_OPS_UNROLL
  for (int i = 0; i < MR; ++i) {
    constexpr int kPaired = kStoresTwo<To> ? kFirst + (NV - kFirst) / 2 * 2 : kFirst;
    if constexpr (kPaired > kFirst) {
      MASKED_OPS_UNROLL
      for (int j = kFirst; j < kPaired; j += 2) {
        const uint32_t m = kMasked ? Operand<To>::predicate_of_two(bits, column + j * L) : ~0u;
        store_two<kStreamed>(m, {c[i][j], c[i][j + 1]}, row + j * L);
      }
    }
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      if (j >= kFirst && j < kPaired) continue;
      const Vec v = kMasked ? c[i][j].select(Vec::predicate(bits, column + j * L)) : c[i][j];
      if constexpr (kStreamed && kIsFloat<To>) {
        v.stream(row + j * L);
      } else {
        store_floats(v, row + j * L);
      }
    }
    row += ld;
    bits += bits_stride;
  }
}

// C masked and past the caches; its rows are whole lines.
template <typename T, int MR, int NV>
MASKED_OPS_INLINE void stream_tile(const Tile<T>& tile, const Vec (&c)[MR][NV]) {
  if (!kIsFloat<T> && reinterpret_cast<uintptr_t>(tile.C) % 64 != 0) {
    store_tile<true, true, 1>(tile, tile.C, tile.ldc, c);
  } else {
    store_tile<true, true>(tile, tile.C, tile.ldc, c);
  }
}

// The same where they are not, from [rows][width] in memory: the code is one for all microkernels.
template <typename T, typename To>
__attribute__((noinline)) void store_partial(const Tile<T>& tile, bool masked, To* to, int64_t ld, const float* c,
                                             int rows, int64_t width) {
  for (int i = 0; i < rows; ++i, to += ld, c += width) {
    const uint64_t* const bits = masked ? tile.bits + i * tile.bits_stride : nullptr;
    for (int64_t j = 0; j < tile.columns; j += Vec::kLanes) {
      const Vec v = Vec::load(c + j);
      store_floats(masked ? v.select(Vec::predicate(bits, tile.column + j)) : v, tile.columns - j, to + j);
    }
  }
}

// A panel of packed A, [k][kMR], and behind it the next, fetched so far ahead. The distance is no constant: the
// compiler would move the base of all loads by it, whose instructions then take 32-bit offsets and the loop 3% longer.
template <bool kFetches>
struct PackedPanel {
  const float* A;
  int64_t ahead;

  MASKED_OPS_INLINE Vec operand(int i) const { return Vec::set1(A[i]); }
  MASKED_OPS_INLINE void advance() {
    if constexpr (kFetches) prefetch(A + ahead);
    A += kMR;
  }
  MASKED_OPS_INLINE void fetch_next() const {}
};

// kMR rows of a matrix as they lie, whose elements, or pairs of them, are operands; ld counts those.
struct DirectPanel {
  using Operand32 __attribute__((may_alias, aligned(2))) = float;
  const Operand32 *A, *fourth;  // the first row and, if there is one, that four below
  int64_t ld, three_ld;

  DirectPanel(const void* corner, int64_t ld)
      : A(static_cast<const Operand32*>(corner)), fourth(kMR > 4 ? A + 4 * ld : A), ld(ld), three_ld(3 * ld) {}
  MASKED_OPS_INLINE Vec operand(int i) const {
    const Operand32* const row = i < 4 ? A : fourth;
    return Vec::set1(i % 4 == 3 ? row[three_ld] : row[i % 4 * ld]);
  }
  MASKED_OPS_INLINE void advance() { ++A, ++fourth; }
  // Where the panel below begins; from there on the hardware follows.
  MASKED_OPS_INLINE void fetch_next() const {
    const Operand32* row = A + kMR * ld;
    MASKED_OPS_UNROLL
    for (int i = 0; i < kMR; ++i, row += ld) {
      MASKED_OPS_UNROLL
      for (int j = 0; j < tuning::kDirectLinesAhead; ++j) prefetch(row + 16 * j);
    }
  }
};

// Takes `steps` steps of packing on the side.
template <int MR, int NV, typename T, typename Packer, typename Panel>
__attribute__((noinline)) void microkernel(int64_t depth, Panel A, const float* B, const Tile<T>& tile, Packer& packer,
                                           int64_t steps) {
  constexpr int L = Vec::kLanes;
  const bool full = tile.columns == NV * L;
  Vec c[MR][NV];
  if (tile.first) {
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      const Vec bias = tile.bias ? load_first(tile.columns - j * L, tile.bias + j * L) : Vec::zero();
      MASKED_OPS_UNROLL
      for (int i = 0; i < MR; ++i) c[i][j] = bias;
    }
  } else if (full) {
    load_sums<true>(tile, c);
  } else {
    load_sums<false>(tile, c);
  }
  if (tile.fetches) {
    MASKED_OPS_UNROLL
    for (int i = 0; i < MR; ++i) {  // of the tile below, which is next
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) prefetch(tile.C + (MR + i) * tile.ldc + j * L);
    }
  }

  A.fetch_next();
  if (!Packer::kOnTheSide) steps = 0;
  const int64_t period = steps > 0 ? max<int64_t>(depth / steps, 1) : depth;
  for (int64_t k = 0; k < depth;) {
    for (const int64_t end = min(k + period, depth); k < end; ++k) {
      Vec b[NV];
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) b[j] = Vec::load(B + j * L);
      MASKED_OPS_UNROLL
      for (int i = 0; i < MR; ++i) {
        const Vec a = A.operand(i);
        MASKED_OPS_UNROLL
        for (int j = 0; j < NV; ++j) c[i][j] = Operand<T>::multiply_add(a, b[j], c[i][j]);
      }
      A.advance();
      B += kNR;
    }
    if (steps > 0) {
      packer.step();
      --steps;
    }
  }

  const bool to_sums = !kIsFloat<T> && !tile.last, masked = !Packer::kMasksB && tile.bits;
  if (!full) {
    alignas(64) float sums[MR * NV * L];
    MASKED_OPS_UNROLL
    for (int i = 0; i < MR; ++i) {
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) c[i][j].store(sums + (i * NV + j) * L);
    }
    to_sums ? store_partial(tile, false, tile.sums, tile.ld_sums, sums, MR, NV * L)
            : store_partial(tile, masked, tile.C, tile.ldc, sums, MR, NV * L);
  } else if (to_sums) {
    store_tile<false>(tile, tile.sums, tile.ld_sums, c);
  } else if (kStreamsTiles<T> && masked && tile.streams) {
    if constexpr (kStreamsTiles<T>) stream_tile(tile, c);
  } else if (masked) {
    store_tile<true>(tile, tile.C, tile.ldc, c);
  } else {
    store_tile<false>(tile, tile.C, tile.ldc, c);
  }
  for (; steps > 0; --steps) packer.step();
}

// Fewer rows than these are the last panel's, or there are few of all; narrow microkernels for them would only take
// time to compile.
constexpr int kLeastNarrowRows = kMR * 3 / 4;

template <int NV, typename T, typename Packer, int MR = kMR>
void run_microkernel(int64_t rows, int64_t depth, const float* A, const float* B, const Tile<T>& tile, Packer& packer,
                     int64_t steps) {
  if constexpr (MR > 1) {
    constexpr int kNext = MR == kLeastNarrowRows ? kNV : NV;
    if (rows < MR) return run_microkernel<kNext, T, Packer, MR - 1>(rows, depth, A, B, tile, packer, steps);
  }
  microkernel<MR, NV>(depth, PackedPanel<Packer::kMasksB>{A, tile.ahead}, B, tile, packer, steps);
}

// Calls body with the vectors of the microkernel for so many columns. Each width costs seconds of compilation; where
// one is missing, the last vectors of the next are empty.
template <typename T, typename Body>
MASKED_OPS_INLINE auto with_width(int64_t columns, const Body& body) {
  static_assert(kNV == 3);
  const int64_t vectors = ceil_div(columns, Vec::kLanes);
  if constexpr (kIsFloat<T>) {
    if (vectors == 1) return body(Int<1>());
  }
  if constexpr (kIsFloat<T> || Operand<T>::kDepth > 1) {
    if (vectors <= 2) return body(Int<2>());
  }
  return body(Int<3>());
}

template <typename T, typename Packer>
auto microkernel_for(int64_t columns) {
  return with_width<T>(columns, [](auto nv) { return run_microkernel<decltype(nv)::value, T, Packer>; });
}

template <typename T, typename Packer>
auto direct_microkernel_for(int64_t columns) {
  return with_width<T>(columns, [](auto nv) { return microkernel<kMR, decltype(nv)::value, T, Packer, DirectPanel>; });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
