// Lays the remaining weights out for decode_gathered (gathered.h), once per weight: a warp has a piece.
//
// Which column goes to which slot is a packing of bins, one for each slot but its phase: a bin takes columns no two of
// which have a weight in the same row. Columns of many weights come first, and each goes to the first bin that takes
// all of it; if none does, its rows are dealt out to those that take most. There are as many groups from the start as
// rows and columns need in any case. Dealing out may use up all places of a kind and so fail; if there are as many bins
// from the start as columns, there is an empty one for each, and it does not come to that. Nothing is drawn at random:
// what the first pass has counted, the second one fills.
#include "gathered.h"

#include "tuning.h"

namespace masked_ops::cuda {
namespace {

constexpr int kBins = kMostGroups * kHalfSlots, kWordsOfRow = kGatherColumns / 64;

struct Scratch {
  uint16_t rows[kGatherColumns];  // of each column, those that have a weight there
  uint16_t taken[kBins];          // rows that have a value there
  uint8_t phases[kBins];          // that have a column there
  int32_t order[kStripRows];
  uint16_t before[kStripRows][kWordsOfRow];  // weights of a row in the words before this one
};

struct Pieces {
  const uint64_t* words;
  const int32_t* order;
  int64_t N, K, count;

  static Pieces of(const uint64_t* words, const int32_t* order, int64_t N, int64_t K) {
    return {words, order, N, K, strips_of(N) * gather_segments(K)};
  }
};

// A warp's piece, its rows in scratch.
struct Piece {
  const Pieces& all;
  Scratch& scratch;
  int64_t strip, first;  // and column
  int words;             // of a row

  MASKED_OPS_DEVICE static int lane() { return int(threadIdx.x); }

  MASKED_OPS_DEVICE Piece(const Pieces& of, Scratch& scratch, int64_t number) : all(of), scratch(scratch) {
    strip = number / gather_segments(of.K);
    first = number % gather_segments(of.K) * kGatherColumns;
    const int64_t left = words_per_row(of.K - first);
    words = int(left < kWordsOfRow ? left : kWordsOfRow);
    if (lane() < kStripRows) scratch.order[lane()] = of.order[strip * kStripRows + lane()];
    __syncwarp();
    for (int w = 0; w < words; ++w) {
      uint32_t here[2] = {};  // of two columns
      for (int r = 0; r < kStripRows; ++r) {
        const uint64_t bits = word(r, w) >> lane();
        here[0] |= uint32_t(bits & 1) << r;
        here[1] |= uint32_t(bits >> kWarp & 1) << r;
      }
      scratch.rows[w * 64 + lane()] = uint16_t(here[0]);
      scratch.rows[w * 64 + kWarp + lane()] = uint16_t(here[1]);
    }
    __syncwarp();
  }
  // Of a row of the strip; number -1 if there is none.
  MASKED_OPS_DEVICE const uint64_t* row(int r) const {
    return all.words + scratch.order[r] * words_per_row(all.K) + first / 64;
  }
  MASKED_OPS_DEVICE uint64_t word(int r, int w) const { return scratch.order[r] < 0 ? 0 : row(r)[w]; }

  // Groups that no packing can do without.
  MASKED_OPS_DEVICE int least(int steps) const {
    int weights = 0, columns = 0;  // of a row; of one kind
    if (lane() < kStripRows) {
      for (int w = 0; w < words; ++w) weights += __popcll(word(lane(), w));
    }
    for (int i = lane() % kSlots; i < words * 64; i += kSlots) columns += scratch.rows[i] != 0;
    const int by_rows = ceil_div(weights, kHalfSlots), by_columns = ceil_div(columns, steps);
    return warp_most(by_rows > by_columns ? by_rows : by_columns);
  }

  // Of a packing that begins with so many: then a column finds a bin for itself.
  MASKED_OPS_DEVICE int most() const { return words * 64 / kHalfSlots; }

