// The numbers that steer, per capability; each with the measurement that chose it. Machine: two Zen 5 cores, 48 KB L1d,
// 1 MB L2 a core, 32 MB L3.
#pragma once

#include "simd.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY::tuning {

// Register tile of the microkernel, kMR x kNV vectors: as many accumulators as leave room for kNV operands and a
// broadcast, and on AVX-512 for four rows that are being packed. AVX-512: 11 loads for 24 FMAs. The others: 7 for 12.
#if defined(__AVX512F__)
constexpr int kMR = 8, kNV = 3;
#else
constexpr int kMR = 4, kNV = 3;
#endif
constexpr int kNR = kNV * Vec::kLanes;

// Depth of a packed panel of B: kKC x kNR floats stay in L2 beside the A panels that pass.
constexpr int64_t kKC = 768;

// Packed A is shared by the team; more rows than fit here are taken in chunks, each of which packs B again. 2048, 2048
// -> 2048: 35.4 ms, and 39.6 with 16 MB; 1024, 4096 -> 4096 70 and 77; bfloat16 2048, 4096 -> 512 11.0 and 14.1.
constexpr int64_t kPanelABytes = int64_t{4} << 20;

// Rows of a task below which splitting a panel of B among threads costs more (B is packed twice) than it gains.
constexpr int64_t kMinRowsPerTask = 64;

// Tall products: depth and bytes of a thread's block of packed A, half of L2; the rows below which, and the bytes of B
// beyond which, it is not worth packing B for each block, unless chunks would have it packed as often. 25088, 256 ->
// 64: 330 GF/s, and 150 with all of A at once; 2048, 4096 -> 128: 5.1 ms and 5.4, or 5.3 and 8.4 where the cores are
// far apart (bfloat16 2.5 and 4.1); 2048, 512 -> 2048 the same either way; bfloat16 4096, 512 -> 4096 0.8 times as
// fast.
constexpr int64_t kRowBlockDepth = 512, kRowBlockBytes = int64_t{512} << 10;
constexpr int64_t kLeastRowBlock = 128;
constexpr int64_t kMostRepackedBytes = int64_t{2} << 20;

// Columns of C up to which rows of A are not packed, but read as they lie; the least rows, and those that are taken at
// a time. Two threads, us, packed and as they lie: 64, 1024 -> 64, float32 26.0 and 22.4, bfloat16 14.4 and 12.3; 512,
// 2048 -> 128 603 and 574, 308 and 296; 2048, 2048 -> 256 5070 and 4640, 2400 and 2360; 512, 768 -> 3072 5% longer as
// they lie. A last panel of few rows is packed after all, and takes as long as a whole one: 17, 2048 -> 256, one
// thread, bfloat16 10% longer.
constexpr int64_t kDirectColumns = 512, kLeastDirectRows = 24, kDirectRows = 2048;
// Lines of each of their next rows that are fetched ahead. 2048, 3072 -> 128, bfloat16, against dense torch: .94 with
// none, 1.00 with two, .98 with eight; from caches all the same.
constexpr int kDirectLinesAhead = 2;

// Elements of a row by which packing A is ahead of itself: 512 x 3072 from memory 0.38 ms to 0.31; columns, whose next
// rows are fetched, 0.37 to 0.24, bfloat16 0.35 to 0.17.
constexpr int64_t kRowsOfAAhead = 96;
// Floats by which a panel of A is fetched ahead, where there are panels enough: the hardware stops at each page, and
// half of them were written by another core. grad_input, 512, 3072 x 768, near cores 5.05 to 5.0 ms, far ones 5.5
// to 5.1; forward 4.95 either way, and 5.15 to 5.0.
constexpr int64_t kPanelAhead = 512, kLeastFetchedPanels = 6;

