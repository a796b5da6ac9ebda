// AVX2: vectors of eight floats.
#pragma once

#include "shuffles_avx2.h"
#include "simd_x86.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;

  // All bits of the lanes that are set.
  struct Predicate {
    __m256i lanes;

    MASKED_OPS_INLINE Predicate() : lanes(_mm256_setzero_si256()) {}
    explicit MASKED_OPS_INLINE Predicate(__m256i lanes) : lanes(lanes) {}
    explicit MASKED_OPS_INLINE Predicate(unsigned bits) : Predicate(of_bits(_mm256_set1_epi32(int(bits)))) {}
    MASKED_OPS_INLINE Predicate operator&(Predicate other) const {
      return Predicate(_mm256_and_si256(lanes, other.lanes));
    }
    // The lowest byte of each lane holds the bits of all.
    static MASKED_OPS_INLINE Predicate of_bits(__m256i bits) {
      const __m256i own = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
      return Predicate(_mm256_cmpeq_epi32(_mm256_and_si256(bits, own), own));
    }
  };
  // The bits of so many vectors, in every lane: one load for all. Vector j's are shifted to the signs, which is where
  // masked loads and blends look for them.
  static constexpr int kWordVectors = 4;
  struct Word {
    __m256i bits;
  };
  struct Signs {
    __m256i lanes;
  };
  static MASKED_OPS_INLINE Word word(const uint64_t* row, int64_t k) {
    return {_mm256_set1_epi32(int(reinterpret_cast<const Word32*>(row)[k >> 5]))};
  }
  static MASKED_OPS_INLINE Signs signs(const uint64_t* row, int64_t k) {
    const __m256i own = _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return {_mm256_sllv_epi32(_mm256_set1_epi8(reinterpret_cast<const int8_t*>(row)[k >> 3]), own)};
  }
  static MASKED_OPS_INLINE Signs signs(Word word, int j) {
    const __m256i own = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    return {_mm256_sllv_epi32(word.bits, _mm256_sub_epi32(own, _mm256_set1_epi32(8 * j)))};
  }

  static MASKED_OPS_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static MASKED_OPS_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static MASKED_OPS_INLINE Vec quad(const float* p) {
    return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))};
  }
  template <int E>
  MASKED_OPS_INLINE Vec element() const {
    return {_mm256_permute_ps(v, E * 0x55)};
  }
  static MASKED_OPS_INLINE Vec quads(const float* const (&p)[2], int n) {
    const __m128i some = _mm_cmpgt_epi32(_mm_set1_epi32(n), _mm_setr_epi32(0, 1, 2, 3));
    return {_mm256_set_m128(_mm_maskload_ps(p[1], some), _mm_maskload_ps(p[0], some))};
  }
  static MASKED_OPS_INLINE Vec load(const float* p) { return {_mm256_load_ps(p)}; }
  static MASKED_OPS_INLINE Vec loadu(const float* p) { return {_mm256_loadu_ps(p)}; }
  static MASKED_OPS_INLINE Vec loadu(Predicate m, const float* p) { return {_mm256_maskload_ps(p, m.lanes)}; }
  static MASKED_OPS_INLINE Vec loadu(Signs m, const float* p) { return {_mm256_maskload_ps(p, m.lanes)}; }
  static MASKED_OPS_INLINE Vec load_even(uint32_t elements, const float* p) {
    const __m256 low = _mm256_maskload_ps(p, Predicate(elements).lanes);
    const __m256 high = _mm256_maskload_ps(p + 8, Predicate(elements >> 8).lanes);
    const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88));
    return {_mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8))};
  }
  static MASKED_OPS_INLINE Vec gather(Predicate m, const float* p, int step) {
    const __m256i at = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(step));
    return {_mm256_mask_i32gather_ps(_mm256_setzero_ps(), p, at, _mm256_castsi256_ps(m.lanes), 4)};
  }
  MASKED_OPS_INLINE void store_even(Predicate m, float* p) const {
    const __m256i even = _mm256_setr_epi32(-1, 0, -1, 0, -1, 0, -1, 0);
    const __m256i low = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3), high = _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7);
    const auto lanes = [&](__m256i half) __attribute__((always_inline)) {
      return _mm256_and_si256(_mm256_permutevar8x32_epi32(m.lanes, half), even);
    };
    _mm256_maskstore_ps(p, lanes(low), _mm256_permutevar8x32_ps(v, low));
    _mm256_maskstore_ps(p + 8, lanes(high), _mm256_permutevar8x32_ps(v, high));
  }
  MASKED_OPS_INLINE void store(float* p) const { _mm256_store_ps(p, v); }
  MASKED_OPS_INLINE void stream(float* p) const { _mm256_stream_ps(p, v); }
  MASKED_OPS_INLINE void storeu(float* p) const { _mm256_storeu_ps(p, v); }
  MASKED_OPS_INLINE void storeu(Predicate m, float* p) const { _mm256_maskstore_ps(p, m.lanes, v); }
  MASKED_OPS_INLINE void store_halves(float* low, float* high) const {
    _mm_store_ps(low, _mm256_castps256_ps128(v));
    _mm_store_ps(high, _mm256_extractf128_ps(v, 1));
  }
  MASKED_OPS_INLINE Vec select(Predicate m) const { return {_mm256_and_ps(_mm256_castsi256_ps(m.lanes), v)}; }
  MASKED_OPS_INLINE Vec select(Signs m) const {
    return {_mm256_blendv_ps(_mm256_setzero_ps(), v, _mm256_castsi256_ps(m.lanes))};
  }
  static constexpr bool kExpands = true;
  MASKED_OPS_INLINE Vec expand(uint32_t bits) const {
    const __m256i from = indices(kExpand<4>.of[bits]);
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(v, from), _mm256_setzero_ps(), _mm256_castsi256_ps(from))};
  }
  // The lanes that have a bit, moved together; those behind them are of no account.
  MASKED_OPS_INLINE Vec compress(uint32_t bits) const {
    return {_mm256_permutevar8x32_ps(v, indices(kCompress<4>.of[bits]))};
  }
  static MASKED_OPS_INLINE uint32_t bits_of_lanes(const uint64_t* row, int64_t k) {
    return reinterpret_cast<const uint8_t*>(row)[k >> 3];
  }
  MASKED_OPS_INLINE float sum() const {
    const __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 b = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
  }

  static MASKED_OPS_INLINE Vec gather(const float* p, const uint16_t* columns) {
    return {_mm256_set_m128(gather_quad(p, columns + 4), gather_quad(p, columns))};
  }
  MASKED_OPS_INLINE void scatter(float* p, const uint16_t* columns) const {
    scatter_quad(_mm256_castps256_ps128(v), p, columns);
    scatter_quad(_mm256_extractf128_ps(v, 1), p, columns + 4);
  }

  static MASKED_OPS_INLINE Predicate predicate(const uint64_t* row, int64_t k) {
    return Predicate::of_bits(_mm256_set1_epi8(reinterpret_cast<const int8_t*>(row)[k >> 3]));
  }
  static MASKED_OPS_INLINE Predicate predicate(uint64_t bits) { return Predicate(unsigned(bits)); }
  static MASKED_OPS_INLINE Predicate predicate(uint64_t, const uint64_t* at, int j) { return predicate(at, j); }
  static MASKED_OPS_INLINE Signs signs(uint64_t, const uint64_t* at, int j) {
    return signs(word(at, j), j / kLanes % kWordVectors);
  }
  static MASKED_OPS_INLINE Predicate first(int64_t n) {
    const int lanes = int(n >= 8 ? 8 : n > 0 ? n : 0);
    return Predicate(_mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
  }
};

