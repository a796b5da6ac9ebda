// The choice of path for convolutions: what each pass costs, dense, masked and sparse.
#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <algorithm>
#include <numeric>

#include "channels.h"
#include "depthwise_convolution.h"
#include "path_costs.h"
#include "pointwise_convolution.h"

namespace masked_ops {
namespace {

// Kernels beyond this have offsets that the strips' numbers do not hold.
constexpr int64_t kMaxTaps = int64_t{1} << 16;

int64_t taps(const cpu::Convolution& c) { return c.kernel[0] * c.kernel[1] * c.kernel[2]; }

// Whether the CPU computes in float16; true where that is not known.
bool has_float16_arithmetic() {
#ifdef __x86_64__
  static const bool result = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 23 & 1);
  }();
  return result;
#else
  return true;
#endif
}

// How much faster torch convolves in a dtype than in float32.
double dense_speedup(at::ScalarType dtype) {
  if (dtype == at::kBFloat16) return cpu::kernels().bf16_dots ? cpu::k16BitConvSpeedup : 1;
  if (dtype == at::kHalf) return has_float16_arithmetic() ? cpu::k16BitConvSpeedup : cpu::kHalfConvSpeedup;
  return 1;
}

// Whether the sparse kernels take contiguous images as they lie, without packing (conv_planes.cpp).
bool in_planes(const cpu::Convolution& c, double density) {
  if (planes_collide(c, density * double(c.out_channels) * double(c.in_channels / c.groups))) return false;
  const int64_t plane = c.output[0] * c.output[1] * c.output[2], lanes = cpu::kernels().lanes;
  const bool whole = plane % (7 * lanes) == 0 || plane % (8 * lanes) == 0;
  return whole && taps(c) == 1 && plane == c.input[0] * c.input[1] * c.input[2];
}

bool is_depthwise(const cpu::Convolution& c) { return c.groups > 1 && c.groups == c.in_channels; }

// What the passes of a convolution cost, dense and sparse.
struct ConvolutionCosts {
  double macs, dense_macs, fused_macs, packed, images, weights, speedup;
  bool converts;
  const cpu::ConvCost &dense, &fused;  // fused: of one tap in float32
  cpu::ConvCost sparse;

  ConvolutionCosts(Pass pass, const cpu::Convolution& c, bool channels_last, at::ScalarType dtype, double density)
      : speedup(dense_speedup(dtype)),
        converts(dtype != at::kFloat),
        dense(cpu::kDenseConvCosts[is_depthwise(c) ? 2
                                   : taps(c) > 1   ? 1
                                                   : 0][channels_last][static_cast<int>(pass)]),
        fused(cpu::kFusedConvCosts[channels_last][static_cast<int>(pass)]),
        sparse(
            cpu::kSparseConvCosts[density < cpu::kFullDensity][channels_last           ? 1
                                                               : in_planes(c, density) ? 2
                                                                                       : 0][static_cast<int>(pass)]) {
    const double positions = double(c.batch) * volume(c.output);
    weights = double(c.out_channels) * double(c.in_channels / c.groups) * double(taps(c));
    macs = positions * weights;
    // Torch's kernels fill blocks of the result's channels, dot products whole vectors of planes.
    const int64_t results = (pass == Pass::kForward ? c.out_channels : c.in_channels) / c.groups;
    const bool in_blocks_of_channels = !is_depthwise(c) && (pass != Pass::kGradWeight || c.groups > 1);
    dense_macs = in_blocks_of_channels ? macs * in_blocks(results, cpu::kChannelBlock) : macs;
    // The gradient of the weight of small groups is far off: 128 channels of 28 x 28 in 32 groups take 356 us an image,
    // and channels last 63 to 125.
    if (in_blocks_of_channels && pass == Pass::kGradWeight && !channels_last) {
      dense_macs *= in_blocks(c.out_channels / c.groups, cpu::kChannelBlock);
    }
    const int64_t plane = c.output[0] * c.output[1] * c.output[2];
    const bool by_planes = pass == Pass::kGradWeight && !channels_last;
    fused_macs = by_planes ? macs * in_blocks(plane, cpu::kPackedVector) : macs;
    packed = positions * double(packed_channels(pass, c, channels_last)) * packed_taps(pass, c);
    images = positions * double(c.out_channels) + double(c.batch) * volume(c.input) * double(c.in_channels);
  }
  double of_dense(int threads) const { return dense(dense_macs, weights, 0, packed, images, threads) / speedup; }
  double of_fused(int threads) const {
    const double factor = cpu::kernels().lanes == 8 ? cpu::kAvx2FusedConvCost : 1;
    return factor * fused(fused_macs, weights, 0, packed, images, threads);
  }
  double of_sparse(double nnz, int threads) const {
    return (portable() ? cpu::kPortableConvCost : 1) * sparse(macs, weights, nnz, packed, images, threads) +
           (converts ? cpu::kConvertCost * images / threads + cpu::kConvertCall : 0);
  }

