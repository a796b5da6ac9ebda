// AVX-512: vectors of sixteen floats.
#pragma once

#include "simd_x86.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

struct Vec {
  static constexpr int kLanes = 16;
  using Predicate = __mmask16;
  __m512 v;

  static MASKED_OPS_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static MASKED_OPS_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  // Four floats, repeated; element<E>() then broadcasts one of them. Four broadcasts for one load.
  static MASKED_OPS_INLINE Vec quad(const float* p) { return {_mm512_broadcast_f32x4(_mm_loadu_ps(p))}; }
  template <int E>
  MASKED_OPS_INLINE Vec element() const {
    return {_mm512_permute_ps(v, E * 0x55)};
  }
  // Four floats from each place, of which the first n are read.
  static MASKED_OPS_INLINE Vec quads(const float* const (&p)[4], int n) {
    const __mmask8 some = __mmask8((1u << n) - 1);
    __m512 v = _mm512_castps128_ps512(_mm_maskz_loadu_ps(some, p[0]));
    v = _mm512_insertf32x4(v, _mm_maskz_loadu_ps(some, p[1]), 1);
    v = _mm512_insertf32x4(v, _mm_maskz_loadu_ps(some, p[2]), 2);
    return {_mm512_insertf32x4(v, _mm_maskz_loadu_ps(some, p[3]), 3)};
  }
  static MASKED_OPS_INLINE Vec load(const float* p) { return {_mm512_load_ps(p)}; }
  static MASKED_OPS_INLINE Vec loadu(const float* p) { return {_mm512_loadu_ps(p)}; }
  // Lanes without a bit are zero and their memory is not touched.
  static MASKED_OPS_INLINE Vec loadu(Predicate m, const float* p) { return {_mm512_maskz_loadu_ps(m, p)}; }
  // Lane i is p[2 * i], where that element has a bit.
  static MASKED_OPS_INLINE Vec load_even(uint32_t elements, const float* p) {
    const __m512 low = _mm512_maskz_loadu_ps(__mmask16(elements), p);
    const __m512 high = _mm512_maskz_loadu_ps(__mmask16(elements >> 16), p + 16);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return {_mm512_permutex2var_ps(low, even, high)};
  }
  // Lane i is p[i * step].
  static MASKED_OPS_INLINE Vec gather(Predicate m, const float* p, int step) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_mask_i32gather_ps(_mm512_setzero_ps(), m, _mm512_mullo_epi32(lanes, _mm512_set1_epi32(step)), p, 4)};
  }
  // p[2 * i] = lane i, for the lanes of the predicate; what lies between is left alone.
  MASKED_OPS_INLINE void store_even(Predicate m, float* p) const {
    const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const uint32_t elements = _pdep_u32(m, 0x55555555);
    _mm512_mask_storeu_ps(p, __mmask16(elements), _mm512_permutexvar_ps(low, v));
    _mm512_mask_storeu_ps(p + 16, __mmask16(elements >> 16), _mm512_permutexvar_ps(high, v));
  }
  MASKED_OPS_INLINE void store(float* p) const { _mm512_store_ps(p, v); }
  MASKED_OPS_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }
  MASKED_OPS_INLINE void storeu(float* p) const { _mm512_storeu_ps(p, v); }
  MASKED_OPS_INLINE void storeu(Predicate m, float* p) const { _mm512_mask_storeu_ps(p, m, v); }
  MASKED_OPS_INLINE void store_halves(float* low, float* high) const {
    _mm256_store_ps(low, _mm512_castps512_ps256(v));
    _mm256_store_ps(high, _mm512_extractf32x8_ps(v, 1));
  }
  MASKED_OPS_INLINE Vec select(Predicate m) const { return {_mm512_maskz_mov_ps(m, v)}; }
  // The first lanes, moved to those that have a bit; the others are zero.
  static constexpr bool kExpands = true;
  MASKED_OPS_INLINE Vec expand(uint32_t bits) const { return {_mm512_maskz_expand_ps(Predicate(bits), v)}; }
  // The lanes that have a bit, moved together; those behind them are of no account.
  MASKED_OPS_INLINE Vec compress(uint32_t bits) const { return {_mm512_maskz_compress_ps(Predicate(bits), v)}; }
  MASKED_OPS_INLINE float sum() const { return _mm512_reduce_add_ps(v); }

  // p[columns[i]] for each lane.
  static MASKED_OPS_INLINE Vec gather(const float* p, const uint16_t* columns) {
    const __m256 low = _mm256_set_m128(gather_quad(p, columns + 4), gather_quad(p, columns));
    const __m256 high = _mm256_set_m128(gather_quad(p, columns + 12), gather_quad(p, columns + 8));
    return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
  }
  // p[columns[i]] = lane i; columns differ.
  MASKED_OPS_INLINE void scatter(float* p, const uint16_t* columns) const {
    scatter_quad(_mm512_castps512_ps128(v), p, columns);
    scatter_quad(_mm512_extractf32x4_ps(v, 1), p, columns + 4);
    scatter_quad(_mm512_extractf32x4_ps(v, 2), p, columns + 8);
    scatter_quad(_mm512_extractf32x4_ps(v, 3), p, columns + 12);
  }

  // The bits of lanes [k, k + kLanes) of a row; k is a multiple of kLanes.
  static MASKED_OPS_INLINE Predicate predicate(const uint64_t* row, int64_t k) {
    return reinterpret_cast<const Word16*>(row)[k >> 4];
  }
  // The same as a number. A count of bits that is loaded with them would wait for the one before it.
  static MASKED_OPS_INLINE uint32_t bits_of_lanes(const uint64_t* row, int64_t k) {
    return opaque(uint32_t{reinterpret_cast<const Word16*>(row)[k >> 4]});
  }
  // The bits of so many vectors, and vector j's; only the AVX2 file has more than one.
  static constexpr int kWordVectors = 1;
  using Word = Predicate;
  using Signs = Predicate;
  static MASKED_OPS_INLINE Word word(const uint64_t* row, int64_t k) { return predicate(row, k); }
  static MASKED_OPS_INLINE Signs signs(Word word, int) { return word; }
  static MASKED_OPS_INLINE Signs signs(const uint64_t* row, int64_t k) { return predicate(row, k); }
  static MASKED_OPS_INLINE Predicate predicate(uint64_t bits) { return Predicate(bits); }  // the lowest
  // The bits from j on of a word, a multiple of kLanes; it is loaded and where it was loaded from, whichever is
  // cheaper.
  static MASKED_OPS_INLINE Predicate predicate(uint64_t word, const uint64_t*, int j) { return predicate(word >> j); }
  static MASKED_OPS_INLINE Signs signs(uint64_t word, const uint64_t* at, int j) { return predicate(word, at, j); }
  static MASKED_OPS_INLINE Predicate first(int64_t n) {
    return n >= 16 ? Predicate(0xffff) : Predicate((1u << (n > 0 ? n : 0)) - 1);
  }
};