// Packing of B: depths per run of a few rows, and how many steps the prefetch is ahead, from rows (a step is a vector
// of four rows) and from columns (a step is a depth). The time between two steps is some hundred cycles at M = 128 and
// some tens at M = 16. 128, 4096 -> 4096: runs of 16, 64, 256 depths reach 86%, 92%, 91% of the peak.
constexpr int64_t kPackRun = 64;
constexpr int64_t kRowsAhead = 12;
constexpr int64_t kColumnsAhead = 32;
// Bytes of C from which on a tile's lines are fetched while the one above is computed; of smaller ones the instructions
// take longer than the lines. grad_weight, one thread, ms, without and with it: 24, 4096 x 4096, float32 6.0 and 4.5,
// 2048 x 2048 1.18 and 1.0, 1024 x 1024 0.215 and 0.229; bfloat16 32, 4096 x 4096 3.3 and 3.0, 24, 2048 x 2048 0.54 to
// 0.58 and 0.60, 1024 x 1024 0.127 and 0.137.
constexpr int64_t kFetchedBytes = int64_t{8} << 20;
// Up to this many panels of A and bytes of B, rows are packed at once, so many vectors ahead, and not on the side: a
// step takes longer than the multiplications beside it. bfloat16, one thread, us: 17, 1024 -> 1024 136 to 114, 24 154
// to 141, 32 and more 5 to 10% longer; float32, 17, 271 to 231. But from memory, where nothing comes during the
// multiplications, 24, 2048 -> 2048 650 to 705. With AVX2, where panels are of half the rows and a step, which the sums
// leave no registers, moves half as much, always. Zen 3, one thread, us, on the side and at once: float32 32, 512 ->
// 512 314 and 274, 64 -> 2048 173 and 138, 64, 768 -> 768 1157 and 1076, 128, 4096 -> 4096 ms 64 and 57; bfloat16 32,
// 512 -> 512 364 and 272, 64, 768 -> 768 1617 and 1040, float16 504 and 270, 1595 and 1002. (Columns: 32, 512 -> 512
// 257 and 266.)
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kRowsOnTheSide = false;
#else
constexpr bool kRowsOnTheSide = true;
#endif
constexpr int64_t kFewPanels = 3;
constexpr int64_t kVectorsAheadAtOnce = 2, kMostAtOnceBytes = int64_t{4} << 20;

// Up to this many rows of input, a weight is not packed (gemv.h); they are taken kSmallTile at a time, with as many
// sums in registers as leave room for what is multiplied. 4096 -> 4096, where memory gives 50 GB/s (and 90), forward: 1
// row 1.25 ms (0.8), 8 rows 1.6 (1.0 to 1.35), 16 rows 1.7 (1.5 to 1.75); reading it in the order of its rows, as one
// row does, takes 1.25 (0.8).
constexpr int64_t kSmallRows = 16;
// Of floats: forward, and grad_input from memory; the first is packed after all from kShortRowsInputFloat rows of input
// on, where the weight's rows have so few elements for each. AVX2, one thread, us, packed and not: 512 -> 512, 18 125
// and 96, 24 137 and 125, 32 156 and 174; 64 -> 1024, 18 27 and 26, 24 32 and 35; grad_input, ms, 4096 x 4096, 20 14.4
// and 9.0, 24 14.8 and 10.3, 32 11.7 and 13.3.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int64_t kSmallRowsFloat = 24, kShortRowsInputFloat = 20, kShortRowsFloat = 4;
#else
constexpr int64_t kSmallRowsFloat = 16, kShortRowsInputFloat = 0, kShortRowsFloat = 0;
#endif
// Of 16 bits, from kShortRowsInput rows of input on, a weight whose rows have so few elements for each row of input is
// packed after all: the sums of a row are added up across lanes too often. bfloat16, one thread, us, without packing
// and with it: 8, 64 -> 3072 28 and 14, 16, 128 -> 4096 96 and 54, 16, 256 -> 4096 124 and 110, 8, 256 -> 4096 67 and
// 81; float16, 16, 128 -> 4096 129 and 103, 16, 256 -> 4096 196 and 202.
constexpr int64_t kShortRowsInput = 4, kShortRows16 = 16, kShortRowsConverted = 12;
// grad_weight. AVX2, one thread, 16, 1024 -> 1024: 480 us without packing, 317 with it.
#if defined(__AVX512F__)
constexpr int64_t kOuterMost = 16;
#else
constexpr int64_t kOuterMost = 8;
#endif
// Rows of a tile, and registers for its sums (forward) or factors (grad_input) and what is multiplied. AVX2, one
// thread, forward, us, tiles of 4 and of 6: 6, 512 -> 512 42 and 33, 12 75 and 65, 16 102 and 88; 4 x 3 and 3 x 4 sums
// spill.
#if defined(__AVX512F__)
constexpr int kSmallTile = 8, kSmallRegisters = 28;
#else
constexpr int kSmallTile = 6, kSmallRegisters = 14;
#endif
// Columns of a chunk: of one row of input, if the weight comes from memory, and if from caches, where what is fetched
// ahead would push out what is used if the four rows that are taken at once were longer; of operands of forward's
// input, one tile or several; and of the sums of grad_input. They are to stay in L1, which may have to be shared with
// another thread of the core. One row, one thread, us, chunks of 4096 and of 1024, which are fetched ahead: 512 x 3072
// AVX2 forward 92 and 79, grad_input 95 and 75, AVX-512 91 and 74, 93 and 73; 1024 x 3072, partly from memory, AVX2 510
// and 241, AVX-512 493 and 320.
constexpr int64_t kRowChunk = 4096, kCachedRowBytes = int64_t{4} << 10, kTileChunk = 768, kTilesChunk = 384,
                  kSumsChunk = 512;
