// csrc/cuda/api.h in plain C++ on the CPU's memory, after its comments and not after the kernels: quick enough to run
// the whole suite on. It checks what callers must keep (alignment, null pointers, the stream's device), counts calls,
// and fails when it is told to. Fragments and indices, whose order is the kernels' own affair, are kept as plain bits.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/api.h"

using namespace masked_ops::cuda;

namespace {

std::mutex mutex;
std::string failing;
int failure = 0;
std::map<std::string, int> calls;

// What the function is to return at once; -2 to go on.
constexpr int kGoOn = -2;
int enter(const char* name) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++calls[name];
  return failing == name && failure ? failure : kGoOn;
}
// Whether the function is to spoil its result.
bool wrong(const char* name) {
  const std::lock_guard<std::mutex> lock(mutex);
  return failing == name && !failure;
}
#define ENTER(name) \
  if (const int status = enter(name); status != kGoOn) return status

constexpr int kSizes[] = {1, 1, 2, 4, 8, 2, 2, 4, 8};

float bf16_to_float(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
uint16_t float_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) return 0x7fc0;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
double load(int dtype, const void* p, int64_t i) {
  switch (dtype) {
    case kByte:
      return static_cast<const uint8_t*>(p)[i];
    case kInt8:
      return static_cast<const int8_t*>(p)[i];
    case kInt16:
      return static_cast<const int16_t*>(p)[i];
    case kInt32:
      return static_cast<const int32_t*>(p)[i];
    case kInt64:
      return double(static_cast<const int64_t*>(p)[i]);
    case kHalf:
      return static_cast<const _Float16*>(p)[i];
    case kBFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(p)[i]);
    case kFloat:
      return static_cast<const float*>(p)[i];
    default:
      return static_cast<const double*>(p)[i];
  }
}
void store(int dtype, void* p, int64_t i, float x) {
  if (dtype == kHalf) static_cast<_Float16*>(p)[i] = _Float16(x);
  if (dtype == kBFloat16) static_cast<uint16_t*>(p)[i] = float_to_bf16(x);
  if (dtype == kFloat) static_cast<float*>(p)[i] = x;
}

bool bit(const uint64_t* words, int64_t cols, int64_t row, int64_t col) {
  return words[row * words_per_row(cols) + col / 64] >> (col % 64) & 1;
}

template <typename Keep>
void pack(int64_t rows, int64_t cols, uint64_t* words, uint64_t* live_cols, MaskFacts* facts, const Keep& keep) {
  if (rows == 0 || cols == 0) return;
  const int64_t per_row = words_per_row(cols);
  std::memset(words, 0, size_t(rows * per_row) * 8);
  std::memset(live_cols, 0, size_t(per_row) * 8);
  *facts = {};
  for (int64_t r = 0; r < rows; ++r) {
    bool live = false;
    for (int64_t c = 0; c < cols; ++c) {
      if (!keep(r, c)) continue;
      words[r * per_row + c / 64] |= uint64_t(1) << (c % 64);
      facts->live_cols += !(live_cols[c / 64] >> (c % 64) & 1);
      live_cols[c / 64] |= uint64_t(1) << (c % 64);
      ++facts->nnz;
      live = true;
    }
    facts->live_rows += live;
  }
}

// visit(piece, row, col) for all places of a weight in pieces of so many rows and columns.
template <int kRows, int kColumns, typename Visit>
void for_pieces(int64_t N, int64_t K, const int32_t* order, const Visit& visit) {
  const int64_t segments = (K + kColumns - 1) / kColumns;
  for (int64_t i = 0; i < (N + kRows - 1) / kRows * kRows; ++i) {
    for (int64_t c = 0; c < K && order[i] >= 0; ++c) visit(i / kRows * segments + c / kColumns, order[i], c);
  }
}

