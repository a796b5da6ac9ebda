// Any CPU: the compiler's own vectors of four floats.
#pragma once

#include "basics.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

struct Vec {
  static constexpr int kLanes = 4;
  static constexpr bool kExpands = false;
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
  static MASKED_OPS_INLINE uint32_t bits_of_lanes(const uint64_t* row, int64_t k) { return predicate(row, k); }
  // The lanes that have a bit, moved together; those behind them are of no account.
  MASKED_OPS_INLINE Vec compress(uint32_t bits) const {
    float some[kLanes];
    int n = 0;
    MASKED_OPS_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      some[n] = v[i];
      n += bits >> i & 1;
    }
    return loadu(some);
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
  // The bits of so many vectors, and vector j's; only the AVX2 file has more than one.
  static constexpr int kWordVectors = 1;
  using Word = Predicate;
  using Signs = Predicate;
  static MASKED_OPS_INLINE Word word(const uint64_t* row, int64_t k) { return predicate(row, k); }
  static MASKED_OPS_INLINE Signs signs(Word word, int) { return word; }
  static MASKED_OPS_INLINE Signs signs(const uint64_t* row, int64_t k) { return predicate(row, k); }
  static MASKED_OPS_INLINE Predicate predicate(uint64_t bits) { return Predicate(bits & 15); }
  static MASKED_OPS_INLINE Predicate predicate(uint64_t word, const uint64_t*, int j) { return predicate(word >> j); }
  static MASKED_OPS_INLINE Signs signs(uint64_t word, const uint64_t* at, int j) { return predicate(word, at, j); }
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

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