// Vectors of sums of forward that wait for the next chunk (12 KB), and rows of a block of grad_input.
constexpr int64_t kWaitingSums = 192, kSmallBlock = 24;
// From caches, grad_input of more than kAxpyRows rows (of operands) goes by tiles of columns, in strips and down blocks
// of rows: kDownTile rows of input, and as many vectors as keep the sums in registers. A sum that is loaded and stored
// for each 32 rows of the weight costs a third of the time: 12, 768 -> 2048, bfloat16, one thread, 160 us, 80 with 256;
// they are not more because rows may lie whole 4 KB apart, and then few lines stay in L1 (AVX2, 2048 -> 2048: 128).
// Rows are fetched just ahead, for the same reason. Where elements are converted, short rows go as they lie.
// The most rows of input, one thread, us, packed and not: 24, 768 -> 1024 bfloat16 95 and 80, float32 164 and 157; 24,
// 2048 -> 2048, whole 4 KB apart, bfloat16 606 and 696; float16, 16, 1024 -> 1024, 345 and 388. AVX2, 12 and 16, 1024
// -> 1024, float32 425 and 341, 481 and 453; 20 544 and 568; float16 and bfloat16, 12, 414 and 402, 417 and 425, 16 465
// and 534, 478 and 567, but with the weight from memory 864 and 594, 793 and 641.
constexpr int64_t kAxpyRows = 3, kSmallStrip = 512;
#if defined(__AVX512F__)
constexpr int kDownTile = 12, kDownVectors[kDownTile] = {6, 6, 6, 6, 4, 4, 3, 3, 2, 2, 2, 2};
constexpr int64_t kDownRows = 256, kDownAhead = 3;
constexpr int64_t kDownMost = 24, kDownMostApart = 16, kDownMostConverted = 12;
#elif defined(__AVX2__)
constexpr int kDownTile = 6, kDownVectors[kDownTile] = {8, 4, 3, 2, 2, 2};
constexpr int64_t kDownRows = 128, kDownAhead = 8;
constexpr int64_t kDownMost = 16, kDownMostApart = 16, kDownMostConverted = 12;
#else
constexpr int kDownTile = 6, kDownVectors[kDownTile] = {4, 4, 3, 2, 2, 2};
constexpr int64_t kDownRows = 128, kDownAhead = 2;
constexpr int64_t kDownMost = 8, kDownMostApart = 8, kDownMostConverted = 8;
#endif
// Bytes of a weight up to which it goes by tiles: AVX2's are a line wide, which is slow to come from anywhere but L2.
// One thread, us, by tiles and by rows: float32, 6, 512 -> 512 37 and 45, 768 -> 768 84 and 102, or from memory 411 and
// 140; 8, 1024 -> 1024 262 and 238, or 429 and 296; 8, 4096 -> 1024 4890 and 1290 from memory; float16, 4, 512 -> 256
// 21.6 and 16.9, 8, 1024 -> 1024 356 and 270; bfloat16 22.1 and 18.0, 357 and 285.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int64_t kDownBytes = int64_t{2} << 20, kDownBytesConverted = 0;
#else
constexpr int64_t kDownBytes = int64_t{16} << 20, kDownBytesConverted = kDownBytes;
#endif
// Where the CPU fetches into L2 (kFarBytes), a thread's part of a weight is to fit there, or it goes by rows, up to so
// many rows of input. Zen 4, dense torch's time over ours, by tiles and by rows, from memory: one thread, 2048 x 2048,
// float32 8 1.4 and 2.0, 16 1.3 and 1.9, bfloat16 8 .91 and 2.3, 16 .91 and 1.8; two threads, 768 x 3072, float32 8 2.9
// and 4.2, bfloat16 1.2 and 2.3. From L3 3072 x 1024, one thread, float32 8 1.4 and 2.4, bfloat16 1.6 and 1.6, two
// threads 2.6 and 3.6, 1.5 and 1.1; 768 x 768, which fits, 2.6 and 1.7, 2.0 and 1.25. More rows of input by the GEMM
// and by rows, from memory, one thread: 2048 x 1024, 20 float32 1.3 and 2.1, bfloat16 .85 and 1.5, 24 1.4 and 1.9, .92
// and 1.5, 32 1.55 and 1.7, 1.25 and 1.25; float16, us, 16 1206 and 850, 20 1145 and 1120, 24 1290 and 1290. From L3
// 24 takes 1.1 to 1.3 times as long by rows. Packed, 2048 x 2048 at 50%, us, by tiles and by rows, from memory: float32
// 4 1910 and 980, 8 3170 and 1390, 16 4210 and 2400, bfloat16 1010 and 460, 1800 and 660, 2260 and 1180; from L3 591
// and 556, 1412 and 1054, 2910 and 2120, 368 and 400, 656 and 619, 1504 and 1264.
// Zen 3, AVX2, dense torch's time over ours, by rows and by tiles that are fetched 8 rows ahead, from L3: one thread,
// 768 x 512, 12 .75 and 1.1, 16 .67 and 1.0, two threads .72 and 1.5, .72 and 1.1; 2048 x 768, one thread, 6 1.6 and
// 1.1, 8 1.1 and 1.0. Within 1 MB, fetched 2 and 8 rows ahead, 512 x 512 and 1024 x 256: 8 1.0 and 1.05, 1.0 and 1.1,
// 12 .98 and 1.1, .94 and 1.1. More rows of input by rows and by the GEMM: 2048 x 768, 24 .90 and 1.0, two threads .98
// and 1.2, 16 1.04 and .99, 1.0 and 1.3; from memory, 4096 x 2048, 24 1.04 and 1.1, 1.7 and 1.7, 16 1.3 and 1.1, 2.4
// and 1.9.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int64_t kDownBytesFar = int64_t{2} << 20;
constexpr int64_t kSmallRowsFar = 16, kSmallRowsFarConverted = 20;
#else
constexpr int64_t kDownBytesFar = int64_t{1280} << 10;
constexpr int64_t kSmallRowsFar = 24, kSmallRowsFarConverted = 20;
#endif
// Columns and bytes of a weight of floats up to which kShortTile rows of input, or fewer, go by tiles too. AVX2, one
// thread, us, by rows and by tiles: 1, 1024 x 64 3.3 and 2.1, 1024 x 256 11.7 and 9.6, 1024 x 512 25 and 22 (another
// time 21), 1024 x 1024 41 and 54; 2, 1024 x 512 30 and 28.
constexpr int64_t kShortTile = 2;
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int64_t kDownShort = 512, kDownShortBytes = int64_t{2} << 20;
#else
constexpr int64_t kDownShort = 0, kDownShortBytes = 0;
#endif
constexpr int64_t kDownColumns = 32, kDownColumnsConverted = 512;  // at least; the first, of each thread
// How far ahead of itself the weight is fetched, in the order in which it is used; it stays in L1 until then. Fetched
// 128 KB ahead in the order of memory, into L2, one row of input takes 1.3 times as long.
constexpr int64_t kSmallAhead = int64_t{12} << 10;
// Bytes of the weight that a call of a kernel for few rows takes, at least.
constexpr int64_t kSmallStep = int64_t{8} << 10;
// From memory (Reading in gemv.h), 4096 -> 4096, float32, two threads, 47 GB/s, ms: up to kMostByRow rows of input go
// by rows (of one chunk: into 11008 columns 5.25 to 5.6), fetched so many bytes ahead: 2 rows forward 1.71 to 1.38,
// grad_input 1.69 to 1.44, bfloat16 forward 0.83 to 0.66. Forward of more waits for steps of so many bytes, in chunks
// whose operands have so many floats and in blocks of kWaitingRows: 4 rows 1.73 to 1.57, 8 rows 1.71 to 1.62; bfloat16
// 4 rows 0.88 to 0.77, 16 rows 1.00 to 0.94; float32 of two tiles loses (16 rows 1.78 to 1.88).
#if defined(__AVX512F__)
constexpr int64_t kMostByRow = 2;
constexpr bool kWaits = true;
#else
constexpr int64_t kMostByRow = 1;
constexpr bool kWaits = false;
#endif
constexpr int64_t kRowAhead = int64_t{4} << 10, kWaitingStep = int64_t{16} << 10;
constexpr int64_t kWaitingFloats = 4096, kLeastWaiting = 512, kMostWaiting = 1024, kWaitingRows = 24;
// A weight of more bytes than this comes from memory and not from the caches.
constexpr int64_t kCachedBytes = int64_t{16} << 20;
// Where the CPU fetches into L2 (fetches_into_l2): bytes beyond which a weight does not stay there; the most rows of
// input of forward, and, of operands, of grad_input; rows of the weight that a single row of input takes at once, bytes
// of each in a chunk, and how far ahead it is fetched. Zen 4, one thread, times dense torch, into L1 and into L2,
// float32, 4096 x 4096: 1 row forward .81 and 1.27, grad_input .60 and 1.08, 2 1.33 and 2.39, 1.00 and 1.56, 4 1.49 and
// 2.17, 1.66 and 1.99, 8 1.63 and 2.01, 1.77 and 1.59; bfloat16 1.40 and 1.86, 2.00 and 2.87, 2 1.04 and 1.53, 8 1.12
// and 1.50, 1.58 and 1.88, 16 1.20 and 1.09. Within L2, 512 x 512, 1.76 and 1.51. One row of the weight at a time 1.08
// and .88; 16 and 64 KB ahead the same. Packed, at 50%, us, not fetched at all and into L2: float32 forward 1 row 2670
// and 1980, 4 4050 and 3550, 12 6500 and 6250, grad_input 2890 and 2350, 3780 and 3070; bfloat16 1540 and 840, 2050 and
// 1490, 4110 and 3700, 1420 and 1000, 2480 and 2140; Zen 3, AVX2, 8192 x 768, 1 row 1730 and 1040, 1730 and 1060, 8
// 5030 and 3490, 5050 and 4030, bfloat16 1 930 and 850, 1080 and 860.
//
// On AVX2 (Zen 3, whose L2 has 512 KB) that is no faster than into L1. But a single row of input over rows of floats so
// long that the hardware fetches them by itself, which masked loads do not make it do, is read plainly, one thread, us,
// fetched into L1 and plainly: forward 128 x 1024 16.1 and 13.7, 128 x 2048 30.6 and 24.4, 768 x 3072 273 and 193,
// grad_input 293 and 216, 4096 x 4096 5490 and 4020, 5670 and 4140 (dense torch takes about as long); two threads,
// grad_input by chunks and by rows, 768 x 3072 169 and 127. Fewer columns want the prefetches: 16384 x 512 2140 and
// 3310. From memory, six rows at once take .95 of the time of four.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kFarPlain = true;
constexpr int64_t kFarBytes = int64_t{256} << 10, kFarColumns = 1024, kFarRowBytes = int64_t{64} << 10;
constexpr int64_t kMostFar = 1, kMostFarSums = 1;
constexpr int kFarRows = 6;
#else
constexpr bool kFarPlain = false;
constexpr int64_t kFarBytes = int64_t{2} << 20, kFarColumns = 0, kFarRowBytes = int64_t{8} << 10;
constexpr int64_t kMostFar = 8, kMostFarSums = 6;
#if defined(__AVX512F__)
constexpr int kFarRows = 8;
#else
constexpr int kFarRows = 4;
#endif
#endif
constexpr int64_t kFarAhead = int64_t{32} << 10, kFarValuesBytes = int64_t{2} << 20;
// Elements of a weight per task, at least, and tasks a thread.
constexpr int64_t kSmallGrain = int64_t{1} << 14, kSmallTasks = 8;
// How far the passes over a row of remaining weights prefetch.
constexpr int64_t kBytesAhead = 2048;
// The least rows of the weight for which a thread has sums of grad_input of its own; and where they are expanded.
constexpr int64_t kLeastPartRows = 64, kLeastExpandedRows = 16;
// Up to so many steps, of one row of input or of two, grad_weight is written row by row. AVX2, one thread, us, by tiles
// and by rows: 4, 512 x 512 41 and 24, 8 55 and 44; 4, 1024 x 64 9.9 and 7.2, 8 13.3 and 13.2; without AVX2 8, 512 x
// 512 133 and 104. Fewer where a sum is rounded in many instructions (AVX2, one thread, bfloat16, 6, 512 x 512, 64 us
// by row, 57 by tiles; float16 34 and 45), or where two vectors are stored at once: bfloat16, 4, 4096 -> 4096, 1.05 ms
// by row, 0.63 by tiles, 1024 -> 1024 29 and 24 us.
#if defined(__AVX512F__)
constexpr int kOuterByRow = 3, kOuterByRowRounded = 3, kOuterByRowStoresTwo = 1;
constexpr int kOuterRows = 4, kOuterVectors = 4;
#else
constexpr int kOuterByRow = 8, kOuterByRowRounded = 3, kOuterByRowStoresTwo = 1;
constexpr int kOuterRows = 4, kOuterVectors = 2;
#endif
constexpr int64_t kShortOuterRow = 256;  // columns; see outer_rows

