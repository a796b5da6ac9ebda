// The numbers that steer the CUDA kernels. No GPU has measured any of them yet: each is an estimate, with its reason.
#pragma once

#include <cstdint>

namespace masked_ops::cuda::tuning {

// mask_copy: a thread has kCopyUnroll loads of 16 bytes under way; 2,048 threads of a multiprocessor then have 128 KB,
// five times what 4.3 TB/s and 700 ns of latency ask for.
constexpr int kCopyThreads = 256;
constexpr int kCopyUnroll = 4;
// Tasks of one launch: their descriptions fill the 4 KB that every driver takes as kernel parameters.
constexpr int kCopyTasks = 64;

// Passes over a mask: threads of a block, blocks of a multiprocessor (said so that ptxas takes 40 registers; left alone
// it spills to get along with 32), and 64-bit words that a warp packs at once.
constexpr int kPassThreads = 256;
constexpr int kPassBlocks = 6;
constexpr int kPackUnroll = 4;
// Words of one row that a warp compresses or expands: enough to hide the count of the words before it, and still
// 8,192 warps for a weight of 4096x4096.
constexpr int kCompressWords = 32;

// decode by gathering: 16 warps of a block share the input, of which they keep so many bytes at once; two such blocks a
// multiprocessor. Rows are split among fewer warps, and columns among more, as long as there are fewer blocks than
// that.
constexpr int kGatherThreads = 512;
constexpr int kGatherBlocks = 2;
constexpr int kGatherInputBytes = 48 << 10;
// Groups of eight values that a lane has under way: 2 make 48 KB a multiprocessor.
constexpr int kGatherAhead = 2;
// Values of a segment, on average, from which on the index of a mask is narrow: a step takes 64 values of a segment,
// and reads 3 bytes for each, not 4.
constexpr int64_t kNarrowIndex = 48;
// decode by mma: columns are split as long as there are no more blocks than this, two for each of an H200's
// multiprocessors: 320 blocks took 74 us where 192 took 68 (M 16, 8192 x 8192, density .1).
// A constant, so that the same call needs the same memory and gives the same bits on every device.
constexpr int kDecodeBlocks = 264;

// gemm_sm90: cycles in which a multiprocessor issues what one step of a tile takes beside the tensor cores: 96
// instructions of each of eight warps, on four schedulers.
constexpr double kSm90StepCycles = 200;
// Blocks that load the input's tiles together, 1 or 2: a step of 128 x 256 then takes 32 KB out of the L2 in its 1,024
// cycles and not 48 KB, where about 40 bytes a cycle and multiprocessor are to be had.
constexpr int kSm90Cluster = 2;
// Splits of its contraction, at most; what a second kernel costs, and each sum that it reads: 8 bytes through the L2,
// at about 3 KB a cycle.
constexpr int kSm90Splits = 8;
constexpr double kSm90SplitCycles = 3500;
constexpr double kSm90SplitCyclesPerSum = 8.0 / 3000;

}  // namespace masked_ops::cuda::tuning
