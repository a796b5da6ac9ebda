// Masked GEMM: C[M][N] = A^T B over packed panels, where one operand is a masked weight or the result is masked.
//
// Packed A (shared by the team) is cut into blocks of kKC depths and panels of kMR rows, B into panels of kNR columns
// and the same blocks. A worker takes one panel of B through K and runs the microkernel down the rows of A, so that the
// block of B comes from L2, the panel of A from L1 or L2, and the C tile from registers. The microkernel packs on the
// side: bit by bit, from lines that it has prefetched, the block of B that is next.
//
// Elements of 16 bits become operands (elements.h) while they are packed; sums are floats, and rounded once.
#include "gemm_partition.h"
#include "kernels.h"
#include "pack.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

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
  const T* bias;         // added to the first; null for none
  const uint64_t* bits;  // of the tile's first row, set on the last block of K if C is to be masked; else null
  int64_t bits_stride;   // words
  int64_t column;        // of the tile's corner in its row of bits
};

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

// To C or to the sums, where all vectors are whole.
template <bool kMasked, typename T, typename To, int MR, int NV>
MASKED_OPS_INLINE void store_tile(const Tile<T>& tile, To* to, int64_t ld_to, const Vec (&c)[MR][NV]) {
  constexpr int L = Vec::kLanes;
  To* row = opaque(to);
  const uint64_t* bits = opaque(tile.bits);
  const int64_t ld = opaque(ld_to), bits_stride = opaque(tile.bits_stride), column = tile.column;
  MASKED_OPS_UNROLL
  for (int i = 0; i < MR; ++i) {
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      store_floats(kMasked ? c[i][j].select(Vec::predicate(bits, column + j * L)) : c[i][j], row + j * L);
    }
    row += ld;
    bits += bits_stride;
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

// Takes `steps` steps of packing on the side.
template <int MR, int NV, typename T, typename Packer>
__attribute__((noinline)) void microkernel(int64_t depth, const float* A, const float* B, const Tile<T>& tile,
                                           Packer& packer, int64_t steps) {
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

  const int64_t period = steps > 0 ? max<int64_t>(depth / steps, 1) : depth;
  for (int64_t k = 0; k < depth;) {
    for (const int64_t end = min(k + period, depth); k < end; ++k) {
      Vec b[NV];
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) b[j] = Vec::load(B + j * L);
      MASKED_OPS_UNROLL
      for (int i = 0; i < MR; ++i) {
        const Vec a = Vec::set1(A[i]);
        MASKED_OPS_UNROLL
        for (int j = 0; j < NV; ++j) c[i][j] = Operand<T>::multiply_add(a, b[j], c[i][j]);
      }
      A += kMR;
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
  microkernel<MR, NV>(depth, A, B, tile, packer, steps);
}

template <typename T, typename Packer>
auto microkernel_for(int64_t columns) {
  static_assert(kNV == 3);
  // Each width costs seconds of compilation; where one is missing, the last vectors of the next are empty.
  const int64_t vectors = ceil_div(columns, Vec::kLanes);
  if constexpr (kIsFloat<T>) {
    if (vectors == 1) return run_microkernel<1, T, Packer>;
  }
  if constexpr (kIsFloat<T> || Operand<T>::kDepth > 1) {
    if (vectors <= 2) return run_microkernel<2, T, Packer>;
  }
  return run_microkernel<3, T, Packer>;
}

// pack_A(A, m0, layout): fills A with rows [m0, m0 + layout.rows).
// packer: a class of pack.h that gives B.
template <typename T, typename PackA, typename Packer>
void gemm(const Team& team, int64_t M, int64_t N, int64_t depth, const PackA& pack_A, const Packer& operand_B,
          const T* bias, const Bits* mask, T* C) {
  const int64_t K = ceil_div(depth, Operand<T>::kDepth);
  const bool fetches = (kIsFloat<T> && K > tuning::kKC) || M * N * int64_t{sizeof(T)} >= tuning::kFetchedBytes;
  const int64_t chunk = max<int64_t>(ceil_div(tuning::kPanelABytes, K * int64_t{sizeof(float)} * kMR), 8) * kMR;
  for (int64_t m0 = 0; m0 < M; m0 += chunk) {
    const PackedA layout(min(chunk, M - m0), K);
    float* const A = static_cast<float*>(scratch(Slot::kPanelA, layout.size() * sizeof(float)));
    pack_A(layout, m0, A);

    const Partition partition(N, layout, team.threads);
    const int64_t workers = min<int64_t>(team.threads, partition.units());
    TaskQueue queue(partition.units(), workers);
    team.for_each(workers, [&](int64_t number) {
      TaskQueue::Worker worker(queue, number);
      const int64_t block = layout.block;
      float* buffer = static_cast<float*>(scratch(Slot::kPanelB, 2 * block * kNR * sizeof(float)));
      float* buffers[2] = {buffer, buffer + block * kNR};
      int64_t index = worker.take();
      if (index < 0) return;
      typename Partition::Unit unit = partition[index];
      Block now = {unit.column, unit.columns, 0, min(block, K)};
      Packer packer = operand_B;
      const bool few = Packer::kAtOnce && layout.panels <= tuning::kFewPanels &&
                       N * K * int64_t{sizeof(float)} <= tuning::kMostAtOnceBytes;
      packer.start(now, buffers[0]);
      packer.all();

      float* sums = nullptr;
      if (!kIsFloat<T> && block < K) {
        const int64_t rows = ceil_div(layout.panels, partition.splits()) * layout.height;
        sums = static_cast<float*>(scratch(Slot::kAccumulator, rows * kNR * sizeof(float)));
      }
      for (int turn = 0; now.depth > 0; turn ^= 1) {
        const bool last_block = now.k0 + now.depth == K;
        Block next = {now.column, now.columns, now.k0 + now.depth, min(block, K - now.k0 - now.depth)};
        typename Partition::Unit unit_after = unit;
        if (last_block && (index = worker.take()) >= 0) {
          unit_after = partition[index];
          next = {unit_after.column, unit_after.columns, 0, min(block, K)};
        }
        const auto run = microkernel_for<T, Packer>(unit.columns);
        packer.start(next, buffers[turn ^ 1]);
        const int64_t calls = unit.last - unit.first, steps = few ? 0 : packer.steps();
        for (int64_t call = 0; call < calls; ++call) {
          const int64_t panel = unit.first + call, m = m0 + panel * layout.height;
          Tile<T> tile = {};
          tile.C = C + m * N + unit.column;
          tile.ldc = N;
          tile.columns = unit.columns;
          tile.first = now.k0 == 0;
          tile.last = last_block;
          tile.fetches = fetches;
          tile.bias = bias ? bias + unit.column : nullptr;
          tile.column = unit.column;
          if constexpr (kIsFloat<T>) {
            tile.sums = tile.C;
            tile.ld_sums = N;
          } else if (block < K) {
            tile.sums = sums + call * layout.height * kNR;
            tile.ld_sums = kNR;
          }
          if (mask && last_block) {
            tile.bits = mask->row(m);
            tile.bits_stride = mask->stride;
          }
          run(min(layout.height, m0 + layout.rows - m), now.depth, A + layout.offset(panel, now.k0), buffers[turn],
              tile, packer, steps * (call + 1) / calls - steps * call / calls);
        }
        if (few && next.depth > 0) packer.all();
        unit = unit_after;
        now = next;
      }
    });
  }
}

// Packs A from the rows of a matrix.
template <typename T>
auto from_rows(const Team& team, const T* matrix, int64_t ld) {
  return [=, &team](const PackedA& layout, int64_t m0, float* A) {
    const int64_t blocks = ceil_div(layout.K, layout.block);
    team.for_each(layout.panels * blocks, [&](int64_t task) {
      const int64_t k0 = task / layout.panels * layout.block, panel = task % layout.panels, m = panel * layout.height;
      pack_row_panel(matrix, ld, m0 + m, min(layout.height, layout.rows - m), k0, min(layout.block, layout.K - k0),
                     A + layout.offset(panel, k0));
    });
  };
}

// Packs A from the columns of a matrix, several panels at a time: whole cache lines.
template <typename T>
auto from_columns(const Team& team, const T* matrix, int64_t rows, int64_t ld) {
  return [=, &team](const PackedA& layout, int64_t m0, float* A) {
    constexpr int64_t kPanels = 16;
    const int64_t groups = ceil_div(layout.panels, kPanels), blocks = ceil_div(layout.K, layout.block);
    team.for_each(groups * blocks, [&](int64_t task) {
      const int64_t k0 = task / groups * layout.block, panel = task % groups * kPanels, m = panel * layout.height;
      pack_column_panels(matrix, rows, ld, m0 + m, min(kPanels * layout.height, layout.rows - m), layout.height, k0,
                         min(layout.block, layout.K - k0), A + layout.offset(panel, k0), layout.pitch(k0));
    });
  };
}

// gemm(team, first, rows) for all M rows of C: where A has many and short ones and B is small, every thread takes
// blocks of them that stay in its L2 once they are packed, and packs B for each; else all at once.
template <typename Gemm>
void by_rows(const Team& team, int64_t M, int64_t N, int64_t depth, const Gemm& gemm) {
  const int64_t block = tuning::kRowBlockBytes / (depth * int64_t{sizeof(float)}) / kMR * kMR;
  const int64_t blocks = ceil_div(M, max<int64_t>(block, 1));
  const bool small_B = N * depth * int64_t{sizeof(float)} <= tuning::kMostRepackedBytes;
  if (block < tuning::kLeastRowBlock || blocks < 2 * team.threads || !small_B) return gemm(team, 0, M);
  constexpr Team alone = {1, [](int64_t tasks, void* context, void (*body)(void*, int64_t)) {
                            for (int64_t task = 0; task < tasks; ++task) body(context, task);
                          }};
  team.for_each(blocks, [&](int64_t i) { gemm(alone, M * i / blocks, M * (i + 1) / blocks - M * i / blocks); });
}

// The three operations in one element type. The pointers of api.h, typed.
template <typename T>
struct Linear {
  static const T* in(const void* p) { return static_cast<const T*>(p); }
  static T* out(void* p) { return static_cast<T*>(p); }

  static void forward(const Team& team, int64_t M, int64_t N, int64_t K, const void* input, const void* weight,
                      Bits bits, const void* bias, void* output) {
    by_rows(team, M, N, K, [&](const Team& of_block, int64_t m, int64_t rows) {
      gemm(of_block, rows, N, K, from_rows(of_block, in(input) + m * K, K), MaskedRows<T>(in(weight), K, bits),
           in(bias), nullptr, out(output) + m * N);
    });
  }
  static void grad_input(const Team& team, int64_t M, int64_t N, int64_t K, const void* grad_output, const void* weight,
                         Bits bits, void* grad_input) {
    by_rows(team, M, K, N, [&](const Team& of_block, int64_t m, int64_t rows) {
      gemm(of_block, rows, K, N, from_rows(of_block, in(grad_output) + m * N, N),
           Columns<T, true>(in(weight), N, K, bits), in(nullptr), nullptr, out(grad_input) + m * K);
    });
  }
  static void grad_weight(const Team& team, int64_t M, int64_t N, int64_t K, const void* grad_output, const void* input,
                          Bits bits, void* grad_weight) {
    gemm(team, N, K, M, from_columns(team, in(grad_output), M, N), Columns<T, false>(in(input), M, K, {nullptr, 0}),
         in(nullptr), &bits, out(grad_weight));
  }
};

}  // namespace

void linear(const Team& team, Dtype dtype, int64_t M, int64_t N, int64_t K, const void* input, const void* weight,
            Bits bits, const void* bias, void* output) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t shortest = kIsFloat<T> ? 0 : kConverts<T> ? tuning::kShortRowsConverted : tuning::kShortRows16;
    const bool short_rows = M >= tuning::kShortRowsInput && K <= shortest * M;
    if (M <= tuning::kSmallRows && !short_rows) {
      return linear_small(team, dtype, M, N, K, input, weight, bits, bias, output);
    }
    Linear<T>::forward(team, M, N, K, input, weight, bits, bias, output);
  });
}

void linear_grad_input(const Team& team, Dtype dtype, int64_t M, int64_t N, int64_t K, const void* grad_output,
                       const void* weight, Bits bits, void* grad_input) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t pitch = K * int64_t{sizeof(T)};
    int64_t most = tuning::kSmallRows;
    if (N * pitch <= tuning::kCachedBytes) {
      most = kConverts<T> ? tuning::kDownMostConverted : pitch % 4096 == 0 ? tuning::kDownMostApart : tuning::kDownMost;
    }
    if (M <= most) {
      return linear_grad_input_small(team, dtype, M, N, K, grad_output, weight, bits, grad_input);
    }
    Linear<T>::grad_input(team, M, N, K, grad_output, weight, bits, grad_input);
  });
}

void linear_grad_weight(const Team& team, Dtype dtype, int64_t M, int64_t N, int64_t K, const void* grad_output,
                        const void* input, Bits bits, void* grad_weight) {
  if (M <= tuning::kOuterMost) {
    return linear_grad_weight_small(team, dtype, M, N, K, grad_output, input, bits, grad_weight);
  }
  with_element(dtype, [&](auto element) {
    Linear<decltype(element)>::grad_weight(team, M, N, K, grad_output, input, bits, grad_weight);
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