// Elements per task of the passes over a mask or a weight (64 KB of floats: several tasks a thread, little overhead).
constexpr int64_t kPassGrain = int64_t{1} << 14;

// Bytes by which a pass over memory runs ahead of itself: compressing 67 MB takes 1.4 ms with it and 3.3 ms without.
constexpr int64_t kStreamAhead = 8192;

// Packed weights with many values: bytes of a piece that is laid out densely, to stay in L2, for few rows of input and
// for many; the pieces for each thread, at least; and how many rows ahead a part of a row is fetched. bfloat16 at 50%,
// 2 threads, us: 128, 768 -> 3072 713 with 384 KB, 750 with 512; 1, 4096 -> 4096 458 and 534 with 256 and 512 KB; its
// grad_input 2485 without fetching, 1740 with it.
constexpr int64_t kFewRowsPiece = int64_t{256} << 10, kPiece = int64_t{384} << 10, kPiecesPerThread = 3;
constexpr int64_t kPiecesAhead = 6;
// Rows of input up to which it is expanded in registers instead, forward and grad_input; unless, of 16 bits, its rows
// have so few columns for each row of input. 3072 x 768 at 75%, one thread, us, by pieces and in registers, forward: 1,
// float32 293 and 133, bfloat16 161 and 72, 8 629 and 423, 340 and 242, 16 1109 and 897, 580 and 484; grad_input: 1 474
// and 139, 285 and 109, 8 686 and 449, 389 and 267, 16 1066 and 900, 606 and 531, float16 918 and 978. 16, 64 -> 1024
// bfloat16 20 and 35, 8 14.8 and 17.8, 4 12.7 and 10.4. AVX2, float32 at 25%, 24 2320 and 1457.
#if defined(__AVX512F__)
constexpr int64_t kExpandedRows = 16, kExpandedGradRows = 16, kExpandedGradRowsConverted = 12;
constexpr int64_t kExpandedShortRows = 12;
#else
constexpr int64_t kExpandedRows = 24, kExpandedGradRows = 16, kExpandedGradRowsConverted = 16;
constexpr int64_t kExpandedShortRows = 4;
#endif
// grad_input goes by rows, up to so many rows of input, or by tiles (packed_gemv_grad_input.cpp). 3072 x 768 at 75%,
// one thread, us, by rows and by tiles: 4, float32 275 and 261, 8 477 and 449, bfloat16 2 124 and 127, 8 284 and 267;
// two threads, few rows of the weight, 16 x 4096, 4 12.9 and 6.2; AVX2, 4, at 25%, 285 and 359.
#if defined(__AVX512F__)
constexpr int64_t kExpandedByRow = 3;
#else
constexpr int64_t kExpandedByRow = kExpandedGradRows;
#endif
// Steps, as of kOuterByRow, up to which grad_weight of a packed weight is compressed in registers, of floats and of 16
// bits, and up to which row by row; and rows of a tile. At 50%, one thread, us, by way of a dense piece and so: AVX2,
// float32, 1, 512 x 512 44.8 and 21.7, 768 x 3072 432 and 217; 8, 512 x 512 82 and 64, 2048 x 128 88 and 71; 12, 768 x
// 3072 1619 and 834; 24, 2048 x 64 89 and 80; tiles of four rows 12, 2048 x 128 139, of six 103. float16, 768 x 768, 1
// 103 and 45, 16 286 and 243. AVX-512, float32, 8, 512 x 512 75 and 53, 16, 768 x 3072 1698 and 1204; float16, 1, 768 x
// 768 62 and 96, 8, 2048 x 128 62 and 58.
//
// And where two vectors of 16 bits are compressed at once. bfloat16, 50%, 2, 1024 x 3072 467 and 208, 4, 768 x 768 71
// and 38, 12, 1024 x 3072 728 and 535, 32, 512 x 512 101 and 87; float16, 4, 512 x 512 46 and 29, 8, 1024 x 3072 1010
// and 743, 32 2531 and 2260, 48 3361 and 3327. Row by row only where the operands of all steps, so many floats, stay in
// L1 (8, 1024 x 3072 1247, by tiles 743), and by tiles only where a row has so many values that what its last stores
// have to put back is little (24, 2048 x 128 at 20%, bfloat16, 84 and 102; at 50% 84 and 78).
#if defined(__AVX512F__)
constexpr int kCompressedSteps = 16, kCompressedSteps16 = 0, kCompressedByRow = 8, kCompressedRows = 4;
#elif defined(__AVX2__)
constexpr int kCompressedSteps = 24, kCompressedSteps16 = 24, kCompressedByRow = 8, kCompressedRows = 6;
#else
constexpr int kCompressedSteps = 0, kCompressedSteps16 = 0, kCompressedByRow = 3, kCompressedRows = 4;
#endif
constexpr int kCompressedStepsTwo = 32;
constexpr int64_t kCompressedByRowFloats = 6144, kCompressedRowValues = 48;
// Bytes of a weight that is one piece: 128, 1024 -> 1024 337, 365 and 313 us by pieces, 306, 308 and 307 whole.
constexpr int64_t kWholeWeight = int64_t{2} << 20;