// A piece has a value for each of its weights, and its place in the piece, 16 bits each, in the order of its rows.
template <int kRows, int kColumns, typename Piece>
void fill_pieces(const uint64_t* words, int64_t N, int64_t K, const int64_t* offsets, const int32_t* order,
                 const Piece* pieces, const void* values, void* data) {
  const int64_t segments = (K + kColumns - 1) / kColumns;
  std::vector<int64_t> at(size_t(N), 0), used(size_t((N + kRows - 1) / kRows * segments), 0);
  for_pieces<kRows, kColumns>(N, K, order, [&](int64_t piece, int64_t row, int64_t col) {
    if (!bit(words, K, row, col)) return;
    auto* to = reinterpret_cast<uint16_t*>(static_cast<char*>(data) + pieces[piece].at * 256) + 2 * used[piece]++;
    const int32_t* const rows = order + piece / segments * kRows;
    to[0] = static_cast<const uint16_t*>(values)[offsets[row] + at[row]++];
    to[1] = uint16_t((std::find(rows, rows + kRows, row) - rows) * kColumns + col % kColumns);
  });
}

template <int kRows, int kColumns, typename Piece, typename Count>
void decode_pieces(int dtype, int64_t M, int64_t N, int64_t K, const void* input, const int32_t* order,
                   const Piece* pieces, const Count& count, const void* data, const void* bias, void* output,
                   double off) {
  std::vector<double> sums(size_t(M * N), 0);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) sums[m * N + n] = bias ? load(dtype, bias, n) : 0;
  }
  const int64_t segments = (K + kColumns - 1) / kColumns;
  for (int64_t piece = 0; piece < (N + kRows - 1) / kRows * segments; ++piece) {
    const auto* from = reinterpret_cast<const uint16_t*>(static_cast<const char*>(data) + pieces[piece].at * 256);
    for (uint32_t i = 0; i < count(pieces[piece]); ++i, from += 2) {
      const int64_t n = order[piece / segments * kRows + from[1] / kColumns];
      const int64_t k = piece % segments * kColumns + from[1] % kColumns;
      for (int64_t m = 0; m < M; ++m) sums[m * N + n] += load(dtype, from, 0) * load(dtype, input, m * K + k);
    }
  }
  for (int64_t i = 0; i < M * N; ++i) store(dtype, output, i, sums[i] + off);
}

std::vector<float> floats(int dtype, const void* p, int64_t n) {
  std::vector<float> all(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) all[size_t(i)] = float(load(dtype, p, i));
  return all;
}

bool unaligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 != 0; }

int gemm(const char* name, const Gemm& g) {
  ENTER(name);
  if (g.dtype != kHalf && g.dtype != kBFloat16) return kUnsupported;
  if (g.K % 8 || (g.mode != kForward && g.N % 8)) return kUnsupported;
  const bool of_weight = g.mode == kGradWeight, of_input = g.mode == kGradInput;
  const void* const input = of_input ? g.grad_output : g.input;
  if (unaligned(input) || unaligned(of_weight ? g.grad_output : g.weight) || unaligned(g.output)) return kUnsupported;
  if (g.output_dtype != g.dtype && !(of_weight && g.output_dtype == kFloat)) return kUnsupported;
  // Rows of the first by rows of the second, summed over `depth` of both: the order of the sums is that of the depth.
  const auto product = [&](int64_t rows, int64_t cols, int64_t depth, const auto& first, const auto& second) {
    std::vector<float> sums(size_t(rows * cols), float(wrong(name)));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < depth; ++d) {
        const float x = first(r, d), *const y = second + d * cols;
        float* const to = &sums[size_t(r * cols)];
        for (int64_t c = 0; c < cols; ++c) to[c] += x * y[c];
      }
    }
    return sums;
  };
  if (of_weight) {
    const std::vector<float> dy = floats(g.dtype, g.grad_output, g.M * g.N), x = floats(g.dtype, g.input, g.M * g.K);
    const auto sums = product(g.N, g.K, g.M, [&](int64_t n, int64_t m) { return dy[size_t(m * g.N + n)]; }, x.data());
    for (int64_t i = 0; i < g.N * g.K; ++i) {
      store(g.output_dtype, g.output, i, bit(g.words, g.K, i / g.K, i % g.K) ? sums[size_t(i)] : 0);
    }
    return 0;
  }
  if (unaligned(g.fragments)) return kUnsupported;
  const auto* words = reinterpret_cast<const uint64_t*>(g.fragments + 2);
  if (int(g.fragments[0]) != of_input) return 1;  // fragments of the other orientation
  const int64_t cols = of_input ? g.K : g.N, depth = of_input ? g.N : g.K;
  const std::vector<float> x = floats(g.dtype, input, g.M * depth), all = floats(g.dtype, g.weight, g.N * g.K);
  std::vector<float> masked(all.size(), 0);  // [depth][cols]
  for (int64_t n = 0; n < g.N; ++n) {
    for (int64_t k = 0; k < g.K; ++k) {
      if (bit(words, g.K, n, k)) masked[size_t(of_input ? n * g.K + k : k * g.N + n)] = all[size_t(n * g.K + k)];
    }
  }
  const auto sums =
      product(g.M, cols, depth, [&](int64_t m, int64_t d) { return x[size_t(m * depth + d)]; }, masked.data());
  for (int64_t i = 0; i < g.M * cols; ++i) {
    store(g.dtype, g.output, i, sums[size_t(i)] + (g.bias ? float(load(g.dtype, g.bias, i % cols)) : 0.0f));
  }
  return 0;
}

}  // namespace

