// Elements of any size that a word of 64 bits picks: masked, compressed, expanded.
#pragma once

#include "basics.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__AVX2__)
#include "shuffles_avx2.h"
#endif

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

template <typename Element>
struct PowersOfTwo {
  Element at[8 * sizeof(Element)];
  constexpr PowersOfTwo() : at{} {
    for (unsigned i = 0; i < 8 * sizeof(Element); ++i) at[i] = Element(Element(1) << i);
  }
};

// out[i] = bit i ? in[i] : 0 for i < 64. Element is an unsigned integer type.
template <typename Element>
MASKED_OPS_INLINE void select64(uint64_t bits, const Element* in, Element* out) {
#if defined(__AVX512F__)
  constexpr int kLanes = 64 / sizeof(Element);
  MASKED_OPS_UNROLL
  for (int i = 0; i < 64; i += kLanes) {
    __m512i v;
    if constexpr (sizeof(Element) == 1) v = _mm512_maskz_loadu_epi8(bits >> i, in + i);
    if constexpr (sizeof(Element) == 2) v = _mm512_maskz_loadu_epi16(__mmask32(bits >> i), in + i);
    if constexpr (sizeof(Element) == 4) v = _mm512_maskz_loadu_epi32(__mmask16(bits >> i), in + i);
    if constexpr (sizeof(Element) == 8) v = _mm512_maskz_loadu_epi64(__mmask8(bits >> i), in + i);
    _mm512_storeu_si512(out + i, v);
  }
#else
  // As many bits at a time as an element has: each is compared in a lane of its own.
  constexpr int kBits = 8 * sizeof(Element);
  constexpr PowersOfTwo<Element> one;
  for (int first = 0; first < 64; first += kBits) {
    const Element some = Element(bits >> first);
    for (int i = 0; i < kBits; ++i) {
      out[first + i] = in[first + i] & ((some & one.at[i]) == one.at[i] ? Element(~Element(0)) : Element(0));
    }
  }
#endif
}

// The elements of in[0..64) that have a bit, moved together; returns the end of what they fill. Elements without a bit
// are not read. Unless kExact, up to 64 elements from out on may be overwritten. Element is an unsigned integer type,
// or float.
template <bool kExact, typename Element>
MASKED_OPS_INLINE Element* compress64(uint64_t bits, const Element* in, Element* out) {
#if defined(__AVX512VBMI2__)
  if constexpr (sizeof(Element) == 2) {
    MASKED_OPS_UNROLL
    for (int i = 0; i < 64; i += 32) {
      const uint32_t m = uint32_t(bits >> i);
      const int n = __builtin_popcount(m);
      const __m512i v = _mm512_maskz_compress_epi16(m, _mm512_maskz_loadu_epi16(m, in + i));
      _mm512_mask_storeu_epi16(out, kExact ? _bzhi_u32(~0u, uint32_t(n)) : ~0u, v);
      out += n;
    }
    return out;
  }
#endif
#if defined(__AVX512F__)
  constexpr int kLanes = sizeof(Element) == 8 ? 8 : 16;
  MASKED_OPS_UNROLL
  for (int i = 0; i < 64; i += kLanes) {
    const uint32_t m = uint32_t(bits >> i) & ((1u << kLanes) - 1);
    const int n = __builtin_popcount(m);
    const uint32_t stored = kExact ? (1u << n) - 1 : ~0u;
    if constexpr (sizeof(Element) == 2) {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16(m), in + i));
      const __m512i v = _mm512_maskz_compress_epi32(__mmask16(m), wide);
      _mm256_mask_storeu_epi16(out, __mmask16(stored), _mm512_cvtepi32_epi16(v));
    }
    if constexpr (sizeof(Element) == 4) {
      const __m512i v = _mm512_maskz_loadu_epi32(__mmask16(m), in + i);
      _mm512_mask_storeu_epi32(out, __mmask16(stored), _mm512_maskz_compress_epi32(__mmask16(m), v));
    }
    if constexpr (sizeof(Element) == 8) {
      const __m512i v = _mm512_maskz_loadu_epi64(__mmask8(m), in + i);
      _mm512_mask_storeu_epi64(out, __mmask8(stored), _mm512_maskz_compress_epi64(__mmask8(m), v));
    }
    out += n;
  }
  return out;
#else
#if defined(__AVX2__)
  if constexpr (!kExact && sizeof(Element) < 8) return compress_by_eight(bits, in, out);
#endif
  for (; bits; bits &= bits - 1) *out++ = in[__builtin_ctzll(bits)];
  return out;
#endif
}

// The inverse: out[i] = bit i ? the next of in : 0 for i < 64; returns the end of what was taken. Unless kExact, up to
// 64 elements from in on may be read.
template <bool kExact, typename Element>
MASKED_OPS_INLINE const Element* expand64(uint64_t bits, const Element* in, Element* out) {
#if defined(__AVX512VBMI2__)
  if constexpr (sizeof(Element) == 2) {
    MASKED_OPS_UNROLL
    for (int i = 0; i < 64; i += 32) {
      const uint32_t m = uint32_t(bits >> i);
      const int n = __builtin_popcount(m);
      const __m512i v = _mm512_maskz_loadu_epi16(kExact ? _bzhi_u32(~0u, uint32_t(n)) : ~0u, in);
      _mm512_storeu_si512(out + i, _mm512_maskz_expand_epi16(m, v));
      in += n;
    }
    return in;
  }
#endif
#if defined(__AVX512F__)
  constexpr int kLanes = sizeof(Element) == 8 ? 8 : 16;
  MASKED_OPS_UNROLL
  for (int i = 0; i < 64; i += kLanes) {
    const uint32_t m = uint32_t(bits >> i) & ((1u << kLanes) - 1);
    const int n = __builtin_popcount(m);
    const uint32_t loaded = kExact ? (1u << n) - 1 : ~0u;
    if constexpr (sizeof(Element) == 2) {
      const __m512i packed = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16(loaded), in));
      const __m512i v = _mm512_maskz_expand_epi32(__mmask16(m), packed);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtepi32_epi16(v));
    }
    if constexpr (sizeof(Element) == 4) {
      const __m512i v = _mm512_maskz_loadu_epi32(__mmask16(loaded), in);
      _mm512_storeu_si512(out + i, _mm512_maskz_expand_epi32(__mmask16(m), v));
    }
    if constexpr (sizeof(Element) == 8) {
      const __m512i v = _mm512_maskz_loadu_epi64(__mmask8(loaded), in);
      _mm512_storeu_si512(out + i, _mm512_maskz_expand_epi64(__mmask8(m), v));
    }
    in += n;
  }
  return in;
#else
#if defined(__AVX2__)
  if constexpr (!kExact && sizeof(Element) < 8) return expand_by_eight(bits, in, out);
#endif
  for (int i = 0; i < 64; ++i) out[i] = 0;
  for (; bits; bits &= bits - 1) out[__builtin_ctzll(bits)] = *in++;
  return in;
#endif
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
