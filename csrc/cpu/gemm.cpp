// Masked GEMM: C[M][N] = A^T B over packed panels, where one operand is a masked weight or the result is masked.
//
// Packed A (shared by the team) is cut into blocks of kKC depths and panels of kMR rows, B into panels of kNR columns
// and the same blocks. A worker takes one panel of B through K and runs the microkernel down the rows of A, so that the
// block of B comes from L2, the panel of A from L1 or L2, and the C tile from registers. The microkernel packs on the
// side: bit by bit, from lines that it has prefetched, the block of B that is next (with few rows, or where registers
// are few: at once, before).
// Tall and small products go the other way round: a worker packs a block of A for itself and takes all of B through it.
// Where C is narrow, an element of A serves few panels of B: its rows are read as they lie, and not packed at all.
//
// Elements of 16 bits become operands (elements.h) while they are packed; sums are floats, and rounded once.
#include "gemm_partition.h"
#include "kernels.h"
#include "microkernel.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

// A from the rows of a matrix, kPanels panels at a time.
template <typename T>
struct RowsOfA {
  static constexpr int64_t kPanels = 1, kDepth = Operand<T>::kDepth;
  static constexpr bool kMayBeDirect = !kConverts<T>;  // whether elements, or pairs of a row, are operands as they lie
  const T* matrix;
  int64_t ld;

  bool is_direct() const { return ld % kDepth == 0; }
  DirectPanel direct(int64_t m, int64_t k0) const { return {matrix + m * ld + k0 * kDepth, ld / kDepth}; }

  void pack(const PackedA& layout, int64_t m0, int64_t panel, int64_t k0, float* A) const {
    const int64_t m = panel * layout.height;
    pack_row_panel(matrix, ld, m0 + m, min(layout.height, layout.rows - m), k0, layout.depth(k0), A);
  }
};

// A from the columns of a matrix, several panels at a time: whole cache lines.
template <typename T>
struct ColumnsOfA {
  static constexpr int64_t kPanels = 16;
  static constexpr bool kMayBeDirect = false;
  const T* matrix;
  int64_t rows, ld;

  void pack(const PackedA& layout, int64_t m0, int64_t panel, int64_t k0, float* A) const {
    const int64_t m = panel * layout.height;
    pack_column_panels(matrix, rows, ld, m0 + m, min(kPanels * layout.height, layout.rows - m), layout.height, k0,
                       layout.depth(k0), A, layout.pitch(k0));
  }
};

// C[M][N] = A^T B. A is RowsOfA or ColumnsOfA, B a class of pack.h.
template <typename T, typename OperandA, typename Packer>
class Gemm {
 public:
  Gemm(int64_t M, int64_t N, int64_t depth, const OperandA& A, const Packer& B, const T* bias, const Bits* mask, T* C)
      : M_(M), N_(N), K_(ceil_div(depth, Operand<T>::kDepth)), A_(A), B_(B), bias_(bias), mask_(mask), C_(C) {}

  void run(const Team& team) const {
    if constexpr (OperandA::kMayBeDirect) {
      if (A_.is_direct() && N_ <= tuning::kDirectColumns && M_ >= tuning::kLeastDirectRows) {
        for (int64_t m0 = 0; m0 < M_; m0 += tuning::kDirectRows) {
          multiply_chunk<true>(team, m0, min(tuning::kDirectRows, M_ - m0));
        }
        return;
      }
    }
    const int64_t chunk = max<int64_t>(ceil_div(tuning::kPanelABytes, K_ * int64_t{sizeof(float)} * kMR), 8) * kMR;
    // Where A is tall and B small, or in the caches and packed no more often, every thread takes rows of its own.
    const int64_t most = tuning::kRowBlockBytes / (row_depth() * int64_t{sizeof(float)});
    const int64_t blocks = ceil_div(ceil_div(M_, most), team.threads) * team.threads;
    const int64_t bytes_B = N_ * K_ * int64_t{sizeof(float)};
    const bool as_often = blocks <= ceil_div(M_, chunk) && bytes_B <= tuning::kCachedBytes;
    if ((bytes_B <= tuning::kMostRepackedBytes || as_often) && M_ / blocks >= tuning::kLeastRowBlock) {
      const int64_t rows = ceil_div(ceil_div(M_, blocks), kMR) * kMR;
      team.for_each(ceil_div(M_, rows), [&](int64_t i) { multiply_rows(i * rows, min(rows, M_ - i * rows)); });
      return;
    }
    for (int64_t m0 = 0; m0 < M_; m0 += chunk) multiply_chunk<false>(team, m0, min(chunk, M_ - m0));
  }

