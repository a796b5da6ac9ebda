// Elements in memory that are not floats: how vectors of floats are loaded from them and rounded to them (to nearest,
// ties to even), and what the microkernel multiplies. Beside simd.h and lanes.h the only file with intrinsics.
#pragma once

#include "api.h"
#include "simd.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls body with an element of the dtype: float, BFloat16 or Float16.
template <typename Body>
MASKED_OPS_INLINE void with_element(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return body(BFloat16());
    case Dtype::kHalf:
      return body(Float16());
    default:
      return body(float());
  }
}

template <typename T>
constexpr bool kIsFloat = false;
template <>
inline constexpr bool kIsFloat<float> = true;

MASKED_OPS_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
MASKED_OPS_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

MASKED_OPS_INLINE float to_float(float x) { return x; }
MASKED_OPS_INLINE float to_float(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }
#if defined(__F16C__)
MASKED_OPS_INLINE float to_float(Float16 x) { return _cvtsh_ss(x.bits); }
#else
MASKED_OPS_INLINE float to_float(Float16 x) {
  const uint32_t sign = uint32_t{x.bits} >> 15 << 31, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | rest << 13);
  // Shifted into place, the exponent is too small by 112; the product is right for subnormals, too.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}
#endif

// --- a vector of floats ----------------------------------------------------------------------------------------------

#if defined(__AVX512F__)

MASKED_OPS_INLINE Vec floats_of(__m256i x, BFloat16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
MASKED_OPS_INLINE Vec floats_of(__m256i x, Float16) { return {_mm512_cvtph_ps(x)}; }

MASKED_OPS_INLINE __m256i rounded(Vec x, Float16) { return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }
MASKED_OPS_INLINE __m256i rounded(Vec x, BFloat16) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(x.v);
#else
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(sum, nan, quiet), 16));
#endif
}

template <typename T>
MASKED_OPS_INLINE Vec load_floats(const T* p) {
  return floats_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T());
}
template <typename Mask, typename T>
MASKED_OPS_INLINE Vec load_floats(Mask m, int64_t, const T* p) {
  return floats_of(_mm256_maskz_loadu_epi16(m, p), T());
}
template <typename T>
MASKED_OPS_INLINE void store_floats(Vec x, T* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(x, T()));
}
template <typename T>
MASKED_OPS_INLINE void store_floats(Vec x, int64_t n, T* p) {
  _mm256_mask_storeu_epi16(p, Vec::first(n), rounded(x, T()));
}

#else

#if defined(__AVX2__)

