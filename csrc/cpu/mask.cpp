// Passes over a mask or a weight: values to bits, and weight∘mask in one read and one write.
#include "kernels.h"
#include "simd_words.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

// A 16-bit float, told apart from zero and one by its bits; kOne is 1.0.
template <uint16_t kOne>
struct Half {
  uint16_t bits;
  bool zero() const { return (bits & 0x7fff) == 0; }
  bool one() const { return bits == kOne; }
};
template <typename T>
MASKED_OPS_INLINE bool is_zero(T x) {
  return x == T(0);
}
template <typename T>
MASKED_OPS_INLINE bool is_one(T x) {
  return x == T(1);
}
template <uint16_t kOne>
MASKED_OPS_INLINE bool is_zero(Half<kOne> x) {
  return x.zero();
}
template <uint16_t kOne>
MASKED_OPS_INLINE bool is_one(Half<kOne> x) {
  return x.one();
}

// Bits of n <= 64 values; sets soft if one is neither 0 nor 1. Two loops that vectorise, then eight bytes of 0 or 1 to
// eight bits by one multiplication (byte i moves to bit 56 + i).
template <typename T>
MASKED_OPS_INLINE uint64_t pack_word(const T* values, int n, bool& soft) {
  alignas(64) uint8_t set[64] = {};
  uint8_t other = 0;
  for (int i = 0; i < n; ++i) {
    set[i] = !is_zero(values[i]);
    other |= set[i] & !is_one(values[i]);
  }
  soft |= other;
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t bytes;
    std::memcpy(&bytes, set + 8 * i, 8);
    word |= (bytes * 0x0102040810204080ull) >> 56 << (8 * i);
  }
  return word;
}

template <typename T>
MaskFacts pack(const Team& team, const void* mask, int64_t rows, int64_t cols, uint64_t* words) {
  const int64_t stride = ceil_div(cols, 64), total = rows * stride;
  const int64_t grain = tuning::kPassGrain / 64;
  int64_t nnz = 0;
  bool soft = false;
  team.for_each(ceil_div(total, grain), [&](int64_t task) {
    int64_t task_nnz = 0;
    bool task_soft = false;
    for (int64_t w = task * grain; w < min(total, (task + 1) * grain); ++w) {
      const int64_t row = w / stride, col = w % stride * 64;
      const T* values = static_cast<const T*>(mask) + row * cols + col;
      words[w] = cols - col >= 64 ? pack_word(values, 64, task_soft) : pack_word(values, int(cols - col), task_soft);
      task_nnz += __builtin_popcountll(words[w]);
    }
    __atomic_fetch_add(&nnz, task_nnz, __ATOMIC_RELAXED);
    if (task_soft) __atomic_store_n(&soft, true, __ATOMIC_RELAXED);
  });
  return {nnz, !soft};
}

struct Element16 {
  uint64_t half[2];
};

template <typename Element>
void copy_words(const Element* weight, Bits bits, int64_t cols, int64_t first, int64_t last, Element* out) {
  for (int64_t w = first; w < last; ++w) {
    const int64_t row = w / bits.stride, col = w % bits.stride * 64;
    const uint64_t word = bits.row(row)[col / 64];
    const Element* in = weight + row * cols + col;
    Element* to = out + row * cols + col;
    if constexpr (sizeof(Element) <= 8) {
      if (cols - col >= 64) {
        select64(word, in, to);
        continue;
      }
    }
    for (int64_t i = 0; i < min<int64_t>(64, cols - col); ++i) to[i] = word >> i & 1 ? in[i] : Element{};
  }
}

template <typename Element>
void copy(const Team& team, const void* weight, Bits bits, int64_t rows, int64_t cols, void* out) {
  const int64_t total = rows * bits.stride, grain = tuning::kPassGrain / 64;
  team.for_each(ceil_div(total, grain), [&](int64_t task) {
    copy_words(static_cast<const Element*>(weight), bits, cols, task * grain, min(total, (task + 1) * grain),
               static_cast<Element*>(out));
  });
}

template <typename T>
void multiply(const Team& team, const void* weight, const void* mask, int64_t n, void* out) {
  const T* w = static_cast<const T*>(weight);
  const T* m = static_cast<const T*>(mask);
  T* to = static_cast<T*>(out);
  team.for_each(ceil_div(n, tuning::kPassGrain), [&](int64_t task) {
    const int64_t last = min(n, (task + 1) * tuning::kPassGrain);
    for (int64_t i = task * tuning::kPassGrain; i < last; ++i) {
      const T product = w[i] * m[i];
      to[i] = m[i] == T(0) ? T(0) : product;
    }
  });
}

}  // namespace

MaskFacts pack_mask(const Team& team, Dtype dtype, const void* mask, int64_t rows, int64_t cols, uint64_t* words) {
  switch (dtype) {
    case Dtype::kByte:
      return pack<uint8_t>(team, mask, rows, cols, words);
    case Dtype::kInt8:
      return pack<int8_t>(team, mask, rows, cols, words);
    case Dtype::kInt16:
      return pack<int16_t>(team, mask, rows, cols, words);
    case Dtype::kInt32:
      return pack<int32_t>(team, mask, rows, cols, words);
    case Dtype::kInt64:
      return pack<int64_t>(team, mask, rows, cols, words);
    case Dtype::kHalf:
      return pack<Half<0x3c00>>(team, mask, rows, cols, words);
    case Dtype::kBFloat16:
      return pack<Half<0x3f80>>(team, mask, rows, cols, words);
    case Dtype::kFloat:
      return pack<float>(team, mask, rows, cols, words);
    case Dtype::kDouble:
      return pack<double>(team, mask, rows, cols, words);
  }
  __builtin_unreachable();
}

void mask_copy(const Team& team, size_t element_size, const void* weight, Bits bits, int64_t rows, int64_t cols,
               void* out) {
  switch (element_size) {
    case 1:
      return copy<uint8_t>(team, weight, bits, rows, cols, out);
    case 2:
      return copy<uint16_t>(team, weight, bits, rows, cols, out);
    case 4:
      return copy<uint32_t>(team, weight, bits, rows, cols, out);
    case 8:
      return copy<uint64_t>(team, weight, bits, rows, cols, out);
    default:
      return copy<Element16>(team, weight, bits, rows, cols, out);
  }
}

void mask_multiply(const Team& team, Dtype dtype, const void* weight, const void* mask, int64_t n, void* out) {
  return dtype == Dtype::kFloat ? multiply<float>(team, weight, mask, n, out)
                                : multiply<double>(team, weight, mask, n, out);
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
