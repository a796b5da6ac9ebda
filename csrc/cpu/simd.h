// A vector of floats and what the kernels do with it; the only file with intrinsics. Everything lies in a namespace
// named by the capability, so that several builds of one kernel can share a library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define MASKED_OPS_STRING_(x) #x
#define MASKED_OPS_STRING(x) MASKED_OPS_STRING_(x)
#define MASKED_OPS_INLINE inline __attribute__((always_inline))
// GCC unrolls a counted loop whole only when told to; arrays of vectors stay in registers only when it does.
#define MASKED_OPS_UNROLL _Pragma("GCC unroll 32")

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// Not std::min: an inline function of the standard library that was compiled for one capability may be the copy that
// the linker keeps for all.
template <typename T>
MASKED_OPS_INLINE constexpr T min(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
MASKED_OPS_INLINE constexpr T max(T a, T b) {
  return a > b ? a : b;
}
MASKED_OPS_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The same value, whose origin the compiler cannot see: what depends on it stays where it is used, instead of being
// computed ahead of the branches around and taking registers.
template <typename T>
MASKED_OPS_INLINE T opaque(T x) {
  __asm__("" : "+r"(x));
  return x;
}

// A number as a type, for the argument of a generic lambda.
template <int N>
struct Int {
  static constexpr int value = N;
};

// kernel(Int<n>) for a number from 1 to N that is known only now.
template <int N, typename Kernel>
MASKED_OPS_INLINE void with_int(int64_t n, const Kernel& kernel) {
  if constexpr (N > 1) {
    if (n < N) return with_int<N - 1>(n, kernel);
  }
  kernel(Int<N>());
}

using Word16 __attribute__((may_alias)) = uint16_t;
using Word32 __attribute__((may_alias)) = uint32_t;

#if defined(__AVX512F__) || defined(__AVX2__)
// Four floats from anywhere: a load and a shuffle for each, in less than half of the time of the gather instructions.
MASKED_OPS_INLINE __m128 gather_quad(const float* p, const uint16_t* columns) {
  uint64_t c;
  std::memcpy(&c, columns, sizeof(c));
  __m128 v = _mm_load_ss(p + uint16_t(c));
  v = _mm_insert_ps(v, _mm_load_ss(p + uint16_t(c >> 16)), 0x10);
  v = _mm_insert_ps(v, _mm_load_ss(p + uint16_t(c >> 32)), 0x20);
  return _mm_insert_ps(v, _mm_load_ss(p + (c >> 48)), 0x30);
}
template <int kLane>
MASKED_OPS_INLINE void store_lane(__m128 v, float* p) {
  const int bits = _mm_extract_ps(v, kLane);
  std::memcpy(p, &bits, sizeof(bits));
}
MASKED_OPS_INLINE void scatter_quad(__m128 v, float* p, const uint16_t* columns) {
  uint64_t c;
  std::memcpy(&c, columns, sizeof(c));
  _mm_store_ss(p + uint16_t(c), v);
  store_lane<1>(v, p + uint16_t(c >> 16));
  store_lane<2>(v, p + uint16_t(c >> 32));
  store_lane<3>(v, p + (c >> 48));
}
#endif

#if defined(__AVX512F__)

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
  template <int kUses>  // of what the predicate loads, in multiply-adds
  static MASKED_OPS_INLINE Predicate predicate_for(const uint64_t* row, int64_t k) {
    return predicate(row, k);
  }
  static MASKED_OPS_INLINE Predicate predicate(uint64_t bits) { return Predicate(bits); }  // the lowest
  // The bits from j on of a word, a multiple of kLanes; it is loaded and where it was loaded from, whichever is
  // cheaper.
  static MASKED_OPS_INLINE Predicate predicate(uint64_t word, const uint64_t*, int j) { return predicate(word >> j); }
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

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;

  // All bits of the lanes that are set. (Shifting each lane's bit to where masked loads look for it takes one step
  // less, but shifts compete with multiply-adds: forward of 4 rows was 10% slower.)
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
  // Spreading the bits through a register is slower by itself, but leaves more room for multiply-adds.
  template <int kUses>
  static MASKED_OPS_INLINE Predicate predicate_for(const uint64_t* row, int64_t k) {
    if (kUses <= 2) return predicate(row, k);
    return Predicate(unsigned{reinterpret_cast<const uint8_t*>(row)[k >> 3]});
  }
  static MASKED_OPS_INLINE Predicate predicate(uint64_t bits) { return Predicate(unsigned(bits)); }
  static MASKED_OPS_INLINE Predicate predicate(uint64_t, const uint64_t* at, int j) { return predicate(at, j); }
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

#else  // any CPU: the compiler's own vectors of four floats

struct Vec {
  static constexpr int kLanes = 4;
  using Predicate = uint8_t;
  typedef float Floats __attribute__((vector_size(16)));
  typedef float LooseFloats __attribute__((vector_size(16), aligned(4), may_alias));
  typedef int32_t Ints __attribute__((vector_size(16)));
  Floats v;

  static MASKED_OPS_INLINE Vec zero() { return {Floats{0, 0, 0, 0}}; }
  static MASKED_OPS_INLINE Vec set1(float x) { return {Floats{x, x, x, x}}; }
  static MASKED_OPS_INLINE Vec quad(const float* p) { return loadu(p); }
  template <int E>
  MASKED_OPS_INLINE Vec element() const {
    return set1(v[E]);
  }
  static MASKED_OPS_INLINE Vec quads(const float* const (&p)[1], int n) { return loadu(Predicate((1 << n) - 1), p[0]); }
  static MASKED_OPS_INLINE Vec load(const float* p) { return loadu(p); }
  static MASKED_OPS_INLINE Vec loadu(const float* p) { return {*reinterpret_cast<const LooseFloats*>(p)}; }
  static MASKED_OPS_INLINE Vec loadu(Predicate m, const float* p) {
    return {Floats{m & 1 ? p[0] : 0, m & 2 ? p[1] : 0, m & 4 ? p[2] : 0, m & 8 ? p[3] : 0}};
  }
  static MASKED_OPS_INLINE Vec load_even(uint32_t e, const float* p) {
    return {Floats{e & 1 ? p[0] : 0, e & 4 ? p[2] : 0, e & 16 ? p[4] : 0, e & 64 ? p[6] : 0}};
  }
  static MASKED_OPS_INLINE Vec gather(Predicate m, const float* p, int step) {
    const int64_t s = step;
    return {Floats{m & 1 ? p[0] : 0, m & 2 ? p[s] : 0, m & 4 ? p[2 * s] : 0, m & 8 ? p[3 * s] : 0}};
  }
  MASKED_OPS_INLINE void store_even(Predicate m, float* p) const {
    for (int i = 0; i < 4; ++i) {
      if (m >> i & 1) p[2 * i] = v[i];
    }
  }
  MASKED_OPS_INLINE void store(float* p) const { storeu(p); }
  MASKED_OPS_INLINE void stream(float* p) const { storeu(p); }
  MASKED_OPS_INLINE void storeu(float* p) const { *reinterpret_cast<LooseFloats*>(p) = v; }
  MASKED_OPS_INLINE void storeu(Predicate m, float* p) const {
    for (int i = 0; i < 4; ++i) {
      if (m >> i & 1) p[i] = v[i];
    }
  }
  MASKED_OPS_INLINE void store_halves(float* low, float* high) const {
    std::memcpy(low, &v, 8);
    std::memcpy(high, reinterpret_cast<const char*>(&v) + 8, 8);
  }
  MASKED_OPS_INLINE Vec select(Predicate m) const {
    constexpr Ints kBit = {1, 2, 4, 8};
    const int32_t all = m;
    return {Floats((Ints{all, all, all, all} & kBit) == kBit ? Ints(v) : Ints{})};
  }
  MASKED_OPS_INLINE float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }

  static MASKED_OPS_INLINE Vec gather(const float* p, const uint16_t* columns) {
    return {Floats{p[columns[0]], p[columns[1]], p[columns[2]], p[columns[3]]}};
  }
  MASKED_OPS_INLINE void scatter(float* p, const uint16_t* columns) const {
    for (int i = 0; i < 4; ++i) p[columns[i]] = v[i];
  }

  static MASKED_OPS_INLINE Predicate predicate(const uint64_t* row, int64_t k) {
    return Predicate(row[k >> 6] >> (k & 63) & 15);
  }
  template <int kUses>
  static MASKED_OPS_INLINE Predicate predicate_for(const uint64_t* row, int64_t k) {
    return predicate(row, k);
  }
  static MASKED_OPS_INLINE Predicate predicate(uint64_t bits) { return Predicate(bits & 15); }
  static MASKED_OPS_INLINE Predicate predicate(uint64_t word, const uint64_t*, int j) { return predicate(word >> j); }
  static MASKED_OPS_INLINE Predicate first(int64_t n) {
    return n >= 4 ? Predicate(15) : Predicate((1u << (n > 0 ? n : 0)) - 1);
  }
};