MASKED_OPS_INLINE Vec floats_of(const BFloat16* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
MASKED_OPS_INLINE Vec floats_of(const Float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

MASKED_OPS_INLINE void round_to(Vec x, BFloat16* p) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q);
  const __m256 result = _mm256_blendv_ps(_mm256_castsi256_ps(sum), _mm256_castsi256_ps(quiet), nan);
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(result), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
MASKED_OPS_INLINE void round_to(Vec x, Float16* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

#else

MASKED_OPS_INLINE uint16_t rounded(float x, BFloat16) {
  const uint32_t bits = bits_of(x);
  return uint16_t((x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
MASKED_OPS_INLINE uint16_t rounded(float x, Float16) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more
  // The last bit of a float from 0.5 to 1 is that of a subnormal half.
  if (rest < 0x38800000) return uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)));
  return uint16_t(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}

template <typename T>
MASKED_OPS_INLINE Vec floats_of(const T* p) {
  return {Vec::Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
template <typename T>
MASKED_OPS_INLINE void round_to(Vec x, T* p) {
  for (int i = 0; i < 4; ++i) p[i].bits = rounded(x.v[i], T());
}

#endif

template <typename T>
MASKED_OPS_INLINE Vec load_floats(const T* p) {
  return floats_of(p);
}
template <typename Mask, typename T>
MASKED_OPS_INLINE Vec load_floats(Mask m, int64_t valid, const T* p) {
  if (valid >= Vec::kLanes) return floats_of(p).select(m);
  T some[Vec::kLanes] = {};
  for (int64_t i = 0; i < valid; ++i) some[i] = p[i];
  return floats_of(some).select(m);
}
template <typename T>
MASKED_OPS_INLINE void store_floats(Vec x, T* p) {
  round_to(x, p);
}
template <typename T>
MASKED_OPS_INLINE void store_floats(Vec x, int64_t n, T* p) {
  if (n >= Vec::kLanes) return round_to(x, p);
  T some[Vec::kLanes];
  round_to(x, some);
  for (int64_t i = 0; i < n; ++i) p[i] = some[i];
}

#endif

// load_floats(m, valid, p): lanes without a bit are zero; memory from p + valid on is not touched, and the bits of
// those lanes are zero. store_floats(x, n, p) writes the first n lanes.
MASKED_OPS_INLINE Vec load_floats(const float* p) { return Vec::loadu(p); }
template <typename Mask>
MASKED_OPS_INLINE Vec load_floats(Mask m, int64_t valid, const float* p) {
  // Where a load has no predicate, each lane would be a branch.
  return Vec::kLanes > 4 || valid < Vec::kLanes ? Vec::loadu(m, p) : Vec::loadu(p).select(m);
}
MASKED_OPS_INLINE void store_floats(Vec x, float* p) { x.storeu(p); }
MASKED_OPS_INLINE void store_floats(Vec x, int64_t n, float* p) {
  if (kSlowPartStores && n >= Vec::kLanes) return x.storeu(p);
  x.storeu(Vec::first(n), p);
}
template <typename T>
MASKED_OPS_INLINE void store_float(float x, T* p) {
  store_floats(Vec::set1(x), 1, p);
}
MASKED_OPS_INLINE void store_float(float x, float* p) { *p = x; }
template <typename T>
MASKED_OPS_INLINE Vec load_first(int64_t n, const T* p) {
  return load_floats(Vec::first(n), n, p);
}

// to[0..n) = from[0..n), rounded.
template <typename T>
void round_floats(const float* from, int64_t n, T* to) {
  constexpr int L = Vec::kLanes;
  for (int64_t i = 0; i < n; i += L) store_floats(load_first(n - i, from + i), n - i, to + i);
}

// The elements as floats: themselves, or a copy in scratch memory of this thread.
MASKED_OPS_INLINE const float* as_floats(const Team&, Slot, const float* elements, int64_t) { return elements; }
template <typename T>
const float* as_floats(const Team& team, Slot slot, const T* elements, int64_t n) {
  constexpr int64_t L = Vec::kLanes, kGrain = int64_t{1} << 14;
  float* const floats = static_cast<float*>(scratch(slot, size_t(n + L) * sizeof(float)));
  team.for_each(ceil_div(n, kGrain), [=](int64_t task) {
    const int64_t last = min(n, (task + 1) * kGrain);
    for (int64_t i = task * kGrain; i < last; i += L) load_first(last - i, elements + i).store(floats + i);
  });
  return floats;
}

// --- what the microkernel multiplies ---------------------------------------------------------------------------------

// An operand is 32 bits of a packed panel: a float, whatever the element was in memory; or with AVX512_BF16 the
// bfloat16 of two neighbouring depths, whose products are added in one instruction.
template <typename T>
struct Operand {
  static constexpr int kDepth = 1;  // elements in an operand

  // Operands of neighbouring depths; memory from p + valid on is not touched. The bits are those of a row, from column
  // k on, a multiple of kLanes * kDepth, or those of vector j of a word.
  using Word = Vec::Word;
  static MASKED_OPS_INLINE Word word(const uint64_t* bits, int64_t k) { return Vec::word(bits, k); }
  static MASKED_OPS_INLINE Vec along(Word word, int j, int64_t valid, const T* p) {
    return load_floats(Vec::signs(word, j), valid, p);
  }
  static MASKED_OPS_INLINE Vec along(const uint64_t* bits, int64_t k, int64_t valid, const T* p) {
    if constexpr (kIsFloat<T>) return load_floats(Vec::signs(bits, k), valid, p);
    return load_floats(Vec::predicate(bits, k), valid, p);
  }
  static MASKED_OPS_INLINE Vec along(int64_t valid, const T* p) { return load_first(valid, p); }
  static MASKED_OPS_INLINE Vec along(const T* p) { return load_floats(p); }
  // One operand in all lanes.
  static MASKED_OPS_INLINE Vec broadcast(int64_t, const T* p) { return Vec::set1(to_float(*p)); }

  // The operands of a row of which memory holds only what has a bit, from p on: p moves on to what comes next, and a
  // whole vector is read. expand_across is the same for operands of one depth, with a row for each depth.
  static constexpr bool kExpands = Vec::kExpands;
#if defined(__AVX2__)
  static constexpr int kRead = Vec::kLanes;  // elements
  static MASKED_OPS_INLINE Vec expand(const uint64_t* bits, int64_t k, const T*& p) {
    const uint32_t m = Vec::bits_of_lanes(bits, k);
    const Vec v = load_floats(p).expand(m);
    p += __builtin_popcount(m);
    return v;
  }
  static MASKED_OPS_INLINE void expand_across(Bits bits, bool, int64_t k, const T* (&p)[kDepth], Vec (&to)[kDepth]) {
    to[0] = expand(bits.row(0), k, p[0]);
  }
#endif

  // Operands of one depth for neighbouring columns; across_two, where there is such, gives two vectors for less.
  static constexpr bool kHasAcrossTwo = false;
  template <typename Mask>
  static MASKED_OPS_INLINE Vec across(const Mask (&m)[kDepth], int64_t valid, const T* p, int64_t) {
    return load_floats(m[0], valid, p);
  }

  static MASKED_OPS_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fmadd(a, b, c); }
};

#if defined(__AVX512BF16__)
template <>
struct Operand<BFloat16> {
  static constexpr int kDepth = 2;
  static constexpr bool kHasAcrossTwo = true;

  using Word = __mmask32;
  static MASKED_OPS_INLINE Word word(const uint64_t* bits, int64_t k) {
    return reinterpret_cast<const Word32*>(bits)[k >> 5];
  }
  static MASKED_OPS_INLINE Vec along(Word word, int, int64_t, const BFloat16* p) {
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(word, p))};
  }
  static MASKED_OPS_INLINE Vec along(const uint64_t* bits, int64_t k, int64_t valid, const BFloat16* p) {
    return along(word(bits, k), 0, valid, p);
  }
  static MASKED_OPS_INLINE Vec along(int64_t valid, const BFloat16* p) {
    const __mmask32 m = valid >= 32 ? ~0u : (1u << (valid > 0 ? valid : 0)) - 1;
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(m, p))};
  }
  static MASKED_OPS_INLINE Vec along(const BFloat16* p) { return {_mm512_loadu_ps(p)}; }
  static MASKED_OPS_INLINE Vec broadcast(int64_t valid, const BFloat16* p) {
    const uint32_t odd = valid > 1 ? p[1].bits : 0;
    return {_mm512_castsi512_ps(_mm512_set1_epi32(int(odd << 16 | p[0].bits)))};
  }
  static MASKED_OPS_INLINE Vec across(const Vec::Predicate (&m)[kDepth], int64_t, const BFloat16* p, int64_t ld) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m[0], p));
    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m[1], p + ld));
    return {_mm512_castsi512_ps(_mm512_or_si512(even, _mm512_slli_epi32(odd, 16)))};
  }
  // The predicate of 32 elements: bits of a row from column k on, a multiple of 16; or the first n.
  static MASKED_OPS_INLINE uint32_t predicate_of_two(const uint64_t* row, int64_t k) {
    uint32_t bits;
    std::memcpy(&bits, reinterpret_cast<const char*>(row) + (k >> 3), sizeof(bits));
    return bits;
  }
  static MASKED_OPS_INLINE uint32_t first_of_two(int64_t n) { return n >= 32 ? ~0u : (1u << (n > 0 ? n : 0)) - 1; }
  static MASKED_OPS_INLINE void across_two(const uint32_t (&m)[kDepth], const BFloat16* p, int64_t ld, Vec (&to)[2]) {
    interleave(_mm512_maskz_loadu_epi16(m[0], p), _mm512_maskz_loadu_epi16(m[1], p + ld), to);
  }
  static MASKED_OPS_INLINE void interleave(__m512i even, __m512i odd, Vec (&to)[2]) {
    alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    to[0] = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(even, low, odd))};
    to[1] = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(even, high, odd))};
  }
