// What the machine can do at most, for benchmarks that state a share of it: fused multiply-adds out of registers, and
// reads from memory. Nothing else calls them.
#include "elements.h"
#include "kernels.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

template <typename T>
int64_t multiply_add(int64_t rounds) {
  // As many independent chains as hide the latency of the FMA in any of the machines, and as there are registers for.
  constexpr int kChains = Vec::kLanes == 16 ? 24 : 12;
  Vec chains[kChains];
  MASKED_OPS_UNROLL
  for (int i = 0; i < kChains; ++i) chains[i] = Vec::set1(float(i));
  Vec a = Vec::set1(1.0000001f), b = Vec::set1(1e-9f);
  for (int64_t round = 0; round < rounds; ++round) {
    MASKED_OPS_UNROLL
    for (int i = 0; i < kChains; ++i) chains[i] = Operand<T>::multiply_add(a, b, chains[i]);
  }
  Vec sum = chains[0];
  MASKED_OPS_UNROLL
  for (int i = 1; i < kChains; ++i) sum = sum + chains[i];
  volatile float keep = sum.sum();
  static_cast<void>(keep);
  return rounds * kChains * Vec::kLanes * Operand<T>::kDepth * 2;
}

}  // namespace

int64_t fma_loop(Dtype dtype, int64_t rounds) {
  int64_t operations = 0;
  with_element(dtype, [&](auto element) { operations = multiply_add<decltype(element)>(rounds); });
  return operations;
}

void read_loop(const float* data, int64_t n) {
  constexpr int kVectors = 8, L = Vec::kLanes;
  Vec sums[kVectors];
  MASKED_OPS_UNROLL
  for (int i = 0; i < kVectors; ++i) sums[i] = Vec::zero();
  for (int64_t at = 0; at + kVectors * L <= n; at += kVectors * L) {
    MASKED_OPS_UNROLL
    for (int i = 0; i < kVectors; ++i) sums[i] = sums[i] + Vec::loadu(data + at + i * L);
  }
  MASKED_OPS_UNROLL
  for (int i = 1; i < kVectors; ++i) sums[0] = sums[0] + sums[i];
  volatile float keep = sums[0].sum();
  static_cast<void>(keep);
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
