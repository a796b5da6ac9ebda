#pragma once

// For every function in a header that kernels and other files share: of an inline function the linker keeps one copy,
// which may be one that was compiled for a better CPU.
#define MASKED_OPS_INLINE inline __attribute__((always_inline))
