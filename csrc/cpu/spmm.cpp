// SpMM: output = input * weight^T + bias, the weight given by an index and its values.
//
// Each thread packs the input into tiles [K][lanes], whose blocks of columns fit L1 (see sparse_index.h). A task takes
// a panel of rows through all blocks (spmm_tile.cpp); the panel's part of the output, [row][lanes], stays in L2 and
// begins as the bias. At the end the panel is transposed into the output. Elements of 16 bits become floats on the way
// in, the values all at once, and are rounded on the way out.
//
// The values of a dense weight are compressed by slices of rows between the blocks of the panel before, so that reading
// memory and computing alternate within a thread and overlap between threads (128, 768 -> 3072 at 90%: 0.45 ms for 0.56
// with a pass of its own).
#include "kernels.h"
#include "sparse_tiles.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;

// output[lane][r] = c[r][lane] for the valid lanes of a tile.
template <typename T>
void store_output(const float* c, int64_t rows, int64_t width, int64_t lanes, T* output, int64_t ld) {
  for (int64_t j = 0; j < lanes; j += L) {
    const int64_t valid = min<int64_t>(L, lanes - j);
    for (int64_t r = 0; r < rows; r += L) {
      const int64_t columns = min<int64_t>(L, rows - r);
      Vec tile[L];
      MASKED_OPS_UNROLL
      for (int i = 0; i < L; ++i) tile[i] = Vec::load(c + (r + i) * width + j);
      transpose(tile);
      T* const to = output + j * ld + r;
      if (columns == L && valid == L) {
        MASKED_OPS_UNROLL
        for (int i = 0; i < L; ++i) store_floats(tile[i], to + i * ld);
      } else {
        for (int64_t i = 0; i < valid; ++i) store_floats(tile[i], columns, to + i * ld);
      }
    }
  }
}

const float* gather_values(const SparseIndex& index, int64_t tile, const float* values) {
  const int64_t first = index.tiles[tile].entry, n = index.tiles[tile + 1].entry - first;
  const uint32_t* const positions = index.positions + first;
  float* const gathered = static_cast<float*>(scratch(Slot::kValues, n * sizeof(float)));
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {  // two positions a load: loads are what limits this
    uint64_t pair[2];
    std::memcpy(pair, positions + i, sizeof(pair));
    const float a = values[uint32_t(pair[0])], b = values[pair[0] >> 32];
    const float c = values[uint32_t(pair[1])], d = values[pair[1] >> 32];
    gathered[i] = a;
    gathered[i + 1] = b;
    gathered[i + 2] = c;
    gathered[i + 3] = d;
  }
  for (; i < n; ++i) gathered[i] = values[positions[i]];
  return gathered;
}

// Rows of a dense weight that become values while another panel is multiplied: a slice with each of its blocks.
struct Slices {
  const DenseWeight* weight = nullptr;  // null for none
  int64_t first, last;                  // rows

  int64_t begin(int64_t block, int64_t blocks) const { return first + (last - first) * block / blocks; }
  void compress(int64_t block, int64_t blocks) const {
    compress_rows(*weight, begin(block, blocks), begin(block + 1, blocks));
  }
};

// Runs fetch the values that a row has in the next block; this does so for the first block. It loads: of so many
// prefetches at once most would be dropped.
void touch_first_values(const SparseIndex& index, int64_t tile, const float* values) {
  const SparseIndex::Segment* at = index.segments + index.tiles[tile].segment;
  for (int64_t r = index.tiles[tile].run; r < index.tiles[tile + 1].run; ++r) {
    const SparseIndex::Run run = index.runs[r];
    for (int64_t s = 0; s < int64_t{run.segments} * run.rows; ++s, ++at) {
      const volatile float* const v = values + at->value;
      static_cast<void>(v[0]);
      static_cast<void>(v[run.count - 1]);
    }
  }
}

// The most tiles of input that a task takes.
int64_t most_tiles(const SparseIndex& index, int64_t width) {
  return max<int64_t>(tuning::kPanelFloats / index.panel_rows / width, 1);
}