// Sparse kernels. A block of packed input, columns x lanes of a tile, takes at most this many floats (32 KB: two thirds
// of L1d, the rest is for what streams by).
constexpr int64_t kBlockFloats = 8192;
constexpr int kMaxVectors = 8;  // of a tile

// Vectors of a tile that are taken at a time for a block of four rows: their sums stay in registers.
#if defined(__AVX512F__)
constexpr int kBlockVectors = 4;
#else
constexpr int kBlockVectors = 2;
#endif

// How far beyond a row's values in a block they are fetched: no line between is left out with up to 16 of them, and it
// is a block ahead at least. Into L1: fetched into L2 only, half of them never came, and 128, 4096 -> 4096 at 90% took
// 3.9 ms after another layer's product (1.6 from caches, 1.95 now).
constexpr int64_t kValuesAhead = 28;
// Values from which on each panel's first are touched before it begins: more than L2 keeps. The same layer 2.15
// to 1.95.
constexpr int64_t kManyValues = int64_t{1} << 18;

// With fewer entries in a block than this, on the average, a row's sums are the greater traffic.
constexpr int64_t kFewEntries = 8;

// Rows of a panel, and the floats of its part of the output that stay in L2 while the blocks pass (256 KB).
constexpr int64_t kPanelRows = 512, kPanelFloats = 65536;
// Transposed and dense, fewer: what a tile gathers its values from is to fit L1 (at 50% and M = 512, 8% faster).
constexpr int64_t transposed_panel_rows(int64_t block_cols) { return block_cols == 64 ? 256 : kPanelRows; }
// Below this many rows, the runs of equal rows get too short.
constexpr int64_t kMinPanelRows = 64;
constexpr int64_t kTasksPerThread = 2;