MASKED_OPS_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
MASKED_OPS_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
MASKED_OPS_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
MASKED_OPS_INLINE Vec shift_up(Vec previous, Vec v) {
  const __m256 middle = _mm256_permute2f128_ps(previous.v, v.v, 0x21);
  return {_mm256_castsi256_ps(_mm256_alignr_epi8(_mm256_castps_si256(v.v), _mm256_castps_si256(middle), 12))};
}
MASKED_OPS_INLINE Vec shift_down(Vec v, Vec next) {
  const __m256 middle = _mm256_permute2f128_ps(v.v, next.v, 0x21);
  return {_mm256_castsi256_ps(_mm256_alignr_epi8(_mm256_castps_si256(middle), _mm256_castps_si256(v.v), 4))};
}

MASKED_OPS_INLINE void transpose(Vec (&r)[8]) {
  __m256 t[8], q[8];
  MASKED_OPS_UNROLL
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  MASKED_OPS_UNROLL
  for (int i = 0; i < 8; i += 4) {
    q[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    q[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    q[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    q[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  MASKED_OPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(q[i], q[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(q[i], q[i + 4], 0x31);
  }
}

MASKED_OPS_INLINE void transpose_quads(Vec (&r)[4]) {
  const __m256 a = _mm256_unpacklo_ps(r[0].v, r[1].v), b = _mm256_unpackhi_ps(r[0].v, r[1].v);
  const __m256 c = _mm256_unpacklo_ps(r[2].v, r[3].v), d = _mm256_unpackhi_ps(r[2].v, r[3].v);
  r[0].v = _mm256_shuffle_ps(a, c, 0x44);
  r[1].v = _mm256_shuffle_ps(a, c, 0xee);
  r[2].v = _mm256_shuffle_ps(b, d, 0x44);
  r[3].v = _mm256_shuffle_ps(b, d, 0xee);
}

MASKED_OPS_INLINE void store_quads(const Vec (&r)[4], float* p, int64_t pitch) {
  MASKED_OPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    _mm_store_ps(p + i * pitch, _mm256_castps256_ps128(r[i].v));
    _mm_store_ps(p + (4 + i) * pitch, _mm256_extractf128_ps(r[i].v, 1));
  }
}

MASKED_OPS_INLINE Vec sum_quads(Vec a, Vec b, Vec c, Vec d) {
  return {_mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v))};
}

MASKED_OPS_INLINE Vec sum_across_quads(const Vec (&q)[2]) {
  return {_mm256_add_ps(_mm256_permute2f128_ps(q[0].v, q[1].v, 0x20), _mm256_permute2f128_ps(q[0].v, q[1].v, 0x31))};
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
