// wgmma with operand A in registers: D[64][kN] += A[64][16] B[kN][16]^T, one function for kN of 64, 128, 192 and 256.
// Its lists of operands have to be spelled out; the macros below do it eight at a time.
#pragma once

#include "device.h"

#ifndef MASKED_OPS_EMULATE

namespace masked_ops::cuda {

#define MASKED_OPS_NAMES_0                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MASKED_OPS_NAMES_32                                                          \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MASKED_OPS_NAMES_64                                                          \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MASKED_OPS_NAMES_96                                                                      \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MASKED_OPS_SUMS8(i)                                                                                   \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define MASKED_OPS_SUMS32(i) \
  MASKED_OPS_SUMS8(i), MASKED_OPS_SUMS8(i + 8), MASKED_OPS_SUMS8(i + 16), MASKED_OPS_SUMS8(i + 24)
#define MASKED_OPS_LIST(...) __VA_ARGS__
#define MASKED_OPS_WGMMA(shape, types, names, a0, a1, a2, a3, b, transposed, sums)                             \
  asm volatile(                                                                                                \
      "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"                                                           \
      "wgmma.mma_async.sync.aligned." shape ".f32." types " {" names "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b \
      ", add, 1, 1, " transposed ";\n}"                                                                        \
      : sums                                                                                                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_matrix), "n"(int(kTransposedB)))

// In shared memory B is [kN][16], or, transposed, [16][kN]: the contraction along its rows.
template <bool kBFloat, bool kTransposedB, int kAccumulators>
MASKED_OPS_DEVICE void wgmma(float (&d)[kAccumulators], const uint32_t* a, uint64_t b_matrix) {
  static_assert(kAccumulators == 32 || kAccumulators == 64 || kAccumulators == 96 || kAccumulators == 128);
  if constexpr (kAccumulators == 32 && kBFloat) {
    MASKED_OPS_WGMMA("m64n64k16", "bf16.bf16", MASKED_OPS_NAMES_0, "%32", "%33", "%34", "%35", "%36", "%37",
                     MASKED_OPS_LIST(MASKED_OPS_SUMS32(0)));
  } else if constexpr (kAccumulators == 32 && !kBFloat) {
    MASKED_OPS_WGMMA("m64n64k16", "f16.f16", MASKED_OPS_NAMES_0, "%32", "%33", "%34", "%35", "%36", "%37",
                     MASKED_OPS_LIST(MASKED_OPS_SUMS32(0)));
  } else if constexpr (kAccumulators == 64 && kBFloat) {
    MASKED_OPS_WGMMA("m64n128k16", "bf16.bf16", MASKED_OPS_NAMES_0 ", " MASKED_OPS_NAMES_32, "%64", "%65", "%66", "%67",
                     "%68", "%69", MASKED_OPS_LIST(MASKED_OPS_SUMS32(0), MASKED_OPS_SUMS32(32)));
  } else if constexpr (kAccumulators == 64 && !kBFloat) {
    MASKED_OPS_WGMMA("m64n128k16", "f16.f16", MASKED_OPS_NAMES_0 ", " MASKED_OPS_NAMES_32, "%64", "%65", "%66", "%67",
                     "%68", "%69", MASKED_OPS_LIST(MASKED_OPS_SUMS32(0), MASKED_OPS_SUMS32(32)));
  } else if constexpr (kAccumulators == 96 && kBFloat) {
    MASKED_OPS_WGMMA("m64n192k16", "bf16.bf16", MASKED_OPS_NAMES_0 ", " MASKED_OPS_NAMES_32 ", " MASKED_OPS_NAMES_64,
                     "%96", "%97", "%98", "%99", "%100", "%101",
                     MASKED_OPS_LIST(MASKED_OPS_SUMS32(0), MASKED_OPS_SUMS32(32), MASKED_OPS_SUMS32(64)));
  } else if constexpr (kAccumulators == 96 && !kBFloat) {
    MASKED_OPS_WGMMA("m64n192k16", "f16.f16", MASKED_OPS_NAMES_0 ", " MASKED_OPS_NAMES_32 ", " MASKED_OPS_NAMES_64,
                     "%96", "%97", "%98", "%99", "%100", "%101",
                     MASKED_OPS_LIST(MASKED_OPS_SUMS32(0), MASKED_OPS_SUMS32(32), MASKED_OPS_SUMS32(64)));
  } else if constexpr (kAccumulators == 128 && kBFloat) {
    MASKED_OPS_WGMMA(
        "m64n256k16", "bf16.bf16",
        MASKED_OPS_NAMES_0 ", " MASKED_OPS_NAMES_32 ", " MASKED_OPS_NAMES_64 ", " MASKED_OPS_NAMES_96, "%128", "%129",
        "%130", "%131", "%132", "%133",
        MASKED_OPS_LIST(MASKED_OPS_SUMS32(0), MASKED_OPS_SUMS32(32), MASKED_OPS_SUMS32(64), MASKED_OPS_SUMS32(96)));
  } else if constexpr (kAccumulators == 128 && !kBFloat) {
    MASKED_OPS_WGMMA(
        "m64n256k16", "f16.f16",
        MASKED_OPS_NAMES_0 ", " MASKED_OPS_NAMES_32 ", " MASKED_OPS_NAMES_64 ", " MASKED_OPS_NAMES_96, "%128", "%129",
        "%130", "%131", "%132", "%133",
        MASKED_OPS_LIST(MASKED_OPS_SUMS32(0), MASKED_OPS_SUMS32(32), MASKED_OPS_SUMS32(64), MASKED_OPS_SUMS32(96)));
  }
}

}  // namespace masked_ops::cuda

#endif
