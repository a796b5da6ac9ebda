// SpMM: output = input * weight^T + bias, the weight given by an index and its values.
//
// The input is packed into tiles [K][lanes], whose blocks of columns fit L1 (see sparse_index.h). A task takes a panel
// of rows through all blocks (spmm_tile.cpp); the panel's part of the output, [row][lanes], stays in L2 and begins as
// the bias. At the end the panel is transposed into the output. Elements of 16 bits become floats on the way in, the
// values all at once, and are rounded on the way out.
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

// One panel of the output for tiles [first, last) of the packed input x.
template <typename T>
void multiply_panel(const SparseIndex& index, const float* values, const Slices& slices, int64_t panel, Tiles tiles,
                    int64_t first, int64_t last, const float* x, const T* bias, T* output) {
  const int64_t row = panel * index.panel_rows, rows = min(index.panel_rows, index.rows - row);
  const int64_t padded = ceil_div(rows, L) * L;
  float* const c =
      static_cast<float*>(scratch(Slot::kAccumulator, (last - first) * padded * tiles.width() * sizeof(float)));
  const auto c_of = [&](int64_t t) { return c + (t - first) * padded * tiles.width(); };
  const auto x_of = [&](int64_t t, int64_t block) {
    return x + tiles.offset(t, index.cols) + block * index.block_cols * tiles.vectors_of(t) * L;
  };
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
      const Ahead ahead = {t + 1 < last ? x_of(t + 1, block) : x_of(first, block + 1)};
      multiply_tile(index, tile, tiles.vectors_of(t), v, x_of(t, block), {c_of(t)}, ahead);
    }
  }
  for (int64_t t = first; t < last; ++t) {
    store_output(c_of(t), rows, tiles.vectors_of(t) * L, tiles.lanes(t), output + t * tiles.width() * index.rows + row,
                 index.rows);
  }
}

// The most tiles of input that a task takes.
int64_t tiles_per_task(const SparseIndex& index, int64_t width) {
  return max<int64_t>(tuning::kPanelFloats / index.panel_rows / width, 1);
}

// The rows of input that are taken at a time, packed.
template <typename T>
const float* pack_input(const Team& team, const SparseIndex& index, Tiles tiles, const T* input) {
  float* const x = static_cast<float*>(scratch(Slot::kPanelA, tiles.offset(tiles.count(), index.cols) * sizeof(float)));
  pack_tiles(team, input, tiles, index.cols, x);
  return x;
}

template <typename T>
void multiply_packed(const Team& team, const SparseIndex& index, const float* values, Tiles tiles, const float* x,
                     const T* bias, T* output) {
  const int64_t wanted = ceil_div(int64_t{team.threads}, index.panels);
  const int64_t per_task = min(tiles_per_task(index, tiles.width()), ceil_div(tiles.count(), wanted));
  const int64_t groups = ceil_div(tiles.count(), per_task);
  team.for_each(index.panels * groups, [&](int64_t task) {
    const int64_t panel = task / groups, first = task % groups * per_task;
    multiply_panel(index, values, {}, panel, tiles, first, min(tiles.count(), first + per_task), x, bias, output);
  });
}

template <typename T>
void multiply_all(const Team& team, const SparseIndex& index, const T* all_values, int64_t M, const T* input,
                  const T* bias, T* output) {
  const float* const values = as_floats(team, Slot::kPanelB, all_values, index.nnz);
  const int vectors = tile_vectors(index);
  const int64_t chunk = rows_at_a_time(index, max<int64_t>(index.cols, 1), vectors * L);
  for (int64_t m = 0; m < M; m += chunk) {
    const Tiles tiles = {min(chunk, M - m), vectors};
    const float* const x = pack_input(team, index, tiles, input + m * index.cols);
    multiply_packed(team, index, values, tiles, x, bias, output + m * index.rows);
  }
}

// Each thread multiplies a panel while it compresses the next that it will take.
void compress_and_multiply(const Team& team, const SparseIndex& index, const DenseWeight& weight, int64_t M,
                           const float* input, const float* bias, float* output) {
  const Tiles tiles = {M, tile_vectors(index)};
  const float* const x = pack_input(team, index, tiles, input);
  TaskQueue queue(index.panels, team.threads);
  const auto rows_of = [&](int64_t panel) {
    const int64_t row = panel * index.panel_rows;
    return Slices{&weight, row, min(index.rows, row + index.panel_rows)};
  };
  team.for_each(team.threads, [&](int64_t number) {
    TaskQueue::Worker worker(queue, number);
    int64_t panel = worker.take();
    if (panel >= 0) rows_of(panel).compress(0, 1);
    for (int64_t next; panel >= 0; panel = next) {
      next = worker.take();
      const Slices slices = next >= 0 ? rows_of(next) : Slices{};
      multiply_panel(index, weight.values, slices, panel, tiles, 0, tiles.count(), x, bias, output);
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

void spmm_packed(const Team& team, const SparseIndex& index, const float* values, Tiles tiles, const float* x,
                 float* output) {
  multiply_packed<float>(team, index, values, tiles, x, nullptr, output);
}

void compress_spmm(const Team& team, const SparseIndex& index, Dtype dtype, Bits bits, const int64_t* offsets,
                   const void* weight, void* values, int64_t M, const void* input, const void* bias, void* output) {
  // Where a panel is one task, and each thread has one.
  const int64_t width = tile_vectors(index) * L;
  if (dtype == Dtype::kFloat && M <= tiles_per_task(index, width) * width && index.panels >= team.threads) {
    const DenseWeight dense = {bits, index.cols, offsets, static_cast<const float*>(weight),
                               static_cast<float*>(values)};
    return compress_and_multiply(team, index, dense, M, static_cast<const float*>(input),
                                 static_cast<const float*>(bias), static_cast<float*>(output));
  }
  compress(team, dtype == Dtype::kFloat ? 4 : 2, bits, index.rows, index.cols, offsets, weight, values);
  spmm(team, index, dtype, values, M, input, bias, output);
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