// Packed input of all lanes that are taken at a time, at least one tile: little, for it to stay in the caches, unless
// the entries are many, which go by once for each time. At 90%, SDDMM of 2048, 3072 x 1024 takes 6.6 ms with 4 MB
// and 9.2 with 16, of 512, 4096 x 4096 14.2 and 12.4.
constexpr int64_t kPackedBytes = int64_t{4} << 20, kMostPackedBytes = int64_t{16} << 20;
constexpr int64_t kPackedBytesPerEntry = 8;
// Elements of packed input for each entry, from which on spmm's threads take rows of their own. Two near threads, at
// 90%, own rows and own panels: 128, 768 -> 768 63 and 70 us, 3072 -> 768 241 and 251, 768 -> 3072 253 and 251;
// gathered, 256, 3072 -> 768 (3.3) 522 and 524, 128 (1.7) 297 and 276. The same with more input than is packed at a
// time: gathered, 512, 3072 -> 768 at 50% 3.67 and 4.12 ms.
constexpr int64_t kPackedPerEntry = 1, kPackedPerGathered = 3;
// Where they do, and this times the rows of input are those of the weight, the weight is compressed in a pass of its
// own, and not panel by panel for threads that all pack. Two near threads, at 90%, us: 1024, 256 -> 128 72 to 54; 256,
// 3072
// -> 768 702 to 648; 256, 1024 -> 1024 296 and 296, 128, 768 -> 768 100 and 107.
constexpr int64_t kPackedPerWeight = 3;