#if defined(__AVX512VBMI2__)
  static constexpr bool kExpands = true;
  static constexpr int kRead = 32;
  static MASKED_OPS_INLINE __m512i expand_two(uint32_t m, const BFloat16*& p) {
    const __m512i v = _mm512_maskz_expand_epi16(m, _mm512_loadu_si512(p));
    p += __builtin_popcount(m);
    return v;
  }
  static MASKED_OPS_INLINE Vec expand(const uint64_t* bits, int64_t k, const BFloat16*& p) {
    return {_mm512_castsi512_ps(expand_two(word(bits, k), p))};
  }
  // 32 columns; of a last row that has no other beside it, `paired` is false.
  static MASKED_OPS_INLINE void expand_across(Bits bits, bool paired, int64_t k, const BFloat16* (&p)[2],
                                              Vec (&to)[2]) {
    const __m512i even = expand_two(word(bits.row(0), k), p[0]);
    const __m512i odd = expand_two(paired ? word(bits.row(1), k) : 0, p[1]);
    interleave(even, odd, to);
  }
#else
  static constexpr bool kExpands = false;
#endif
  static MASKED_OPS_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
  }
};
#endif

// Stores two vectors, masked by 32 bits, where there is an instruction that rounds both.
template <typename T>
constexpr bool kStoresTwo = Operand<T>::kHasAcrossTwo;
#if defined(__AVX512BF16__)
template <bool kStreamed = false>
MASKED_OPS_INLINE void store_two(uint32_t m, const Vec (&x)[2], BFloat16* p) {
  const __m512i two = _mm512_maskz_mov_epi16(m, (__m512i)_mm512_cvtne2ps_pbh(x[1].v, x[0].v));
  if constexpr (kStreamed) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), two);
  } else {
    _mm512_storeu_si512(p, two);
  }
}
#endif