 private:
  using Unit = Partition::Unit;

  // The sums of a unit between two blocks of K, if they do not stand in C.
  struct Sums {
    float* corner;
    int64_t ld;
  };

  int64_t row_depth() const { return PackedA::depth_of_block(K_, tuning::kRowBlockDepth); }

  // Whether C is more than a cache holds until it is read, and written in one go, in whole lines.
  bool streams_tiles() const {
    return kStreamsTiles<T> && mask_ && M_ * N_ * int64_t{sizeof(T)} >= tuning::kStreamedBytes &&
           K_ >= (kIsFloat<T> ? 0 : tuning::kStreamedDepth16) && K_ <= tuning::kRowBlockDepth &&
           N_ * int64_t{sizeof(T)} % 64 == 0 && reinterpret_cast<uintptr_t>(C_) % 64 == 0;
  }

  static Block first_block(const Unit& unit, const PackedA& layout) {
    return {unit.column, unit.columns, 0, layout.depth(0)};
  }

  // A block of K of a unit of C. B is packed, and packer takes `steps` steps meanwhile. A is that of the block, or room
  // for a panel, if rows are taken as they lie.
  template <bool kDirect>
  void multiply_block(const PackedA& layout, int64_t m0, const Unit& unit, const Block& block, float* A, const float* B,
                      Sums sums, Packer& packer, int64_t steps) const {
    const auto run = microkernel_for<T, Packer>(unit.columns);
    const bool last = block.k0 + block.depth == K_;
    const bool has_sums = kIsFloat<T> && layout.block < K_;
    const bool streams = streams_tiles();
    const bool fetches = !streams && (has_sums || M_ * N_ * int64_t{sizeof(T)} >= tuning::kFetchedBytes);
    const int64_t calls = unit.last - unit.first;
    for (int64_t call = 0; call < calls; ++call) {
      const int64_t panel = unit.first + call, m = m0 + panel * layout.height;
      Tile<T> tile = {};
      tile.C = C_ + m * N_ + unit.column;
      tile.ldc = N_;
      tile.columns = unit.columns;
      tile.first = block.k0 == 0;
      tile.last = last;
      tile.fetches = fetches;
      tile.streams = streams;
      tile.ahead = layout.panels >= tuning::kLeastFetchedPanels ? tuning::kPanelAhead : 0;
      tile.bias = bias_ ? bias_ + unit.column : nullptr;
      tile.column = unit.column;
      if constexpr (kIsFloat<T>) {
        tile.sums = tile.C;
        tile.ld_sums = N_;
      } else if (sums.corner) {
        tile.sums = sums.corner + call * layout.height * sums.ld;
        tile.ld_sums = sums.ld;
      }
      if (mask_ && last) {
        tile.bits = mask_->row(m);
        tile.bits_stride = mask_->stride;
      }
      const int64_t rows = min(layout.height, m0 + layout.rows - m);
      const int64_t steps_now = steps * (call + 1) / calls - steps * call / calls;
      if constexpr (kDirect) {
        if (rows == kMR) {
          direct_microkernel_for<T, Packer>(unit.columns)(block.depth, A_.direct(m, block.k0), B, tile, packer,
                                                          steps_now);
          continue;
        }
        A_.pack(layout, m0, panel, block.k0, A);
      }
      run(rows, block.depth, kDirect ? A : A + panel * layout.pitch(block.k0), B, tile, packer, steps_now);
    }
  }

  // Two blocks of B: one is multiplied while the other is packed.
  struct Buffers {
    float* of[2];
    int turn = 0;