MASKED_OPS_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
MASKED_OPS_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
MASKED_OPS_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
MASKED_OPS_INLINE Vec shift_up(Vec previous, Vec v) { return {Vec::Floats{previous.v[3], v.v[0], v.v[1], v.v[2]}}; }
MASKED_OPS_INLINE Vec shift_down(Vec v, Vec next) { return {Vec::Floats{v.v[1], v.v[2], v.v[3], next.v[0]}}; }

MASKED_OPS_INLINE void transpose(Vec (&r)[4]) {
  const Vec a = r[0], b = r[1], c = r[2], d = r[3];
  for (int i = 0; i < 4; ++i) r[i].v = Vec::Floats{a.v[i], b.v[i], c.v[i], d.v[i]};
}

MASKED_OPS_INLINE void transpose_quads(Vec (&r)[4]) { transpose(r); }

MASKED_OPS_INLINE void store_quads(const Vec (&r)[4], float* p, int64_t pitch) {
  for (int i = 0; i < 4; ++i) r[i].store(p + i * pitch);
}

MASKED_OPS_INLINE Vec sum_quads(Vec a, Vec b, Vec c, Vec d) {
  Vec r[4] = {a, b, c, d};
  transpose(r);
  return (r[0] + r[2]) + (r[1] + r[3]);
}

