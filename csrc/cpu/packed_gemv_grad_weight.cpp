// grad_weight of a packed weight for a few rows of input: the gradients are compressed in registers, and no dense row
// is written. As in gemv_grad_weight.cpp, tiles of a few rows and vectors, or row by row.
//
// A vector is stored whole, over the values behind it, wherever these come later or are of no row.
#include "gemv.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;

template <typename T>
struct PackedOuter {
  int64_t steps;  // rows of both operands
  Operands dy;    // from the first row of the weight on
  Operands x;
  Bits bits;  // of the first row
  int64_t columns;
  const int64_t* offsets;  // of each row's first value, from the first row's on; and of what follows the last
  T* values;               // of all rows of the weight
};

// How the lanes that have a bit are stored: as a whole vector, over what lies behind; likewise, but what was there is
// put back; or exactly. A store of some lanes takes as long as ten others on some CPUs with AVX2.
enum class Behind { kOverwritten, kKept, kUntouched };

// Stores the lanes that have a bit, and moves on.
template <Behind kBehind, typename T>
MASKED_OPS_INLINE void store_compressed(Vec v, uint32_t bits, T*& out) {
  const int count = __builtin_popcount(bits);
  T kept[L];
  if (kBehind == Behind::kKept) std::memcpy(kept, out + count, sizeof(kept));
  kBehind == Behind::kUntouched ? store_floats(v.compress(bits), count, out) : store_floats(v.compress(bits), out);
  out += count;
  if (kBehind == Behind::kKept) std::memcpy(out, kept, sizeof(kept));
}

// Likewise two vectors, of columns from k on, where one instruction moves them (kCompressesTwo).
template <Behind kBehind, typename T>
MASKED_OPS_INLINE void store_two(const Vec (&two)[2], const uint64_t* row, int64_t k, T*& out) {
  const uint32_t bits = opaque(uint32_t{reinterpret_cast<const Word32*>(row)[k / 32]});
  const int count = __builtin_popcount(bits);
  T kept[2 * L];
  if (kBehind == Behind::kKept) std::memcpy(kept, out + count, sizeof(kept));
  store_compressed_two(bits, two[0], two[1], out);
  out += count;
  if (kBehind == Behind::kKept) std::memcpy(out, kept, sizeof(kept));
}

// Elements that are written at once.
template <typename T>
constexpr int kWritten = kCompressesTwo<T> ? 2 * L : L;

template <Behind kBehind>
using Constant = std::integral_constant<Behind, kBehind>;

// The values of some rows, one by one, for so few steps that all factors of a row stay in registers.
template <int kSteps, typename T>
__attribute__((noinline)) void by_row(const PackedOuter<T>& operands, int64_t rows) {
  const PackedOuter<T> o = operands;  // which no store can change
  T* out = o.values + o.offsets[0];
  T* const end = o.values + o.offsets[rows];
  for (int64_t r = 0; r < rows; ++r) {
    const uint64_t* word = o.bits.row(r);
    Vec dy[kSteps];
    const float* x[kSteps];  // a register each: an address that is a sum of two is a further instruction
    MASKED_OPS_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      dy[s] = Vec::set1(o.dy.at[s * o.dy.ld + r]);
      x[s] = opaque(o.x.at + s * o.x.ld);
    }
    for (int64_t left = o.columns; left > 0; left -= 64, ++word) {
      const auto sum_at = [&](int j, auto exact) __attribute__((always_inline)) {
        Vec sum = Vec::zero();
        MASKED_OPS_UNROLL
        for (int s = 0; s < kSteps; ++s) {
          const Vec v = exact ? load_first(left - j, x[s] + j) : Vec::loadu(x[s] + j);
          sum = Operand<T>::multiply_add(dy[s], v, sum);
        }
        return sum;
      };
      const auto step = [&](int j, auto exact) __attribute__((always_inline)) {
        constexpr Behind kBehind = exact ? Behind::kUntouched : Behind::kOverwritten;
        store_compressed<kBehind>(sum_at(j, exact), Vec::bits_of_lanes(word, j), out);
      };
      if (left >= 64 && end - out >= __builtin_popcountll(*word) + kWritten<T>) {
        if constexpr (kCompressesTwo<T>) {
          MASKED_OPS_UNROLL
          for (int j = 0; j < 64; j += 2 * L) {
            const Vec two[2] = {sum_at(j, std::false_type()), sum_at(j + L, std::false_type())};
            store_two<Behind::kOverwritten>(two, word, j, out);
          }
        } else {
          MASKED_OPS_UNROLL
          for (int j = 0; j < 64; j += L) step(j, std::false_type());
        }
      } else {
        for (int j = 0; j < min<int64_t>(left, 64); j += L) step(j, std::true_type());
      }
      MASKED_OPS_UNROLL
      for (int s = 0; s < kSteps; ++s) x[s] += 64;
    }
  }
}