// Whether the lanes of two vectors that have a bit are rounded and moved together at once.
template <typename T>
constexpr bool kCompressesTwo = false;
#if defined(__AVX512VBMI2__)
template <>
inline constexpr bool kCompressesTwo<Float16> = true;
MASKED_OPS_INLINE __m512i rounded_two(Vec low, Vec high, Float16) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(rounded(low, Float16())), rounded(high, Float16()), 1);
}
#if defined(__AVX512BF16__)
template <>
inline constexpr bool kCompressesTwo<BFloat16> = true;
MASKED_OPS_INLINE __m512i rounded_two(Vec low, Vec high, BFloat16) {
  return (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
}
#endif
// 32 elements are written, of which those behind the bits' are of no account.
template <typename T>
MASKED_OPS_INLINE void store_compressed_two(uint32_t bits, Vec low, Vec high, T* p) {
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi16(bits, rounded_two(low, high, T())));
}
#endif

// Whether rounding takes many instructions, for want of one.
template <typename T>
constexpr bool kRoundsInSteps = false;
template <>
inline constexpr bool kRoundsInSteps<BFloat16> = !kStoresTwo<BFloat16>;

// Whether elements become floats each time that they are loaded.
template <typename T>
constexpr bool kConverts = !kIsFloat<T> && Operand<T>::kDepth == 1;

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