extern "C" {

void fake_fail(const char* name, int error) {
  const std::lock_guard<std::mutex> lock(mutex);
  failing = name;
  failure = error;
}
int fake_calls(const char* name) {
  const std::lock_guard<std::mutex> lock(mutex);
  return calls[name];
}

int masked_ops_cuda_device_facts(int device, DeviceFacts* facts) {
  ENTER("device_facts");
  *facts = {device == 0 ? 9 : 8, 0, 132, 60 << 20, device == 0 ? 227 << 10 : 163 << 10};
  return 0;
}
const char* masked_ops_cuda_error_string(int error) { return error == 2 ? "out of memory" : "a launch failed"; }

int masked_ops_cuda_pack_mask(int dtype, const void* mask, int64_t rows, int64_t cols, uint64_t* words,
                              uint64_t* live_cols, MaskFacts* facts, void*) {
  ENTER("pack_mask");
  pack(rows, cols, words, live_cols, facts, [&](int64_t r, int64_t c) {
    const double x = load(dtype, mask, r * cols + c);
    if (x != 0 && x != 1) facts->soft = 1;
    return x != 0;
  });
  return 0;
}
int masked_ops_cuda_pack_bits(const uint8_t* bits, int64_t rows, int64_t cols, uint64_t* words, uint64_t* live_cols,
                              MaskFacts* facts, void*) {
  ENTER("pack_bits");
  const int64_t bytes = (cols + 7) / 8;
  pack(rows, cols, words, live_cols, facts,
       [&](int64_t r, int64_t c) { return bits[r * bytes + c / 8] >> (c % 8) & 1; });
  for (int64_t r = 0; r < rows && cols % 8; ++r) facts->stray |= bits[r * bytes + bytes - 1] >> (cols % 8);
  return 0;
}
int masked_ops_cuda_row_offsets(const uint64_t* words, int64_t rows, int64_t cols, int64_t* offsets, void*) {
  ENTER("row_offsets");
  offsets[0] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    offsets[r + 1] = offsets[r];
    for (int64_t c = 0; c < cols; ++c) offsets[r + 1] += bit(words, cols, r, c);
  }
  return 0;
}
int masked_ops_cuda_mask_copy(int kind, const MaskCopyTask* tasks, int64_t count, void*) {
  ENTER("mask_copy");
  if (kind < 0 || kind > kHalfToFloat) return kUnsupported;
  constexpr Dtype kFrom[] = {kFloat, kFloat, kBFloat16, kHalf}, kTo[] = {kBFloat16, kHalf, kFloat, kFloat};
  const bool casts = kind > kCopy16;
  const int from_dtype = casts ? kFrom[kind - kFloatToBFloat16] : 0,
            to_dtype = casts ? kTo[kind - kFloatToBFloat16] : 0;
  const int64_t size = casts ? kSizes[from_dtype] : int64_t(1) << kind, to_size = casts ? kSizes[to_dtype] : size;
  for (int64_t i = 0; i < count; ++i) {
    const MaskCopyTask& t = tasks[i];
    const auto* from = static_cast<const char*>(t.weight);
    auto* to = static_cast<char*>(t.out);
    for (int64_t r = 0; r < t.rows; ++r) {
      for (int64_t c = 0; c < t.cols; ++c, from += size, to += to_size) {
        if (!bit(t.words, t.cols, r, c) || wrong("mask_copy")) {
          std::memset(to, 0, size_t(to_size));
        } else if (casts) {
          store(to_dtype, to, 0, load(from_dtype, from, 0));
        } else {
          std::memmove(to, from, size_t(size));
        }
      }
    }
  }
  return 0;
}
int masked_ops_cuda_compress(int size, const uint64_t* words, int64_t rows, int64_t cols, const int64_t* offsets,
                             const void* dense, void* values, void*) {
  ENTER("compress");
  for (int64_t r = 0; r < rows; ++r) {
    int64_t at = offsets[r];
    for (int64_t c = 0; c < cols; ++c) {
      const char* from = static_cast<const char*>(dense) + (r * cols + c) * size;
      if (bit(words, cols, r, c)) std::memcpy(static_cast<char*>(values) + at++ * size, from, size_t(size));
    }
  }
  return 0;
}
int masked_ops_cuda_expand(int size, const uint64_t* words, int64_t rows, int64_t cols, const int64_t* offsets,
                           const void* values, void* dense, void*) {
  ENTER("expand");
  for (int64_t r = 0; r < rows; ++r) {
    int64_t at = offsets[r];
    for (int64_t c = 0; c < cols; ++c) {
      char* to = static_cast<char*>(dense) + (r * cols + c) * size;
      if (bit(words, cols, r, c)) {
        std::memcpy(to, static_cast<const char*>(values) + at++ * size, size_t(size));
      } else {
        std::memset(to, 0, size_t(size));
      }
    }
  }
  return 0;
}

