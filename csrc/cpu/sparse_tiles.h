// The dense side of the sparse kernels: M rows are cut into tiles of a few vectors, and a matrix [M][depth] is packed
// into tiles [depth][lanes], so that an entry of the index names a row of aligned vectors.
#pragma once

#include "elements.h"
#include "sparse_index.h"
#include "tasks.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

struct Tiles {
  int64_t M;
  int vectors;  // of each tile but the last, which has 1, 2, 4 or 8 as M demands

  int64_t width() const { return vectors * Vec::kLanes; }
  int64_t count() const { return ceil_div(M, width()); }
  int64_t lanes(int64_t tile) const { return min(width(), M - tile * width()); }  // valid ones
  int vectors_of(int64_t tile) const {
    int v = 1;
    while (v * Vec::kLanes < lanes(tile)) v *= 2;
    return v;
  }
  // Floats of all tiles before this one; for tile = count(), of all.
  int64_t offset(int64_t tile, int64_t depth) const {
    return tile < count() ? tile * width() * depth
                          : ((tile - 1) * width() + vectors_of(tile - 1) * Vec::kLanes) * depth;
  }
};

// Calls body with Int 1, 2, 4 or 8.
template <typename Body>
MASKED_OPS_INLINE void with_vectors(int vectors, const Body& body) {
  switch (vectors) {
    case 1:
      return body(Int<1>());
    case 2:
      return body(Int<2>());
    case 4:
      return body(Int<4>());
    default:
      return body(Int<8>());
  }
}

// How a block of input lies: packed, one column after the other, NV vectors each; banded, vector j of column i being
// the vector number i + j * pitch; or as it is in memory, the columns in planes, and the rows of output or grad_output
// too.
enum class Layout { kPacked, kBanded, kPlanes };

template <int NV, Layout kLayout>
struct InputBlock {
  static constexpr int L = Vec::kLanes;
  const float* x;
  int64_t pitch;  // in floats, of rows or of planes

  MASKED_OPS_INLINE const float* column(uint8_t i) const {
    return x + int64_t{i} * (kLayout == Layout::kPacked ? NV * L : kLayout == Layout::kBanded ? L : pitch);
  }
  MASKED_OPS_INLINE Vec load(const float* column, int j) const {
    return Vec::load(column + j * (kLayout == Layout::kBanded ? pitch : L));
  }
  // What Ahead's pieces hold: a row of planes, else a line.
  static constexpr int kPiece = kLayout == Layout::kPlanes ? NV * L : 1;
  // From a row of the product to the next.
  MASKED_OPS_INLINE int64_t row_pitch() const { return kLayout == Layout::kPlanes ? pitch : NV * L; }
};

// Vectors of a tile: as many as let the block of input stay in L1; the most, where a row has so few entries in a block
// that its sums come and go more often than the input.
inline int tile_vectors(const SparseIndex& index) {
  const int64_t segments = max<int64_t>(index.rows * index.blocks, 1);
  if (index.nnz < tuning::kFewEntries * segments) return tuning::kMaxVectors;
  const int64_t depth = max<int64_t>(min(index.block_cols, index.cols), 1);
  int vectors = tuning::kMaxVectors;
  while (vectors > 1 && depth * vectors * Vec::kLanes > tuning::kBlockFloats) vectors /= 2;
  return vectors;
}

// Rows of input, in whole tiles of this width, that are packed at a time.
inline int64_t rows_at_a_time(const SparseIndex& index, int64_t depth, int64_t width) {
  const int64_t bytes =
      max(tuning::kPackedBytes, min(tuning::kPackedBytesPerEntry * index.nnz, tuning::kMostPackedBytes));
  return max<int64_t>(bytes / int64_t{sizeof(float)} / depth / width, 1) * width;
}