  // Channels that im2col reads for a tap of a position: channels last, whole vectors of them; and contiguous, where the
  // stride passes over every other position, those for nothing.
  static int64_t packed_channels(Pass pass, const cpu::Convolution& c, bool channels_last) {
    const int64_t channels = pass == Pass::kGradInput ? c.out_channels : c.in_channels, of_group = channels / c.groups;
    if (channels_last)
      return c.groups * ((of_group + cpu::kPackedVector - 1) / cpu::kPackedVector) * cpu::kPackedVector;
    return pass != Pass::kGradInput && c.stride[2] > 1 ? 2 * channels : channels;
  }

  // What is computed of n for one of it, in whole blocks.
  static double in_blocks(int64_t n, int64_t block) { return double((n + block - 1) / block * block) / double(n); }

  // Taps of a position for which im2col reads: several rows of the kernel share those of the images.
  static double packed_taps(Pass pass, const cpu::Convolution& c) {
    const int64_t shared = std::gcd(c.stride[1], c.dilation[1]), classes = c.stride[1] / shared;
    if ((pass == Pass::kGradInput && c.stride[1] > 1) || c.kernel[1] <= classes) return double(taps(c));
    const int64_t further = ((c.kernel[1] - 1) / classes) * (c.dilation[1] / shared);
    const double rows = double(classes) * (1 + double(further) / cpu::kPackedRows);
    return double(c.kernel[0] * c.kernel[2]) * std::min(rows, double(c.kernel[1]));
  }

  // What the dense one without the pruned channels costs besides that.
  static double of_moves(Pass pass, const cpu::Convolution& c, const Channels& left, int threads) {
    // What is multiplied is moved together; the result apart, into all channels.
    const auto moved = [&](const std::vector<int64_t>& some, const std::vector<int64_t>& all, bool result) {
      return some.size() == all.size() ? 0.0 : double(c.batch) * double(result ? all.size() : some.size());
    };
    const double moves = moved(left.rows, left.row_slots, pass == Pass::kForward) * volume(c.output) +
                         moved(left.others, left.other_slots, pass == Pass::kGradInput) * volume(c.input);
    return cpu::kMoveCost * moves / threads + cpu::kCompactConvolutionCall;
  }

  // The convolution that torch's kernels do over what is left.
  static cpu::Convolution without_pruned(cpu::Convolution c, const Channels& left) {
    const auto in_blocks = [](const std::vector<int64_t>& channels) {
      const auto n = static_cast<int64_t>(channels.size());
      return (n + cpu::kChannelBlock - 1) / cpu::kChannelBlock * cpu::kChannelBlock;
    };
    c.out_channels = in_blocks(left.rows);
    c.in_channels = left.groups > 1 ? static_cast<int64_t>(left.others.size()) : in_blocks(left.others);
    c.groups = left.groups;
    return c;
  }

  static double volume(const int64_t (&size)[3]) { return double(size[0]) * double(size[1]) * double(size[2]); }
};

// Why the kernels for a weight under a binary mask cannot serve a convolution; null if they can.
const char* kernel_obstacle(const cpu::Convolution* geometry, const at::Tensor& weight, const Pattern* pattern) {
  if (!weight.is_cpu()) return "the weight is not in CPU memory";
  if (!has_kernels(weight.scalar_type()) && weight.scalar_type() != at::kDouble) {
    return "its kernels take float64, float32, bfloat16 and float16";
  }
  if (!pattern || !pattern->binary()) return "the mask is soft";
  if (!geometry) return "its kernels take one to three dimensions and consistent sizes";
  return nullptr;
}

// Whether the masked GEMM may be as fast as torch over a masked weight; its cost says whether it is.
bool may_fuse(const ConvolutionCosts& costs, bool channels_last, const at::Tensor& weight) {
  if (portable()) return false;
  return channels_last ? costs.weights >= cpu::kFusedWeights * costs.images : weight.scalar_type() == at::kFloat;
}

// Whether the sparse kernels are faster than the masked GEMM over contiguous images of one tap: where these lie as both
// take them without packing, with the vectors that it was measured with.
bool beats_fused_planes(const cpu::Convolution& c, double density) {
  const bool far_apart = c.input[0] * c.input[1] * c.input[2] % 1024 == 0;  // see planes_collide
  const double below = far_apart ? cpu::kFarPlaneDensity : cpu::kSparsePlaneDensity;
  return cpu::kernels().lanes == 16 && in_planes(c, density) && density < below;
}

// Whether the depthwise kernels are as fast as torch's.
bool prefers_depthwise(Pass pass, const cpu::Convolution& c, bool channels_last) {
  const bool several = c.out_channels != c.in_channels;  // results of a channel
  if (portable() || (several && channels_last)) return false;
  const bool large_kernel = taps(c) > cpu::kSmallKernel;
  if (pass == Pass::kGradWeight && (large_kernel || channels_last)) return large_kernel || c.batch == 1;
  if (channels_last || several) return true;
  const bool keeps_size =
      c.kernel[1] == 3 && c.kernel[2] == 3 && c.input[1] == c.output[1] && c.input[2] == c.output[2];
  if (keeps_size) return c.output[2] > 1;
  return c.output[2] >= cpu::kLeastWidth * (large_kernel && c.stride[2] > 1 ? 2 : 1) * c.stride[2];
}

}  // namespace