// The index: where each row begins, then the column of each value.
size_t masked_ops_cuda_decode_index_bytes(int64_t N, int64_t, int64_t nnz) { return size_t(N + 1 + nnz) * 8; }
int masked_ops_cuda_decode_index(const uint64_t* words, int64_t N, int64_t K, int64_t, const int64_t* offsets,
                                 void* index, void*) {
  ENTER("decode_index");
  auto* out = static_cast<int64_t*>(index);
  std::memcpy(out, offsets, size_t(N + 1) * 8);
  out += N + 1;
  for (int64_t r = 0; r < N; ++r) {
    for (int64_t c = 0; c < K; ++c) {
      if (bit(words, K, r, c)) *out++ = c;
    }
  }
  return 0;
}
size_t masked_ops_cuda_decode_workspace(int, int64_t M, int64_t N, int64_t) { return size_t(M * N) * 4; }
int masked_ops_cuda_decode(int dtype, int64_t M, int64_t N, int64_t K, int64_t, const void* input, const void* values,
                           const void* index, const void* bias, void* output, void* workspace, void*) {
  ENTER("decode");
  if (M > 64 || unaligned(input) || unaligned(values) || unaligned(index)) return kUnsupported;
  if (!workspace) return 1;
  const auto* offsets = static_cast<const int64_t*>(index);
  const int64_t* cols = offsets + N + 1;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      float sum = bias ? float(load(dtype, bias, n)) : 0.0f;
      for (int64_t i = offsets[n]; i < offsets[n + 1]; ++i) {
        sum += float(load(dtype, input, m * K + cols[i])) * float(load(dtype, values, i));
      }
      store(dtype, output, m * N + n, sum + wrong("decode"));
    }
  }
  return 0;
}