// Brings what the index has of a tile into L2, while the tile before it is computed.
inline void prefetch_tile(const SparseIndex& index, int64_t tile) {
  if (tile >= index.panels * index.blocks) return;
  const auto touch = [](const auto* first, const auto* last) {
    for (const char* p = reinterpret_cast<const char*>(first); p < reinterpret_cast<const char*>(last); p += 64) {
      prefetch_l2(p);
    }
  };
  const SparseIndex::Tile begin = index.tiles[tile], end = index.tiles[tile + 1];
  touch(index.segments + begin.segment, index.segments + end.segment);
  touch(index.columns + begin.entry, index.columns + end.entry);
  if (index.transposed) touch(index.positions + begin.entry, index.positions + end.entry);
}

// packed[d][lane] = matrix[lane][d] for d < depth and so many rows; zero from there to the last vector's end.
template <typename T>
inline void pack_tile(const T* matrix, int64_t ld, int64_t lanes, int vectors, int64_t depth, float* packed) {
  constexpr int L = Vec::kLanes;
  for (int v = 0; v < vectors; ++v) {
    const int64_t rows = min<int64_t>(L, lanes - v * L);
    for (int64_t d = 0; d < depth; d += L) {
      const int64_t columns = min<int64_t>(L, depth - d);
      const T* in = matrix + v * L * ld + d;
      float* out = packed + d * vectors * L + v * L;
      Vec tile[L];
      if (rows == L && columns == L) {
        MASKED_OPS_UNROLL
        for (int i = 0; i < L; ++i) tile[i] = load_floats(in + i * ld);
        transpose(tile);
        MASKED_OPS_UNROLL
        for (int i = 0; i < L; ++i) tile[i].store(out + i * vectors * L);
      } else {
        MASKED_OPS_UNROLL
        for (int i = 0; i < L; ++i) tile[i] = i < rows ? load_first(columns, in + i * ld) : Vec::zero();
        transpose(tile);
        for (int i = 0; i < columns; ++i) tile[i].store(out + i * vectors * L);
      }
    }
  }
}

// A matrix [M][depth] in tiles, of which a thread packs each block of columns for itself when it first comes to it.
// Threads that packed for each other would wait for each other's caches: 128 x 3072 floats take 33 us on one thread,
// and by two 34, or 105 where their cores are far apart.
template <typename T>
class OwnTiles {
 public:
  OwnTiles(Slot slot, const T* matrix, Tiles tiles, int64_t depth, int64_t block_cols)
      : matrix_(matrix),
        tiles_(tiles),
        depth_(depth),
        block_cols_(block_cols),
        blocks_(max<int64_t>(ceil_div(depth, block_cols), 1)) {
    const int64_t flags = ceil_div(tiles.count() * blocks_, kLine) * kLine;
    char* const memory = static_cast<char*>(scratch(slot, flags + tiles.offset(tiles.count(), depth) * sizeof(float)));
    is_packed_ = reinterpret_cast<bool*>(memory);
    packed_ = reinterpret_cast<float*>(memory + flags);
    std::memset(is_packed_, 0, flags);
  }

  // [column][lanes] of a block of a tile.
  MASKED_OPS_INLINE const float* block(int64_t tile, int64_t block) {
    bool& is_packed = is_packed_[tile * blocks_ + block];
    if (!is_packed) {
      pack(tile, block);
      is_packed = true;
    }
    return place(tile, block);
  }
  // The same if it is packed, else null.
  MASKED_OPS_INLINE const float* if_packed(int64_t tile, int64_t block) const {
    return block < blocks_ && is_packed_[tile * blocks_ + block] ? place(tile, block) : nullptr;
  }

 private:
  static constexpr int64_t kLine = 64;

  MASKED_OPS_INLINE float* place(int64_t tile, int64_t block) const {
    return packed_ + tiles_.offset(tile, depth_) + block * block_cols_ * tiles_.vectors_of(tile) * Vec::kLanes;
  }
  __attribute__((noinline)) void pack(int64_t tile, int64_t block) {
    const int64_t first = block * block_cols_, columns = min(block_cols_, depth_ - first);
    pack_tile(matrix_ + tile * tiles_.width() * depth_ + first, depth_, tiles_.lanes(tile), tiles_.vectors_of(tile),
              columns, place(tile, block));
  }

