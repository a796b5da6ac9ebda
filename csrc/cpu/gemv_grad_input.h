// What grad_input for few rows of input has for a dense weight (gemv_grad_input.cpp) as for a packed one
// (packed_gemv_grad_input.cpp): where tiles are too slow, how threads share its columns, and the end that adds up their
// sums. (How a tile loads and stores its sums decides which registers its loop is left with: each has its own way.)
#pragma once

#include "gemv.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// Whether so many bytes of a weight come too slowly for tiles of columns, which take few of each row.
inline bool too_far_for_tiles(const Team& team, int64_t bytes) {
  return fetches_into_l2() && bytes > team.threads * tuning::kDownBytesFar;
}

// By strips of columns of equal width, a multiple of a tile's, as many for each thread: take(first, last, sums [M][K]).
template <typename T, typename Take>
void by_strips(const Team& team, int64_t M, int64_t K, int64_t tile_columns, T* grad_input, const Take& take) {
  const int64_t least = ceil_div(ceil_div(K, tuning::kSmallStrip), team.threads) * team.threads;
  const int64_t strip = ceil_div(ceil_div(K, least), tile_columns) * tile_columns;
  float* const sums = kIsFloat<T> ? reinterpret_cast<float*>(grad_input)
                                  : static_cast<float*>(scratch(Slot::kPanelB, size_t(M * K) * sizeof(float)));
  team.for_each(ceil_div(K, strip), [&](int64_t task) { take(task * strip, min(K, (task + 1) * strip), sums); });
  if (!kIsFloat<T>) round_floats(sums, M * K, grad_input);
}

// Writes the chunk at column k of the gradient: the sum of all parts' sums.
template <typename T>
void finish_chunk(const Chunks& chunks, const RowTiles& tiles, int64_t k, int64_t K, float* sums, int64_t parts,
                  T* grad_input) {
  constexpr int L = Vec::kLanes;
  const int64_t size = chunks.size();
  for (int64_t t = 0; t < tiles.count; ++t) {
    const int64_t first = tiles.begin(t), rows = tiles.size(t);
    for (int64_t m = 0; m < rows; ++m) {
      const float* from = chunks.at(sums, k, first) + m * L;
      T* const to = grad_input + (first + m) * K;
      for (int64_t at = k, end = min(k + chunks.width, K); at < end; at += L, from += rows * L) {
        Vec sum = Vec::load(from);
        for (int64_t part = 1; part < parts; ++part) sum = sum + Vec::load(from + part * size);
        store_floats(sum, K - at, to + at);
      }
    }
  }
}

// All chunks.
template <typename T>
void finish_sums(const Team& team, const Chunks& chunks, const RowTiles& tiles, int64_t K, float* sums, int64_t parts,
                 T* grad_input) {
  const auto finish = [&](int64_t chunk) {
    finish_chunk(chunks, tiles, chunk * chunks.width, K, sums, parts, grad_input);
  };
  if (chunks.size() >= tuning::kSmallGrain) return team.for_each(chunks.count(), finish);
  for (int64_t chunk = 0; chunk < chunks.count(); ++chunk) finish(chunk);
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