// Whether each thread takes rows of input of its own, rather than panels of the output: then all of them read all
// entries, and none packs what another packs too.
bool takes_rows(const SparseIndex& index, Tiles tiles, int threads) {
  const int64_t least = index.transposed ? tuning::kPackedPerGathered : tuning::kPackedPerEntry;
  const int64_t packed = tiles.M * index.cols;
  return tiles.count() >= threads &&
         (packed >= least * index.nnz || packed * int64_t{sizeof(float)} > tuning::kPackedBytes);
}

// How a product is cut: into panels of the output by groups of tiles of the input; the groups are shared out first
// where threads take rows.
class Cut {
 public:
  Cut(const SparseIndex& index, Tiles tiles, int threads)
      : panels_(index.panels), tiles_(tiles.count()), shares_(takes_rows(index, tiles, threads) ? threads : 1) {
    const int64_t least = ceil_div(tiles_, most_tiles(index, tiles.width()));
    groups_ = min(max(ceil_div(least, shares_) * shares_, ceil_div(int64_t{threads}, panels_)), tiles_);
  }

  struct Task {
    int64_t panel, first, last;  // tiles
  };

  int64_t tasks() const { return panels_ * groups_; }
  Task operator[](int64_t task) const {
    int64_t share = 0;
    while (task >= panels_ * begin(share + 1)) ++share;
    task -= panels_ * begin(share);
    const int64_t of_share = begin(share + 1) - begin(share), group = begin(share) + task % of_share;
    return {task / of_share, tiles_ * group / groups_, tiles_ * (group + 1) / groups_};
  }

 private:
  int64_t begin(int64_t share) const { return groups_ * share / shares_; }  // of its groups

  int64_t panels_, tiles_, shares_;
  int64_t groups_;
};

// The rows of input that all threads take at a time: equal shares.
int64_t rows_of_product(const SparseIndex& index, Tiles all, int threads) {
  const int64_t most = rows_at_a_time(index, max<int64_t>(index.cols, 1), all.width());
  if (!takes_rows(index, all, threads)) return most;
  const int64_t turns = ceil_div(all.M, most * threads);
  return ceil_div(all.count(), turns * threads) * threads * all.width();
}

template <typename T>
struct Product {
  const SparseIndex& index;
  const float* values;
  Tiles tiles;
  const T* input;
  const T* bias;
  T* output;

  OwnTiles<T> own_tiles() const { return {Slot::kPanelA, input, tiles, index.cols, index.block_cols}; }

  // One panel of the output for tiles [first, last) of the input.
  void multiply_panel(const Slices& slices, int64_t panel, int64_t first, int64_t last, OwnTiles<T>& x) const {
    const int64_t row = panel * index.panel_rows, rows = min(index.panel_rows, index.rows - row);
    const int64_t padded = ceil_div(rows, L) * L;
    float* const c =
        static_cast<float*>(scratch(Slot::kAccumulator, (last - first) * padded * tiles.width() * sizeof(float)));
    const auto c_of = [&](int64_t t) { return c + (t - first) * padded * tiles.width(); };
    for (int64_t t = first; t < last; ++t) {
      start_from_bias(bias ? bias + row : nullptr, rows, tiles.vectors_of(t) * L, c_of(t));
    }
    if (!index.transposed && index.nnz >= tuning::kManyValues)
      touch_first_values(index, panel * index.blocks, values + index.panel_values[panel]);
    for (int64_t block = 0; block < index.blocks; ++block) {
      const int64_t tile = panel * index.blocks + block;
      if (slices.weight) slices.compress(block, index.blocks);
      if (index.tiles[tile].entry == index.tiles[tile + 1].entry) continue;
      const float* const v = index.transposed ? gather_values(index, tile, values) : values + index.panel_values[panel];
      for (int64_t t = first; t < last; ++t) {
        const float* const now = x.block(t, block);
        const Ahead ahead = {t + 1 < last ? x.if_packed(t + 1, block) : x.if_packed(first, block + 1)};
        multiply_tile(index, tile, tiles.vectors_of(t), v, now, {c_of(t)}, ahead);
      }
    }
    for (int64_t t = first; t < last; ++t) {
      store_output(c_of(t), rows, tiles.vectors_of(t) * L, tiles.lanes(t),
                   output + t * tiles.width() * index.rows + row, index.rows);
    }
  }

