// Lays the remaining weights out in tiles (tiles.h), once per weight. A warp has some neighbouring tiles.
#include "tiles.h"

#include "tuning.h"

namespace masked_ops::cuda {
namespace {

constexpr int kRun = 16;  // tiles of a warp
constexpr int kWarps = tuning::kPassThreads / kWarp;

// A warp's run of tiles: the bits of their rows, of which a lane has eight.
struct Run {
  const uint64_t* words;
  int64_t N, tiles, count;  // of a row; of runs

  static Run of(const uint64_t* words, int64_t N, int64_t K) {
    return {words, N, tiles_of(K), groups_of(N) * ceil_div<int64_t>(tiles_of(K), kRun)};
  }
  int64_t blocks() const { return ceil_div<int64_t>(count, kWarps); }
  MASKED_OPS_DEVICE static int64_t number() { return int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; }
  MASKED_OPS_DEVICE static int lane() { return int(threadIdx.x % kWarp); }
  MASKED_OPS_DEVICE int64_t group(int64_t run) const { return run / ceil_div<int64_t>(tiles, kRun); }
  MASKED_OPS_DEVICE int64_t first(int64_t run) const { return run % ceil_div<int64_t>(tiles, kRun) * kRun; }
  MASKED_OPS_DEVICE int64_t last(int64_t run) const { return first(run) + kRun < tiles ? first(run) + kRun : tiles; }
  // A row has one word in each tile.
  MASKED_OPS_DEVICE uint64_t word(int64_t row, int64_t tile) const { return row < N ? words[row * tiles + tile] : 0; }
};

// A lane's places in a tile, and the weights at them.
struct Lane {
  const Run& runs;
  int64_t group, tile;
  uint32_t bits[4];