  // Finds slots for all columns: put(group, phase, bin, column, rows) for each. The groups used, of which there are so
  // many from the start, or -1 if they are too many.
  template <int kSteps, typename Put>
  MASKED_OPS_DEVICE int pack(int groups, const Put& put) {
    int heaviest = 0;
    for (int i = lane(); i < kBins; i += kWarp) scratch.taken[i] = 0, scratch.phases[i] = 0;
    for (int i = lane(); i < words * 64; i += kWarp) {
      const int count = __popc(scratch.rows[i]);
      heaviest = count > heaviest ? count : heaviest;
    }
    __syncwarp();
    for (int count = warp_most(heaviest); count > 0; --count) {
      for (int from = 0; from < words * 64; from += kWarp) {
        uint32_t columns = __ballot_sync(kAllLanes, __popc(scratch.rows[from + lane()]) == count);
        for (; columns != 0; columns &= columns - 1) {
          const int column = from + __popc((columns & (0 - columns)) - 1);
          if (!place<kSteps>(column, groups, put)) return -1;
        }
      }
    }
    return groups;
  }

 private:
  template <int kSteps, typename Put>
  MASKED_OPS_DEVICE bool place(int column, int& groups, const Put& put) {
    const int odd = column / kHalfSlots % 2;
    for (uint32_t rest = scratch.rows[column]; rest != 0;) {
      const int all_rows = __popc(rest);
      int best = 0;  // rows that it takes, and which of the lane's it is: the first one of the most
      for (int i = lane(); i < groups * kSteps; i += kWarp) {
        const int phase = i % kSteps * 2 + odd, bin = bin_of(i / kSteps, phase, column);
        if (scratch.phases[bin] >> phase & 1) continue;
        const int rows = __popc(rest & ~uint32_t(scratch.taken[bin]));
        if (rows > best >> 16) best = rows << 16 | (0xffff - i);
        if (rows == all_rows) break;
      }
      best = warp_most(best);
      if (best == 0) {
        if (groups == most()) return false;
        ++groups;
        continue;
      }
      const int i = 0xffff - (best & 0xffff), phase = i % kSteps * 2 + odd, bin = bin_of(i / kSteps, phase, column);
      const uint32_t rows = rest & ~uint32_t(scratch.taken[bin]);
      put(i / kSteps, phase, bin % kHalfSlots, column, rows);
      __syncwarp();  // all have read
      if (lane() == 0) scratch.taken[bin] |= uint16_t(rows), scratch.phases[bin] |= uint8_t(1 << phase);
      __syncwarp();
      rest &= ~rows;
    }
    return true;
  }
  MASKED_OPS_DEVICE static int bin_of(int group, int phase, int column) {
    return group * kHalfSlots + ((column ^ phase) & (kHalfSlots - 1));
  }
};

__global__ void __launch_bounds__(kWarp) gather_kernel(Pieces pieces, GatheredPiece* __restrict__ to) {
  __shared__ Scratch scratch;
  Piece piece(pieces, scratch, blockIdx.x);
  const auto count = [](int, int, int, int, uint32_t) {};
  GatheredPiece best = {};
  const auto consider = [&](int start, int groups, int steps) {
    const uint32_t batches = uint32_t(ceil_div(groups * steps, kBatchSteps)), size = batches * batch_units(steps);
    if (groups >= 0 && (best.steps == 0 || size < best.size)) {
      best = {0, size, batches, uint16_t(steps), uint16_t(start)};
    }
  };
  const int least_of_4 = piece.least(4), least_of_2 = piece.least(2);
  consider(least_of_4, piece.pack<4>(least_of_4, count), 4);
  consider(least_of_2, piece.pack<2>(least_of_2, count), 2);
  if (best.steps == 0) consider(piece.most(), piece.pack<2>(piece.most(), count), 2);
  if (Piece::lane() == 0) to[blockIdx.x] = best;
}

// Where a piece's values and their columns go.
template <int kSteps>
struct Writer {
  using Batch = BatchOf<kSteps>;
  const Piece& piece;
  const uint16_t* values;  // of the lane's row, from the piece on
  uint8_t* to;

