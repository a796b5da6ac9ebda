// Instructions that C++ has no name for, one function each; tests/cuda/emulator.h has a model of every one. Those from
// mbarrier_init on are Hopper's (sm_90a) and may only be used in code that is compiled for it.
#pragma once

#include "device.h"

#ifndef MASKED_OPS_EMULATE

namespace masked_ops::cuda {

MASKED_OPS_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory; zeros, and nothing read, unless there.
MASKED_OPS_DEVICE void cp_async16(uint32_t to, const void* from, bool there) {
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
MASKED_OPS_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
MASKED_OPS_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Keeps the compiler from computing it anew for each use.
template <typename T>
MASKED_OPS_DEVICE T computed(T x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Of the line that it lies in.
MASKED_OPS_DEVICE void prefetch_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// Four 8x8 matrices of 16-bit elements; lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i. Lane l gets
// elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, or, transposed, of column l / 4.
template <bool kTransposed>
MASKED_OPS_DEVICE void ldmatrix_x4(uint32_t* to, uint32_t address) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  }
}

// D[16][8] += A[16][16] B[16][8].
template <bool kBFloat>
MASKED_OPS_DEVICE void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  if constexpr (kBFloat) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// prmt; __byte_perm drops the bit that asks for a byte's sign.
template <uint32_t kSelectors>
MASKED_OPS_DEVICE uint32_t permute(uint32_t from) {
  uint32_t to;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(to) : "r"(from), "n"(kSelectors));
  return to;
}

// Four of the eight bytes of first (0 to 3) and second (4 to 7).
template <uint32_t kSelectors>
MASKED_OPS_DEVICE uint32_t select_bytes(uint32_t first, uint32_t second) {
  uint32_t to;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(to) : "r"(first), "r"(second), "n"(kSelectors));
  return to;
}

// The same, by selectors that are not known before: the lower four nibbles, each below 8.
MASKED_OPS_DEVICE uint32_t select_bytes(uint32_t first, uint32_t second, uint32_t selectors) {
  uint32_t to;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(to) : "r"(first), "r"(second), "r"(selectors));
  return to;
}

// --- Hopper ---

MASKED_OPS_DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
MASKED_OPS_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives, and lets the phase wait for so many bytes more.
MASKED_OPS_DEVICE void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
MASKED_OPS_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Of the calling block in its cluster.
MASKED_OPS_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster come here; what each has written is seen by all.
MASKED_OPS_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// The same for those that have only read of each other, and so need not wait for what they have under way to memory.
MASKED_OPS_DEVICE void cluster_barrier_after_reading() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// 16 bytes from this place in the shared memory of another block of the cluster, or of the block itself.
MASKED_OPS_DEVICE float4 load_shared_of(uint32_t block, uint32_t address) {
  float4 x;
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n"
      "}"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "r"(address), "r"(block));
  return x;
}
// Returns once the phase of this parity is over.
MASKED_OPS_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

MASKED_OPS_DEVICE void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

MASKED_OPS_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MASKED_OPS_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all but the last kGroups groups of products are done.
template <int kGroups>
MASKED_OPS_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}
// Keeps the compiler from using the accumulators before the wait above it.
template <int kAccumulators>
MASKED_OPS_DEVICE void wgmma_results(float (&d)[kAccumulators]) {
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Four 8x8 matrices to shared memory: ldmatrix the other way round.
template <bool kTransposed>
MASKED_OPS_DEVICE void stmatrix_x4(uint32_t address, const uint32_t* from) {
  if constexpr (kTransposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(from[0]),
                 "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(from[0]),
                 "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
  }
}

MASKED_OPS_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int kRegisters>
MASKED_OPS_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
MASKED_OPS_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace masked_ops::cuda

#endif