  MASKED_OPS_DEVICE Lane(const Run& of, int64_t group, int64_t tile) : runs(of), group(group), tile(tile), bits{} {
#pragma unroll
    for (int p = 0; p < kLanePieces; ++p) {
      const uint64_t word = runs.word(row(p), tile) >> Run::lane() % 4 * 4;
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) {
        const uint32_t four = uint32_t(word >> 16 * kk) & 15, pairs = (four & 3) | (four & 12) << 2;
        bits[kk] |= pairs << (p / 2 * 8 + p % 2 * 2);
      }
    }
  }
  MASKED_OPS_DEVICE int64_t row(int piece) const { return group * kTileSide + piece * 8 + Run::lane() / 4; }
  MASKED_OPS_DEVICE int count() const { return __popc(bits[0]) + __popc(bits[1]) + __popc(bits[2]) + __popc(bits[3]); }
  // The weight at one of the 32 places of kk, all of which have the same bits in other lanes' words: its rank in a row
  // is that of the tile and what lies before it there.
  MASKED_OPS_DEVICE uint16_t value(int kk, int place, const int64_t* offsets, const uint32_t* ranks,
                                   const uint16_t* values) const {
    const int64_t at = row(place / 8 * 2 + place / 2 % 2);
    const int column = kk * 16 + Run::lane() % 4 * 4 + place / 4 % 2 * 2 + place % 2;
    const uint64_t before = runs.word(at, tile) & ((uint64_t{1} << column) - 1);
    return values[offsets[at] + ranks[at % kTileSide] + __popcll(before)];
  }
};

// at is the size here. A loose step counts for one unit more than it has, for its values meet in banks.
__global__ void __launch_bounds__(tuning::kPassThreads) tile_kernel(Run runs, TilePiece* __restrict__ pieces) {
  const int64_t run = Run::number();
  if (run >= runs.count) return;  // all of the warp
  const int64_t group = runs.group(run);
  for (int64_t tile = runs.first(run); tile < runs.last(run); ++tile) {
    const int mine = Lane(runs, group, tile).count(), most = warp_most(mine);
    TilePiece best = {};
    int least = 0;
    for (int b = 0; (b - 1) * kBatch < most; ++b) {
      const int over = warp_sum(mine > b * kBatch ? mine - b * kBatch : 0), steps = ceil_div(over, kWarp);
      const int cost = b * kBatchUnits + steps * (kLooseUnits + 1);
      if (b == 0 || cost < least) best = {0, uint16_t(b), uint16_t(steps)}, least = cost;
    }
    if (most > kMostLaneValues || tile_units(best) > kDenseUnits) best = {0, kDense, 0};
    best.at = tile_units(best);
    if (Run::lane() == 0) pieces[group * runs.tiles + tile] = best;
  }
}

// A tile in the order of tiles.h, from its first byte on. next() gives a lane's values one after the other.
template <typename Next>
MASKED_OPS_DEVICE void fill_sparse(uint8_t* to, const TilePiece& tile, const Lane& mine, const Next& next) {
  const int lane = Run::lane(), count = mine.count(), strict = tile.batches * kBatch;
  reinterpret_cast<uint4*>(to)[lane] = make_uint4(mine.bits[0], mine.bits[1], mine.bits[2], mine.bits[3]);
  auto* const batches = reinterpret_cast<uint16_t*>(to + kBitsBytes);
  for (int i = 0; i < strict; ++i) {
    batches[i / kBatch * (kBatch * kWarp) + lane * kBatch + i % kBatch] = i < count ? next() : uint16_t(0);
  }
  // The first that each lane has over, then the second, and so on: as few of a step as can be meet in a bank.
  auto* const loose = reinterpret_cast<uint32_t*>(to + kBitsBytes + tile.batches * kBatchBytes);
  const int over = count > strict ? count - strict : 0, most = warp_most(over);
  int filled = 0;
  for (int i = 0; i < most; ++i) {
    const uint32_t all = __ballot_sync(kAllLanes, over > i);
    if (over > i) {
      const uint32_t slot = (strict + i) * kWarp * 4 + lane * 4;
      loose[filled + __popc(all & ((1u << lane) - 1))] = slot << 16 | next();
    }
    filled += __popc(all);
  }
  __syncwarp();
  for (int i = filled + lane; i < tile.loose * kWarp; i += kWarp) loose[i] = loose[0];
}

__global__ void __launch_bounds__(tuning::kPassThreads)
    fill_tiles_kernel(Run runs, const int64_t* __restrict__ offsets, const TilePiece* __restrict__ pieces,
                      const uint16_t* __restrict__ values, uint8_t* __restrict__ data) {
  __shared__ uint32_t all_ranks[kWarps][kTileSide];  // of the tile in each row of the group
  const int64_t run = Run::number();
  if (run >= runs.count) return;  // all of the warp
  const int64_t group = runs.group(run), first = runs.first(run);
  const int lane = Run::lane();
  uint32_t* const ranks = all_ranks[threadIdx.x / kWarp];
  for (int r = lane; r < kTileSide; r += kWarp) {
    uint32_t before = 0;
    for (int64_t t = 0; t < first; ++t) before += __popcll(runs.word(group * kTileSide + r, t));
    ranks[r] = before;
  }
  for (int64_t tile = first; tile < runs.last(run); ++tile) {
    __syncwarp();
    const TilePiece piece = pieces[group * runs.tiles + tile];
    uint8_t* const to = data + int64_t(piece.at) * kTileUnit;
    const Lane mine(runs, group, tile);
    if (piece.batches == kDense) {
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) {
        for (int place = 0; place < 32; ++place) {
          const uint16_t value = mine.bits[kk] >> place & 1 ? mine.value(kk, place, offsets, ranks, values) : 0;
          const int word = kk * 16 + place / 2;
          reinterpret_cast<uint16_t*>(to)[(word / 4 * kWarp + lane) * 8 + word % 4 * 2 + place % 2] = value;
        }
      }
    } else if (tile_units(piece) > 0) {
      uint32_t left[4] = {mine.bits[0], mine.bits[1], mine.bits[2], mine.bits[3]};
      fill_sparse(to, piece, mine, [&] {
        const int kk = left[0] ? 0 : left[1] ? 1 : left[2] ? 2 : 3;
        const uint32_t bits = left[0] ? left[0] : left[1] ? left[1] : left[2] ? left[2] : left[3];
        const uint32_t bit = bits & (0 - bits);
#pragma unroll
        for (int i = 0; i < 4; ++i) left[i] ^= i == kk ? bit : 0;
        return mine.value(kk, __popc(bit - 1), offsets, ranks, values);
      });
    }
    __syncwarp();
    for (int r = lane; r < kTileSide; r += kWarp) ranks[r] += __popcll(runs.word(group * kTileSide + r, tile));
  }
}

}  // namespace
}  // namespace masked_ops::cuda

int masked_ops_cuda_tile(const uint64_t* words, int64_t N, int64_t K, masked_ops::cuda::TilePiece* pieces,
                         void* stream) {
  using namespace masked_ops::cuda;
  const Run runs = Run::of(words, N, K);
  if (runs.count == 0) return 0;
  if (runs.blocks() > INT32_MAX) return kUnsupported;
  return launch(tile_kernel, uint32_t(runs.blocks()), tuning::kPassThreads, 0, stream, runs, pieces);
}

int masked_ops_cuda_fill_tiles(const uint64_t* words, int64_t N, int64_t K, const int64_t* offsets,
                               const masked_ops::cuda::TilePiece* pieces, const void* values, void* data,
                               void* stream) {
  using namespace masked_ops::cuda;
  const Run runs = Run::of(words, N, K);
  if (runs.count == 0) return 0;
  if (runs.blocks() > INT32_MAX) return kUnsupported;
  return launch(fill_tiles_kernel, uint32_t(runs.blocks()), tuning::kPassThreads, 0, stream, runs, offsets, pieces,
                static_cast<const uint16_t*>(values), static_cast<uint8_t*>(data));
}