  MASKED_OPS_DEVICE void operator()(int group, int phase, int bin, int column, uint32_t rows) const {
    const int t = group % Batch::kGroups, step = t * kSteps + phase / 2, slot = phase % 2 * kHalfSlots + bin;
    uint8_t* const batch = to + int64_t(group / Batch::kGroups) * Batch::kBytes;
    const int r = Piece::lane();
    if (r == 0) batch[slot * kBatchSteps + step % 2 * 4 + step / 2] = uint8_t(column / kSlots);
    if (r < kStripRows && (rows >> r & 1)) {
      const uint64_t below = piece.word(r, column / 64) & ((uint64_t{1} << column % 64) - 1);
      const uint16_t value = values[piece.scratch.before[r][column / 64] + __popcll(below)];
      const int of_lane = r % 8 * 4 + bin / 2, half = bin % 2;
      auto* const places = reinterpret_cast<uint16_t*>(batch + Batch::kValuesAt + t / 2 * kTwoGroupsBytes);
      places[of_lane * 8 + t % 2 * 4 + r / 8 * 2 + half] = value;
      auto* const positions = reinterpret_cast<uint32_t*>(batch + kLinesBytes);
      atomicOr(positions + of_lane, uint32_t(phase) << (Batch::shift(t) + (r / 8 * 2 + half) * 4));
    }
  }
};

__global__ void __launch_bounds__(kWarp)
    fill_gathered_kernel(Pieces pieces, const int64_t* __restrict__ offsets, const GatheredPiece* __restrict__ found,
                         const uint16_t* __restrict__ values, uint8_t* __restrict__ data) {
  __shared__ Scratch scratch;
  const GatheredPiece here = found[blockIdx.x];
  if (here.size == 0) return;
  Piece piece(pieces, scratch, blockIdx.x);
  const int lane = Piece::lane();
  uint8_t* const to = data + int64_t(here.at) * kGatherUnit;
  for (uint32_t i = lane; i < here.size * (kGatherUnit / 16); i += kWarp) {
    reinterpret_cast<uint4*>(to)[i] = make_uint4(0, 0, 0, 0);
  }
  if (lane < kStripRows && scratch.order[lane] >= 0) {
    const uint64_t* const row = piece.row(lane);
    values += offsets[scratch.order[lane]];
    for (int64_t w = -piece.first / 64; w < 0; ++w) values += __popcll(row[w]);
    int before = 0;
    for (int w = 0; w < piece.words; ++w) {
      scratch.before[lane][w] = uint16_t(before);
      before += __popcll(row[w]);
    }
  }
  __syncwarp();
  if (here.steps == 4) {
    piece.pack<4>(here.start, Writer<4>{piece, values, to});
  } else {
    piece.pack<2>(here.start, Writer<2>{piece, values, to});
  }
}

}  // namespace
}  // namespace masked_ops::cuda

int masked_ops_cuda_gather(const uint64_t* words, int64_t N, int64_t K, const int32_t* order,
                           masked_ops::cuda::GatheredPiece* pieces, void* stream) {
  using namespace masked_ops::cuda;
  const Pieces all = Pieces::of(words, order, N, K);
  if (all.count == 0) return 0;
  if (all.count > INT32_MAX) return kUnsupported;
  return launch(gather_kernel, uint32_t(all.count), kWarp, 0, stream, all, pieces);
}

int masked_ops_cuda_fill_gathered(const uint64_t* words, int64_t N, int64_t K, const int64_t* offsets,
                                  const int32_t* order, const masked_ops::cuda::GatheredPiece* pieces,
                                  const void* values, void* data, void* stream) {
  using namespace masked_ops::cuda;
  const Pieces all = Pieces::of(words, order, N, K);
  if (all.count == 0) return 0;
  if (all.count > INT32_MAX) return kUnsupported;
  return launch(fill_gathered_kernel, uint32_t(all.count), kWarp, 0, stream, all, offsets, pieces,
                static_cast<const uint16_t*>(values), static_cast<uint8_t*>(data));
}