// Convolution: vectors that packing prefetches ahead of itself.
constexpr int64_t kVectorsAhead = 128;
// Columns of a block where taps share what is packed: on one thread, 512 channels of 7 x 7 take 1.42 ms at 90% with
// 126, 1.37 with 189 and with 252; 0.98, 0.91 and 0.86 at 95%.
constexpr int64_t banded_block_cols(int64_t block_cols) { return block_cols == 64 ? 128 : 256; }
// Columns of a block beyond which strips are narrow, if their vectors are no rows: at 95%, 1024 -> 256 channels of 14 x
// 14 take 0.35 ms, wide 0.39, contiguous 0.43 and 0.45; 512 -> 2048 of 7 x 7, batch 32, 1.27 and 1.36. And with few
// products: at 90%, channels last, 256 -> 64 of 56 x 56 0.84 and 1.03, 512 -> 128 of 28 x 28 0.52 and 0.56.
constexpr int64_t kMostWideColumns = 128, kFewWideColumns = 64;
// Rows of a panel of a convolution that are not split for the sake of more tasks: 512 channels of 7 x 7, from 64 rows
// to 512, take 0.87 of the time.
constexpr int64_t kConvPanelRows = 128;
// Products that an element of the images has with one tap, below which the next strip's lines are fetched ahead.
// Channels last at 90%: 256 -> 64 channels of 56 x 56 (6 products) 1.52 to 0.97 ms, 64 -> 256 1.33 to 0.93; 1024 -> 256
// of 14 x 14 (26) 0.40 to 0.43, 512 -> 2048 of 7 x 7 (51) 0.38 to 0.41.
constexpr int64_t kFewProducts = 16;
// Bytes of results, each computed in one go, from which on they go past the caches: more than L3 keeps for their
// reader. 64 -> 256 channels of 56 x 56 at 90%, whose operands are in no cache, in brackets with a pass over the
// results (ms): batch 8 (26 MB) 0.80 to 0.60 (1.50 to 1.37), batch 16 1.66 to 1.22 (3.1 to 2.7); batch 4 0.42 to 0.31
// (0.67 to 0.71).
constexpr int64_t kStreamedBytes = int64_t{24} << 20;
// grad_weight of 16 bits: operands of a sum from which on. 4096 x 4096, in brackets without, ms: bfloat16, 128 rows 4.4
// (4.6), 64 2.4 (2.35), 32 1.6 (1.4); float32 8.9 (9.3), 4.4 (4.7), 2.35 (2.65).
constexpr int64_t kStreamedDepth16 = 64;
// The same for strips, whose sums wait in L2. With a pass over the results, at 90% (ms): 64 -> 64 channels of 128 x
// 128, batch 8 (34 MB), 3 x 3, 10.3 to 8.6 contiguous, 8.4 to 8.2 channels last; 3 -> 64 of 224 x 224, 7 x 7, stride 2
// (26 MB) 2.1 to 2.4 and 1.9 to 2.0.
constexpr int64_t kStreamedStripBytes = int64_t{32} << 20;
// The tasks a thread that strips are made into.
constexpr int64_t kStripTasks = 8;
// The most that partial results of grad_weight take, all threads together.
constexpr int64_t kPartialBytes = int64_t{32} << 20;