  // What falls to one thread.
  void work(const Cut& cut, TaskQueue& queue, int64_t number) const {
    OwnTiles<T> x = own_tiles();
    TaskQueue::Worker worker(queue, number);
    for (int64_t task; (task = worker.take()) >= 0;) {
      const Cut::Task t = cut[task];
      multiply_panel({}, t.panel, t.first, t.last, x);
    }
  }
};

template <typename T>
void multiply_all(const Team& team, const SparseIndex& index, const T* all_values, int64_t M, const T* input,
                  const T* bias, T* output) {
  const float* const values = as_floats(team, Slot::kPanelB, all_values, index.nnz);
  const int vectors = tile_vectors(index);
  const int64_t chunk = rows_of_product(index, {M, vectors}, team.threads);
  for (int64_t m = 0; m < M; m += chunk) {
    const Product<T> product = {
        index, values, {min(chunk, M - m), vectors}, input + m * index.cols, bias, output + m * index.rows};
    const Cut cut(index, product.tiles, team.threads);
    TaskQueue queue(cut.tasks(), team.threads);
    team.for_each(team.threads, [&](int64_t number) { product.work(cut, queue, number); });
  }
}

// Each thread multiplies a panel while it compresses the next that it will take.
void compress_and_multiply(const Team& team, const SparseIndex& index, const DenseWeight& weight, int64_t M,
                           const float* input, const float* bias, float* output) {
  const Product<float> product = {index, weight.values, {M, tile_vectors(index)}, input, bias, output};
  TaskQueue queue(index.panels, team.threads);
  const auto rows_of = [&](int64_t panel) {
    const int64_t row = panel * index.panel_rows;
    return Slices{&weight, row, min(index.rows, row + index.panel_rows)};
  };
  team.for_each(team.threads, [&](int64_t number) {
    OwnTiles<float> x = product.own_tiles();
    TaskQueue::Worker worker(queue, number);
    int64_t panel = worker.take();
    if (panel >= 0) rows_of(panel).compress(0, 1);
    for (int64_t next; panel >= 0; panel = next) {
      next = worker.take();
      const Slices slices = next >= 0 ? rows_of(next) : Slices{};
      product.multiply_panel(slices, panel, 0, product.tiles.count(), x);
    }
  });
}

}  // namespace

void spmm(const Team& team, const SparseIndex& index, Dtype dtype, const void* values, int64_t M, const void* input,
          const void* bias, void* output) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    multiply_all(team, index, static_cast<const T*>(values), M, static_cast<const T*>(input),
                 static_cast<const T*>(bias), static_cast<T*>(output));
  });
}

int64_t spmm_tasks(const SparseIndex& index, Tiles tiles, int threads) { return Cut(index, tiles, threads).tasks(); }
void spmm_worker(const SparseIndex& index, const float* values, Tiles tiles, const float* input, float* output,
                 int threads, TaskQueue& queue, int64_t number) {
  Product<float>{index, values, tiles, input, nullptr, output}.work(Cut(index, tiles, threads), queue, number);
}

void compress_spmm(const Team& team, const SparseIndex& index, Dtype dtype, Bits bits, const int64_t* offsets,
                   const void* weight, void* values, int64_t M, const void* input, const void* bias, void* output) {
  // Where a panel is one task, each thread has one, and it is worth packing all of the input for it.
  const Tiles tiles = {M, tile_vectors(index)};
  const bool packs_much = takes_rows(index, tiles, team.threads) && tuning::kPackedPerWeight * M >= index.rows;
  if (dtype == Dtype::kFloat && tiles.count() <= most_tiles(index, tiles.width()) && index.panels >= team.threads &&
      !packs_much) {
    const DenseWeight dense = {bits, index.cols, offsets, static_cast<const float*>(weight),
                               static_cast<float*>(values)};
    return compress_and_multiply(team, index, dense, M, static_cast<const float*>(input),
                                 static_cast<const float*>(bias), static_cast<float*>(output));
  }
  compress(team, dtype == Dtype::kFloat ? 4 : 2, bits, index.rows, index.cols, offsets, weight, values);
  spmm(team, index, dtype, values, M, input, bias, output);
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