MASKED_OPS_INLINE Vec sum_across_quads(const Vec (&q)[1]) { return q[0]; }

#endif

// The same vector, which the compiler may not load again for each of its uses: an operand in memory is a load, and
// loads would then outnumber multiply-adds.
MASKED_OPS_INLINE Vec in_register(Vec x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x.v));
#elif defined(__AVX2__)
  __asm__("" : "+x"(x.v));
#endif
  return x;
}

// Four rows become columns: four floats each, pitch floats apart, at p.
MASKED_OPS_INLINE void store_transposed(const Vec (&r)[4], float* p, int64_t pitch) {
  Vec quads[4] = {r[0], r[1], r[2], r[3]};
  transpose_quads(quads);
  store_quads(quads, p, pitch);
}

// After the last stream of a task, whose stores go past the caches and may come late.
MASKED_OPS_INLINE void end_streams() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

MASKED_OPS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
MASKED_OPS_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// Eight bytes, loaded here and not where they are used: an address that waits for its index stalls all loads behind it.
MASKED_OPS_INLINE uint64_t load_ahead(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof(word));
  asm volatile("" : "+r"(word));
  return word;
}

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
  for (; bits; bits &= bits - 1) *out++ = in[__builtin_ctzll(bits)];
  return out;
#endif
}

// The inverse: out[i] = bit i ? the next of in : 0 for i < 64; returns the end of what was taken. Unless kExact, up to
// 64 elements from in on may be read.
template <bool kExact, typename Element>
MASKED_OPS_INLINE const Element* expand64(uint64_t bits, const Element* in, Element* out) {
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
  for (int i = 0; i < 64; ++i) out[i] = 0;
  for (; bits; bits &= bits - 1) out[__builtin_ctzll(bits)] = *in++;
  return in;
#endif
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
