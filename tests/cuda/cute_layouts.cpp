// Whether fragments.h and swizzle.h agree with CuTe, which describes the same hardware. Runs on the CPU.
#include <cstdio>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "fragments.h"
#include "swizzle.h"

namespace {

int wrong = 0;

void same(const char* what, int got, int expected) {
  if (got != expected && wrong++ < 20) std::printf("%s: %d, CuTe has %d\n", what, got, expected);
}

// wgmma's operand A from registers: (thread, value) to an index in 64 x 16, column-major.
void wgmma_operand() {
  namespace GMMA = cute::SM90::GMMA;
  using Traits = cute::MMA_Traits<GMMA::MMA_64x256x16_F32BF16BF16_RS<GMMA::Major::K, GMMA::Major::K>>;
  const typename Traits::ALayout layout{};
  for (int thread = 0; thread < 128; ++thread) {
    for (int reg = 0; reg < 16; ++reg) {
      for (int half = 0; half < 2; ++half) {
        const int index = layout(thread, reg % 4 * 2 + half);
        same("row of wgmma", masked_ops::cuda::fragment_row(thread, reg), index % 64);
        same("column of wgmma", masked_ops::cuda::fragment_col(thread, reg, half), index / 64 + reg / 4 * 16);
      }
    }
  }
}

// mma.m16n8k16's operand B, (thread, value) to an index in 8 x 16, column-major: registers 0 and 2 of four are rows 0
// to 7 of a strip, 1 and 3 rows 8 to 15.
void mma_operand() {
  using Traits = cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>;
  const typename Traits::BLayout layout{};
  for (int lane = 0; lane < 32; ++lane) {
    for (int reg = 0; reg < 4; ++reg) {
      for (int half = 0; half < 2; ++half) {
        const int index = layout(lane, reg / 2 * 2 + half);
        same("row of mma", masked_ops::cuda::fragment_row(lane, reg), index % 8 + reg % 2 * 8);
        same("column of mma", masked_ops::cuda::fragment_col(lane, reg, half), index / 8);
      }
    }
  }
}

// The 128-byte swizzle of tiles in 16-bit elements: K-major, and MN-major with one box of 64 x 64 after the other.
void swizzle() {
  const auto layout = cute::as_position_independent_swizzle_layout(cute::tile_to_shape(
      cute::SM90::GMMA::Layout_K_SW128_Atom<cute::half_t>{}, cute::make_shape(cute::Int<64>{}, cute::Int<64>{})));
  for (int row = 0; row < 64; ++row) {
    for (int col = 0; col < 64; ++col) {
      same("swizzle", int(masked_ops::cuda::swizzled<128>(row, col * 2)), int(layout(row, col)) * 2);
    }
  }
  const auto transposed = cute::as_position_independent_swizzle_layout(
      cute::tile_to_shape(cute::SM90::GMMA::Layout_MN_SW128_Atom<cute::half_t>{},
                          cute::make_shape(cute::Int<256>{}, cute::Int<64>{}), cute::Step<cute::_2, cute::_1>{}));
  for (int row = 0; row < 256; ++row) {
    for (int k = 0; k < 64; ++k) {
      const int byte = row / 64 * 8192 + int(masked_ops::cuda::swizzled<128>(k, row % 64 * 2));
      same("transposed swizzle", byte, int(transposed(row, k)) * 2);
    }
  }
}

}  // namespace

int main() {
  wgmma_operand();
  mma_operand();
  swizzle();
  std::printf("%d differences\n", wrong);
  return wrong != 0;
}