  const T* matrix_;
  Tiles tiles_;
  int64_t depth_, block_cols_, blocks_;
  bool* is_packed_;  // [tile][block]
  float* packed_;
};

// [row][lanes] of a panel, before anything is added.
template <typename T>
void start_from_bias(const T* bias, int64_t rows, int64_t lanes, float* c) {
  for (int64_t r = 0; r < rows; ++r) {
    const Vec value = bias ? Vec::set1(to_float(bias[r])) : Vec::zero();
    for (int64_t j = 0; j < lanes; j += Vec::kLanes) value.store(c + r * lanes + j);
  }
}

// What is brought into L2 while a tile is computed: with each segment a line of what is read next, if there is such,
// and its share of a list of pieces of lines.
struct Ahead {
  static constexpr int64_t kFloats = 16;  // of a line
  static constexpr int kFraction = 20;    // bits
  const float* from = nullptr;
  const float* const* pieces = nullptr;
  int64_t share = 0, at = 0;  // fixed-point numbers of pieces: a segment's, and of those before the first

  // kFloatsOfPiece from each piece on.
  template <int kFloatsOfPiece>
  MASKED_OPS_INLINE void prefetch_at(int64_t s) const {
    if (from) prefetch_l2(from + s * kFloats);
    const int64_t first = at + s * share;
    for (int64_t i = first >> kFraction; i < (first + share) >> kFraction; ++i) {
      const float* const piece = pieces[i];
      MASKED_OPS_UNROLL
      for (int64_t j = 0; j < kFloatsOfPiece; j += kFloats) prefetch_l2(piece + j);
    }
  }
  MASKED_OPS_INLINE void skip(int64_t segments) {
    if (from) from += segments * kFloats;
    at += segments * share;
  }
};

// Where a tile's products are added, [row][lanes]; or, with a start of each row, where there is nothing yet. Streamed,
// which planes with a start can be, they go past the caches.
struct Target {
  float* c;
  const float* start = nullptr;
  bool streams = false;
};

// spmm_tile.cpp: adds a tile of the index times its block of input, of 1, 2, 4 or 8 vectors. The segments' values count
// from `values`; column j of the block is x[j][lanes].
void multiply_tile(const SparseIndex&, int64_t tile, int vectors, const float* values, const float* x, Target,
                   Ahead ahead);
// The same of 7 or 8 vectors, banded or in planes; the pitch counts floats.
void multiply_banded(const SparseIndex&, int64_t tile, int vectors, const float* values, const float* x, int64_t pitch,
                     Target, Ahead ahead);
void multiply_planes(const SparseIndex&, int64_t tile, int vectors, const float* values, const float* x, int64_t pitch,
                     Target, Ahead ahead);

// spmm.cpp: the number of tasks of a product, and what one of the team's threads does of them.
int64_t spmm_tasks(const SparseIndex&, Tiles, int threads);
void spmm_worker(const SparseIndex&, const float* values, Tiles, const float* input, float* output, int threads,
                 TaskQueue& queue, int64_t number);

// sddmm.cpp: the tile's entries of dy * x^T, for the panel's dy[row][lanes]; the segments' results count from
// `results`.
void sample_tile(const SparseIndex&, int64_t tile, int vectors, const float* x, const float* dy, float* results,
                 bool accumulate);
void sample_banded(const SparseIndex&, int64_t tile, int vectors, const float* x, int64_t pitch, const float* dy,
                   float* results, bool accumulate);
void sample_planes(const SparseIndex&, int64_t tile, int vectors, const float* x, int64_t pitch, const float* dy,
                   float* results, bool accumulate, Ahead ahead);

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