// The values of R rows, of which each must leave the next one's alone; behind `last` there are no values of this
// thread.
template <int R, typename T>
__attribute__((noinline)) void by_tiles(const PackedOuter<T>& operands, const T* last) {
  constexpr int NV = tuning::kOuterVectors;
  const PackedOuter<T> o = operands;  // which no store can change
  T *out[R], *end[R];
  MASKED_OPS_UNROLL
  for (int r = 0; r < R; ++r) {
    out[r] = o.values + o.offsets[r];
    end[r] = o.values + o.offsets[r + 1];
  }
  for (int64_t k = 0; k < o.columns; k += NV * L) {
    Vec sum[R][NV];
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) {
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) sum[r][j] = Vec::zero();
    }
    const auto add_up = [&](auto full) __attribute__((always_inline)) {
      const float *from = o.x.at + k, *factors = o.dy.at;
      for (int64_t s = 0; s < o.steps; ++s, from += o.x.ld, factors += o.dy.ld) {
        Vec x[NV];
        MASKED_OPS_UNROLL
        for (int j = 0; j < NV; ++j) {
          x[j] = full ? Vec::loadu(from + j * L) : load_first(o.columns - k - j * L, from + j * L);
        }
        MASKED_OPS_UNROLL
        for (int r = 0; r < R; ++r) {
          const Vec dy = Vec::set1(factors[r]);
          MASKED_OPS_UNROLL
          for (int j = 0; j < NV; ++j) sum[r][j] = Operand<T>::multiply_add(dy, x[j], sum[r][j]);
        }
      }
    };
    o.columns - k >= NV* L ? add_up(std::true_type()) : add_up(std::false_type());
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) {
      if constexpr (kCompressesTwo<T>) {
        static_assert(NV % 2 == 0);
        const auto in_twos = [&](auto behind) __attribute__((always_inline)) {
          MASKED_OPS_UNROLL
          for (int j = 0; j < NV; j += 2) {
            store_two<decltype(behind)::value>({sum[r][j], sum[r][j + 1]}, o.bits.row(r), k + j * L, out[r]);
          }
        };
        if (end[r] - out[r] >= NV * L) {
          in_twos(Constant<Behind::kOverwritten>());
          continue;
        }
        if (last - out[r] >= (NV + 2) * L) {
          in_twos(Constant<Behind::kKept>());
          continue;
        }
      }
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) {
        const uint32_t bits = Vec::bits_of_lanes(o.bits.row(r), k + j * L);
        if (end[r] - out[r] >= L) {
          store_compressed<Behind::kOverwritten>(sum[r][j], bits, out[r]);
        } else if (last - out[r] >= 2 * L) {
          store_compressed<Behind::kKept>(sum[r][j], bits, out[r]);
        } else {
          store_compressed<Behind::kUntouched>(sum[r][j], bits, out[r]);
        }
      }
    }
  }
}

template <typename T>
bool goes_by_row(int64_t steps, int64_t columns) {
  const bool in_l1 = !kCompressesTwo<T> || steps * columns <= tuning::kCompressedByRowFloats;
  return steps <= tuning::kCompressedByRow && in_l1;
}

template <typename T>
bool in_registers(int64_t M, const PackedWeight& w) {
  const int64_t steps = ceil_div(M, Operand<T>::kDepth);
  if (!kCompressesTwo<T>) return steps <= (kIsFloat<T> ? tuning::kCompressedSteps : tuning::kCompressedSteps16);
  const bool long_rows = w.offsets[w.rows] >= tuning::kCompressedRowValues * w.rows;
  return goes_by_row<T>(steps, w.cols) || (steps <= tuning::kCompressedStepsTwo && long_rows);
}

template <typename T>
void grad_values(const Team& team, int64_t M, const PackedWeight& w, const T* grad_output, const T* input, T* values) {
  constexpr int kRows = tuning::kCompressedRows;
  const int64_t N = w.rows, K = w.cols, steps = ceil_div(M, Operand<T>::kDepth);
  const Operands dy = operands_of(Slot::kPanelA, grad_output, M, N), x = operands_of(Slot::kPanelB, input, M, K);
  const int64_t rows = max<int64_t>(ceil_div(tuning::kSmallGrain, K), kRows) / kRows * kRows;  // of a task
  team.for_each(ceil_div(N, rows), [&](int64_t task) {
    const int64_t first = task * rows, last = min(N, first + rows);
    const auto from = [&](int64_t n) {
      return PackedOuter<T>{steps, {dy.at + n, dy.ld}, x, {w.bits.row(n), w.bits.stride}, K, w.offsets + n, values};
    };
    if (goes_by_row<T>(steps, K)) {
      with_int<tuning::kCompressedByRow>(steps, [&](auto s) { by_row<decltype(s)::value>(from(first), last - first); });
      return;
    }
    for (int64_t n = first; n < last; n += kRows) {
      with_int<kRows>(min<int64_t>(kRows, last - n),
                      [&](auto height) { by_tiles<decltype(height)::value>(from(n), values + w.offsets[last]); });
    }
  });
}

}  // namespace

bool compresses_grad_values(Dtype dtype, int64_t M, const PackedWeight& weight) {
  bool compresses = false;
  with_element(dtype, [&](auto element) { compresses = in_registers<decltype(element)>(M, weight); });
  return compresses;
}

void packed_linear_grad_values_small(const Team& team, Dtype dtype, int64_t M, const PackedWeight& weight,
                                     const void* grad_output, const void* input, void* values) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    grad_values(team, M, weight, static_cast<const T*>(grad_output), static_cast<const T*>(input),
                static_cast<T*>(values));
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
