// The numbers that steer the CUDA kernels: measured on an H200 where a measurement is given, else an estimate, with its
// reason.
#pragma once

#include <cstdint>

namespace masked_ops::cuda::tuning {

// mask_copy: a thread has kCopyUnroll loads of 16 bytes under way; 2,048 threads of a multiprocessor then have 128 KB,
// five times what 4.3 TB/s and 700 ns of latency ask for. (2 and 8 loads, 128 and 512 threads took the same time.)
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

// decode: the kernels fill so many multiprocessors, an H200's. A constant, so that the same call needs the same memory
// and gives the same bits on every device.
constexpr int kDecodeMultiprocessors = 132;
// More rows than kLeastMmaRows go to the tensor cores; up to kMostGatherRows only from kGatherDensity on. (8192 x 8192,
// 16 rows, gathered and not: 42 and 45 us at density .1, 67 and 59 at .25, 108 and 74 at .5.)
constexpr int64_t kLeastMmaRows = 8;
constexpr double kGatherDensity = 0.18;
constexpr int64_t kMostGatherRows = 16;

// gemm_sm90: fitted to what an H200 took for all plans (16 bits, all three modes, 64 to 4,096 rows, three shapes), of
// which the model then takes the fastest. A step takes the tensor cores 4 cycles for each row of input. Loading takes
// longer where tiles are small: a multiprocessor has 49 bytes a cycle out of the L2, with which 128 + 256 rows are
// loaded as fast as they are multiplied.
constexpr double kSm90BytesPerCycle = 49;
// What it issues in a step beside the tensor cores: 96 instructions of each of eight warps, on four schedulers.
constexpr double kSm90StepCycles = 200;
// Of each tile: the first copies on their way in, the sums on their way out.
constexpr double kSm90TileCycles = 2650;
// Splits of the contraction, at most: a cluster of 8 blocks runs on every device. Adding up their sums costs two
// barriers, and reading each other's shared memory.
constexpr int kSm90Splits = 8;
constexpr double kSm90SumCycles = 550;
constexpr double kSm90SumBytesPerCycle = 42;

}  // namespace masked_ops::cuda::tuning