    explicit Buffers(const PackedA& layout) {
      of[0] = static_cast<float*>(scratch(Slot::kPanelB, 2 * layout.block * kNR * sizeof(float)));
      of[1] = of[0] + layout.block * kNR;
    }
    float* now() const { return of[turn]; }
    float* next() const { return of[turn ^ 1]; }
    Packer first(const Packer& operand, const Block& block) const {
      Packer packer = operand;
      packer.start(block, now());
      packer.all();
      return packer;
    }
  };

  // A is packed by the team, or taken as it lies; a thread takes a panel of B through all of K, then another.
  template <bool kDirect>
  void multiply_chunk(const Team& team, int64_t m0, int64_t rows) const {
    PackedA layout(rows, K_, tuning::kKC);
    float* A = nullptr;
    if constexpr (kDirect) {
      layout.height = kMR;  // but for the last panel
    } else {
      A = static_cast<float*>(scratch(Slot::kPanelA, layout.size() * sizeof(float)));
      const int64_t groups = ceil_div(layout.panels, OperandA::kPanels);
      team.for_each(groups * layout.blocks(), [&](int64_t task) {
        const int64_t k0 = task / groups * layout.block, panel = task % groups * OperandA::kPanels;
        A_.pack(layout, m0, panel, k0, A + layout.offset(panel, k0));
      });
    }

    const bool by_rows = kDirect && rows >= team.threads * tuning::kMinRowsPerTask;
    const Partition partition(N_, layout, team.threads, by_rows);
    const int64_t workers = min<int64_t>(team.threads, partition.units());
    TaskQueue queue(partition.units(), workers);
    team.for_each(workers, [&](int64_t number) {
      TaskQueue::Worker worker(queue, number);
      int64_t index = worker.take();
      if (index < 0) return;
      Unit unit = partition[index];
      Buffers buffers(layout);
      float* const room =
          static_cast<float*>(kDirect ? scratch(Slot::kPanelA, layout.pitch(0) * sizeof(float)) : nullptr);
      Block now = first_block(unit, layout);
      Packer packer = buffers.first(B_, now);
      const bool at_once = !Packer::kOnTheSide || (layout.panels <= Packer::kFewPanels &&
                                                   N_ * K_ * int64_t{sizeof(float)} <= tuning::kMostAtOnceBytes);
      Sums sums = {nullptr, kNR};
      if (!kIsFloat<T> && layout.block < K_) {
        const int64_t most_rows = ceil_div(layout.panels, partition.splits()) * layout.height;
        sums.corner = static_cast<float*>(scratch(Slot::kAccumulator, most_rows * kNR * sizeof(float)));
      }
      for (; now.depth > 0; buffers.turn ^= 1) {
        const int64_t k1 = now.k0 + now.depth;
        Block next = {now.column, now.columns, k1, min(layout.block, K_ - k1)};
        Unit unit_after = unit;
        if (k1 == K_ && (index = worker.take()) >= 0) {
          unit_after = partition[index];
          next = first_block(unit_after, layout);
        }
        packer.start(next, buffers.next());
        multiply_block<kDirect>(layout, m0, unit, now, kDirect ? room : A + layout.offset(0, now.k0), buffers.now(),
                                sums, packer, at_once ? 0 : packer.steps());
        if (at_once && next.depth > 0) packer.all();
        unit = unit_after;
        now = next;
      }
      if (streams_tiles()) end_streams();
    });
  }