Choice choose_convolution(Pass pass, const cpu::Convolution* geometry, bool channels_last, const at::Tensor& weight,
                          const Pattern* pattern, bool have_values, bool packed) {
  if (weight.is_cuda()) {  // whose weight is masked first; how, is decided there
    const char* unfused = "it has no convolution kernel";
    choose_device("convolution", pass, 0, 0, {nullptr, unfused, unfused, unfused}, unfused);
    return {Path::kCopy, "torch's convolution over the masked weight"};
  }
  const char* const obstacle = kernel_obstacle(geometry, weight, pattern);
  const char* no_sparse = obstacle;
  if (!no_sparse && !has_kernels(weight.scalar_type())) no_sparse = kOtherDtype;
  if (!no_sparse && (!pattern->indexable() || taps(*geometry) > kMaxTaps)) no_sparse = kTooLarge;
  const char* no_fused = packed ? "a packed layer has no dense weight" : obstacle;
  if (!no_fused && !has_kernels(weight.scalar_type())) no_fused = kOtherDtype;
  const bool depthwise = !no_fused && !is_pointwise(*geometry);
  if (depthwise) no_fused = depthwise_obstacle(*geometry);
  if (depthwise && !no_fused && weight.scalar_type() != at::kFloat)
    no_fused = "its depthwise kernels take float32 only";
  // An index is worth its making from the second use of a mask on.
  const bool compacts = forced_path() ? forced_path() == Path::kCompact : !obstacle && pattern->reused();
  std::shared_ptr<const Channels> channels;
  const char* no_compact = obstacle;
  if (!obstacle && compacts) {
    channels = pattern->channels(taps(*geometry), geometry->groups);
    if (!channels->pattern) no_compact = geometry->groups > 1 ? "it has no pruned group" : "it has no pruned channel";
  }
  const char* const dense =
      packed ? "torch's convolution over the unpacked weight" : "torch's convolution over the masked weight";
  Choice choice = {Path::kCopy, no_sparse ? no_sparse : dense};
  if (depthwise && !no_fused && prefers_depthwise(pass, *geometry, channels_last)) {
    choice = {Path::kFused, "depthwise kernel: the mask rides in the load of the weight"};
  } else if (!obstacle && pattern->reused()) {
    ConvolutionCosts costs(pass, *geometry, channels_last, weight.scalar_type(), pattern->density());
    if (have_values || packed) costs.sparse.weight = 0;
    const int threads = team_for(static_cast<int64_t>(std::min(costs.macs * pattern->density(), 1e18))).threads;
    double least = costs.of_dense(threads);
    const auto consider = [&](Path path, double nanoseconds, const char* reason) {
      if (nanoseconds < least) {
        choice = {path, reason};
        least = nanoseconds;
      }
    };
    if (channels && channels->pattern) {
      const ConvolutionCosts left(pass, ConvolutionCosts::without_pruned(*geometry, *channels), channels_last,
                                  weight.scalar_type(), pattern->density());
      const double compact = left.of_dense(threads) + ConvolutionCosts::of_moves(pass, *geometry, *channels, threads);
      consider(Path::kCompact, compact / cpu::kCompactMargin, "torch's convolution without the pruned channels");
    }
    if (!no_fused && !depthwise && may_fuse(costs, channels_last, weight)) {
      const char* const reason = "masked GEMM: one tap, and most weights remain";
      if (weight.scalar_type() == at::kFloat) {
        consider(Path::kFused, costs.of_fused(threads), reason);
      } else if (choice.path == Path::kCopy) {
        const int64_t positions = geometry->batch * geometry->output[0] * geometry->output[1] * geometry->output[2];
        choice = {Path::kFused, reason};
        least = LinearCosts{pass, positions, weight.scalar_type()}.of(Path::kFused, *pattern);
      }
    }
    if (!no_sparse) {
      const bool most = pattern->density() > cpu::kMostDensity;
      const char* const reason = most ? "sparse convolution: torch is slower even with most weights"
                                      : "sparse convolution: few weights remain";
      const bool pixels = channels_last && taps(*geometry) == 1 && pattern->density() >= cpu::kFullDensity;
      const double margin = most ? cpu::kMostMargin : pixels ? cpu::kPixelMargin : 1;
      if (choice.path == Path::kFused && !channels_last && beats_fused_planes(*geometry, pattern->density())) {
        choice = {Path::kSparse, reason};
      } else {
        consider(Path::kSparse, costs.of_sparse(double(pattern->nnz()), threads) / margin, reason);
      }
    }
  }
  return obey(packed ? "packed convolution" : "convolution", {nullptr, no_fused, no_compact, no_sparse}, choice);
}

}  // namespace masked_ops