// Slices: a piece is half as long as if it were all strict steps, if that is enough.
int masked_ops_cuda_slice(const uint64_t* words, int64_t N, int64_t K, const int32_t* order, SlicedPiece* pieces,
                          void*) {
  ENTER("slice");
  uint32_t lanes[32];
  for_pieces<8, 8192>(N, K, order, [&](int64_t number, int64_t row, int64_t col) {
    if (col % 8192 == 0) std::fill(lanes, lanes + 32, 0);
    SlicedPiece& piece = pieces[number];
    if (!bit(words, K, row, col)) return;
    ++piece.strict;
    piece.size = std::max({piece.size, 3 * ++lanes[col % 32] / 2, (piece.strict * 4 + 255) / 256});
  });
  return 0;
}
int masked_ops_cuda_fill_slices(const uint64_t* words, int64_t N, int64_t K, const int64_t* offsets,
                                const int32_t* order, const SlicedPiece* pieces, const void* values, void* data,
                                void*) {
  ENTER("fill_slices");
  fill_pieces<8, 8192>(words, N, K, offsets, order, pieces, values, data);
  return 0;
}
int masked_ops_cuda_decode_sliced(int dtype, int64_t M, int64_t N, int64_t K, const void* input, const int32_t* order,
                                  const SlicedPiece* pieces, const void* data, const void* bias, void* output, void*) {
  ENTER("decode_sliced");
  if (M > kMostSlicedRows || K % 2 || unaligned(input) || unaligned(data)) return kUnsupported;
  const auto count = [](const SlicedPiece& piece) { return piece.strict; };
  decode_pieces<8, 8192>(dtype, M, N, K, input, order, pieces, count, data, bias, output, wrong("decode_sliced"));
  return 0;
}

// Gathered columns: the same, but that a piece is as long as what is in it.
int masked_ops_cuda_gather(const uint64_t* words, int64_t N, int64_t K, const int32_t* order, GatheredPiece* pieces,
                           void*) {
  ENTER("gather");
  for_pieces<16, 4096>(N, K, order, [&](int64_t number, int64_t row, int64_t col) {
    GatheredPiece& piece = pieces[number];
    if (bit(words, K, row, col)) piece.size = (++piece.batches * 4 + 255) / 256;
  });
  return 0;
}
int masked_ops_cuda_fill_gathered(const uint64_t* words, int64_t N, int64_t K, const int64_t* offsets,
                                  const int32_t* order, const GatheredPiece* pieces, const void* values, void* data,
                                  void*) {
  ENTER("fill_gathered");
  fill_pieces<16, 4096>(words, N, K, offsets, order, pieces, values, data);
  return 0;
}
int masked_ops_cuda_decode_gathered(int dtype, int64_t M, int64_t N, int64_t K, const void* input, const int32_t* order,
                                    const GatheredPiece* pieces, const void* data, const void* bias, void* output,
                                    void*) {
  ENTER("decode_gathered");
  if (M > 64 || K % 8 || unaligned(input) || unaligned(data)) return kUnsupported;
  const auto count = [](const GatheredPiece& piece) { return piece.batches; };
  decode_pieces<16, 4096>(dtype, M, N, K, input, order, pieces, count, data, bias, output, wrong("decode_gathered"));
  return 0;
}

// Fragments: the orientation, then the bits as they were.
size_t masked_ops_cuda_fragments_bytes(int64_t N, int64_t K, int) { return 8 + size_t(N * words_per_row(K)) * 8; }
int masked_ops_cuda_pack_fragments(const uint64_t* words, int64_t N, int64_t K, int transposed, uint32_t* fragments,
                                   void*) {
  ENTER("pack_fragments");
  fragments[0] = uint32_t(transposed);
  std::memcpy(fragments + 2, words, size_t(N * words_per_row(K)) * 8);
  return 0;
}
int masked_ops_cuda_gemm_sm80(const Gemm* g, void*) {
  return g->mode == kGradWeight ? kUnsupported : gemm("gemm_sm80", *g);
}
int masked_ops_cuda_gemm_sm90(const Gemm* g, void*) { return gemm("gemm_sm90", *g); }

}  // extern "C"