  // One thread packs a block of K of rows of A at a time, which stays in its L2, and takes all panels of B through it.
  void multiply_rows(int64_t m0, int64_t rows) const {
    const PackedA layout(rows, K_, row_depth());
    float* const A = static_cast<float*>(scratch(Slot::kPanelA, layout.panels * layout.pitch(0) * sizeof(float)));
    const Partition partition(N_, layout, 1);
    Buffers buffers(layout);
    Block now = first_block(partition[0], layout);
    Packer packer = buffers.first(B_, now);
    const int64_t ld_sums = partition.units() * kNR;
    float* sums = nullptr;
    if (!kIsFloat<T> && layout.block < K_) {
      sums = static_cast<float*>(scratch(Slot::kAccumulator, layout.panels * layout.height * ld_sums * sizeof(float)));
    }
    for (int64_t k0 = 0; k0 < K_; k0 += layout.block) {
      for (int64_t panel = 0; panel < layout.panels; panel += OperandA::kPanels) {
        A_.pack(layout, m0, panel, k0, A + panel * layout.pitch(k0));
      }
      for (int64_t i = 0; i < partition.units(); ++i, buffers.turn ^= 1) {
        const bool last = i + 1 == partition.units();
        const Unit unit = partition[i], after = partition[last ? 0 : i + 1];
        const int64_t k1 = last ? k0 + now.depth : k0;
        const Block next = {after.column, after.columns, k1, max<int64_t>(min(layout.block, K_ - k1), 0)};
        packer.start(next, buffers.next());
        multiply_block<false>(layout, m0, unit, now, A, buffers.now(), {sums ? sums + i * kNR : nullptr, ld_sums},
                              packer, Packer::kOnTheSide ? packer.steps() : 0);
        if (!Packer::kOnTheSide && next.depth > 0) packer.all();
        now = next;
      }
    }
    if (streams_tiles()) end_streams();
  }

  int64_t M_, N_, K_;
  OperandA A_;
  Packer B_;
  const T* bias_;
  const Bits* mask_;
  T* C_;
};

// The three operations in one element type. The pointers of api.h, typed.
template <typename T>
struct Linear {
  static const T* in(const void* p) { return static_cast<const T*>(p); }
  static T* out(void* p) { return static_cast<T*>(p); }

  static void forward(const Team& team, int64_t M, int64_t N, int64_t K, const void* input, const void* weight,
                      Bits bits, const void* bias, void* output) {
    const RowsOfA<T> A = {in(input), K};
    Gemm(M, N, K, A, MaskedRows<T>(in(weight), K, bits), in(bias), nullptr, out(output)).run(team);
  }
  static void grad_input(const Team& team, int64_t M, int64_t N, int64_t K, const void* grad_output, const void* weight,
                         Bits bits, void* grad_input) {
    const RowsOfA<T> A = {in(grad_output), N};
    Gemm(M, K, N, A, Columns<T, true>(in(weight), N, K, bits), in(nullptr), nullptr, out(grad_input)).run(team);
  }
  static void grad_weight(const Team& team, int64_t M, int64_t N, int64_t K, const void* grad_output, const void* input,
                          Bits bits, void* grad_weight) {
    const ColumnsOfA<T> A = {in(grad_output), M, N};
    const Columns<T, false> B(in(input), M, K, {nullptr, 0});
    Gemm(N, K, M, A, B, in(nullptr), &bits, out(grad_weight)).run(team);
  }
};

}  // namespace

void linear(const Team& team, Dtype dtype, int64_t M, int64_t N, int64_t K, const void* input, const void* weight,
            Bits bits, const void* bias, void* output) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t most = kIsFloat<T> ? tuning::kSmallRowsFloat : tuning::kSmallRows;
    const int64_t least = kIsFloat<T> ? tuning::kShortRowsInputFloat : tuning::kShortRowsInput;
    const int64_t shortest = kIsFloat<T>    ? tuning::kShortRowsFloat
                             : kConverts<T> ? tuning::kShortRowsConverted
                                            : tuning::kShortRows16;
    const bool short_rows = M >= least && K <= shortest * M;
    if (M <= most && !short_rows) {
      return linear_small(team, dtype, M, N, K, input, weight, bits, bias, output);
    }
    Linear<T>::forward(team, M, N, K, input, weight, bits, bias, output);
  });
}

void linear_grad_input(const Team& team, Dtype dtype, int64_t M, int64_t N, int64_t K, const void* grad_output,
                       const void* weight, Bits bits, void* grad_input) {
  if (takes_grad_input_small(team, dtype, M, N, K)) {
    return linear_grad_input_small(team, dtype, M, N, K, grad_output, weight, bits, grad_input);
  }
  with_element(dtype, [&](auto element) {
    Linear<decltype(element)>::grad_input(team, M, N, K, grad_output, weight, bits, grad_input);
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