// Convolutions of one tap on planes: depth of a block of columns, which is to fit L1 (24 KB); positions whose products
// are summed in registers before lanes are, and bytes of a block of planes that stays in L2 meanwhile.
constexpr int64_t kPlaneDepth = 128, kPlaneChunk = 800, kPlaneBytes = int64_t{448} << 10;

// Depthwise convolution: results of a tile, as many as leave registers for the weights of a run; the tasks a thread.
#if defined(__AVX512F__)
constexpr int kDepthwiseTile = 14;
#else
constexpr int kDepthwiseTile = 8;
#endif
constexpr int64_t kDepthwiseTasks = 4;
// Of 3 x 3: vectors of a row that is read once. Wider planes go by tiles: of 112 x 112, one takes 1.6 us, and 2.7 in
// strips of four vectors from top to bottom.
constexpr int kRowVectors = 4;
// Floats of images from which on they are prefetched. Contiguous: 144 channels of 56 x 56, batch 8, forward 1.7 ms
// without and 0.9 with it; 256 of 28 x 28 2.1 times as fast as torch with it and 1.9 without; 512 of 14 x 14 105 us
// without and 115. Channels last: 144 channels of 56 x 56, batch 32, grad_weight 19.2 ms without and 9.1 with it.
constexpr int64_t kManyFloats = int64_t{1} << 20;
// Floats of a plane, source and result, from which on it is read in the order of memory.
constexpr int64_t kLargePlane = 2048;

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY::tuning