MASKED_OPS_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
MASKED_OPS_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
MASKED_OPS_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The last lane of a vector, then the others of the one that follows it; the other lanes, then the first of the next.
MASKED_OPS_INLINE Vec shift_up(Vec previous, Vec v) {
  return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(v.v), _mm512_castps_si512(previous.v), 15))};
}
MASKED_OPS_INLINE Vec shift_down(Vec v, Vec next) {
  return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(next.v), _mm512_castps_si512(v.v), 1))};
}

// Rows become columns: unpack pairs, then quads, then 128-bit lanes twice.
MASKED_OPS_INLINE void transpose(Vec (&r)[16]) {
  __m512 t[16];
  MASKED_OPS_UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  __m512 q[16];
  MASKED_OPS_UNROLL
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    q[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    q[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    q[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    q[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  MASKED_OPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(q[i], q[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(q[i], q[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(q[i + 8], q[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(q[i + 8], q[i + 12], 0xdd);
  }
  MASKED_OPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// The same within each quad of four rows.
MASKED_OPS_INLINE void transpose_quads(Vec (&r)[4]) {
  const __m512 a = _mm512_unpacklo_ps(r[0].v, r[1].v), b = _mm512_unpackhi_ps(r[0].v, r[1].v);
  const __m512 c = _mm512_unpacklo_ps(r[2].v, r[3].v), d = _mm512_unpackhi_ps(r[2].v, r[3].v);
  r[0].v = _mm512_shuffle_ps(a, c, 0x44);
  r[1].v = _mm512_shuffle_ps(a, c, 0xee);
  r[2].v = _mm512_shuffle_ps(b, d, 0x44);
  r[3].v = _mm512_shuffle_ps(b, d, 0xee);
}

// Stores the quads of four rows pitch floats apart: the first ones of all rows, then the second ones, and so on.
MASKED_OPS_INLINE void store_quads(const Vec (&r)[4], float* p, int64_t pitch) {
  MASKED_OPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    _mm_store_ps(p + i * pitch, _mm512_castps512_ps128(r[i].v));
    _mm_store_ps(p + (4 + i) * pitch, _mm512_extractf32x4_ps(r[i].v, 1));
    _mm_store_ps(p + (8 + i) * pitch, _mm512_extractf32x4_ps(r[i].v, 2));
    _mm_store_ps(p + (12 + i) * pitch, _mm512_extractf32x4_ps(r[i].v, 3));
  }
}

// The sums of four vectors, each still spread over the quads: quad q of the result holds those of quad q of a, b, c, d.
MASKED_OPS_INLINE Vec sum_quads(Vec a, Vec b, Vec c, Vec d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
  return {_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)))};
}

// Lane i becomes the sum of vector i, given the results of sum_quads for each four vectors.
MASKED_OPS_INLINE Vec sum_across_quads(const Vec (&q)[4]) {
  const auto add_pairs = [](__m512 a, __m512 b) __attribute__((always_inline)) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return {add_pairs(add_pairs(q[0].v, q[1].v), add_pairs(q[2].v, q[3].v))};
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
