// The choice of path for convolutions: what each pass costs, dense, masked and sparse.
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
  bool in_16_bits, slow_half, converts;  // slow_half and converts: what the tables do not hold
  const cpu::ConvCosts& table;
  const cpu::ConvCost &dense, &fused;  // fused: of one tap
  cpu::ConvCost sparse;
  double macs, dense_macs, fused_macs, packed, images, weights;

  ConvolutionCosts(Pass pass, const cpu::Convolution& c, bool channels_last, at::ScalarType dtype, double density)
      : in_16_bits(dtype != at::kFloat && torch_rate(dtype) != Rate::kConverted),
        slow_half(dtype == at::kHalf && !in_16_bits),
        converts(dtype != at::kFloat && !in_16_bits),
        table(in_16_bits                  ? cpu::kBFloat16ConvCosts
              : cpu::kernels().lanes == 8 ? cpu::kFloatConvCostsAvx2
                                          : cpu::kFloatConvCosts),
        dense(table.dense[is_depthwise(c) ? 2
                          : taps(c) > 1   ? 1
                                          : 0][channels_last][static_cast<int>(pass)]),
        fused(table.fused[channels_last][static_cast<int>(pass)]),
        sparse(table.sparse[density < cpu::kFullDensity][channels_last           ? 1
                                                         : in_planes(c, density) ? 2
                                                                                 : 0][static_cast<int>(pass)]) {
    const double positions = double(c.batch) * volume(c.output);
    weights = double(c.out_channels) * double(c.in_channels / c.groups) * double(taps(c));
    macs = positions * weights;
    // Torch's kernels fill blocks of the result's channels, dot products whole vectors of planes.
    const int64_t results = (pass == Pass::kForward ? c.out_channels : c.in_channels) / c.groups;
    const bool in_blocks_of_channels = !is_depthwise(c) && (pass != Pass::kGradWeight || c.groups > 1);
    dense_macs = in_blocks_of_channels ? macs * in_blocks(results, cpu::kChannelBlock) : macs;
    if (in_tiles(dtype)) dense_macs /= cpu::kTileSpeedup;
    // The gradient of the weight of small groups is far off: 128 channels of 28 x 28 in 32 groups take 356 us an image,
    // and channels last 63 to 125.
    if (in_blocks_of_channels && pass == Pass::kGradWeight && !channels_last) {
      dense_macs *= in_blocks(c.out_channels / c.groups, cpu::kChannelBlock);
    }
    const int64_t plane = c.output[0] * c.output[1] * c.output[2];
    const bool by_planes = pass == Pass::kGradWeight && !channels_last && !in_16_bits;
    fused_macs = by_planes ? macs * in_blocks(plane, cpu::kPackedVector) : macs;
    packed = positions * double(packed_channels(pass, c, channels_last)) * packed_taps(pass, c);
    images = positions * double(c.out_channels) + double(c.batch) * volume(c.input) * double(c.in_channels);
  }
  double of_dense(int threads) const {
    const double costs = dense(dense_macs, weights, 0, packed, images, threads);
    return slow_half ? costs / cpu::kHalfConvSpeedup : costs;
  }
  // Whether the table holds what the masked GEMM costs; float16 is converted for it.
  bool has_fused(at::ScalarType dtype) const {
    return dtype == at::kFloat || (in_16_bits && dtype == at::kBFloat16 && cpu::kernels().bf16_dots);
  }
  double of_fused(int threads) const { return fused(fused_macs, weights, 0, packed, images, threads); }
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

// Whether the masked GEMM may be as fast as torch over a masked weight; its cost says whether it is. Always contiguous
// in float32, where it takes the images as they lie; and channels last in grad_weight of bfloat16 into fewer channels:
// 64 -> 32 to 2048 -> 512 channels need 0.3 to 0.9 of torch's time, 64 -> 64 and 64 -> 256 up to 1.6.
bool may_fuse(const ConvolutionCosts& costs, Pass pass, const cpu::Convolution& c, bool channels_last,
              at::ScalarType dtype) {
  if (portable() || (!channels_last && !costs.has_fused(dtype))) return false;
  const bool into_fewer = pass == Pass::kGradWeight && c.out_channels < c.in_channels;
  const bool always = costs.in_16_bits ? channels_last && into_fewer && costs.has_fused(dtype) : !channels_last;
  return always || costs.weights >= cpu::kFusedWeights * costs.images;
}

// Whether the sparse kernels are hardly ever faster than torch's in 16 bits: depthwise, torch was ahead in 174 of 180
// passes and by a third behind at most; 128 channels of 28 x 28 in 32 groups, forward and grad_input, it was 1.4 to 1.9
// times as fast at 50%.
bool loses_in_groups(Pass pass, const cpu::Convolution& c) {
  return c.groups > 1 && (is_depthwise(c) || pass != Pass::kGradWeight);
}

// Whether the sparse kernels are no choice for a depthwise convolution that the depthwise kernels can serve. On Zen 4
// torch's are up to 5 times as fast, 240 and 960 channels of 7 x 7 under 5 x 5 weights, and where torch's take longer,
// so do the sparse ones than the depthwise ones. Portable ones are ahead of torch in grad_weight, up to 3 times.
bool loses_depthwise(Pass pass, const cpu::Convolution& c) {
  return is_depthwise(c) && (!portable() || pass != Pass::kGradWeight);
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
  if (pass == Pass::kGradWeight && (channels_last || large_kernel)) return true;
  // A vector of few channels: 3 channels of 64 x 64, batch 128, take 1.1 (AVX2 2.0) times as long as torch.
  if (channels_last) return 2 * c.in_channels >= cpu::kernels().lanes;
  if (several) return true;
  const bool keeps_size =
      c.kernel[1] == 3 && c.kernel[2] == 3 && c.input[1] == c.output[1] && c.input[2] == c.output[2];
  if (keeps_size) return c.output[2] > 1;
  if (c.batch * c.out_channels * c.output[1] * c.output[2] <= cpu::kFewResults) return true;
  return c.output[2] >= cpu::kLeastWidth * (large_kernel && c.stride[2] > 1 ? 2 : 1) * c.stride[2];
}

}  // namespace

Choice choose_convolution(Pass pass, const cpu::Convolution* geometry, bool channels_last, const at::Tensor& weight,
                          const Pattern* pattern, bool have_values, bool packed) {
  if (weight.is_cuda()) {  // whose weight is masked first; how, is decided there
    const char* unfused = "it has no convolution kernel";
    choose_device("convolution", pass, 0, 0, {nullptr, unfused, unfused, unfused, unfused}, unfused, {unfused});
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
    if (!no_fused && !depthwise && may_fuse(costs, pass, *geometry, channels_last, weight.scalar_type())) {
      const char* const reason = "masked GEMM: one tap, and most weights remain";
      if (costs.has_fused(weight.scalar_type())) {
        consider(Path::kFused, costs.of_fused(threads), reason);
      } else if (choice.path == Path::kCopy) {
        const int64_t positions = geometry->batch * geometry->output[0] * geometry->output[1] * geometry->output[2];
        choice = {Path::kFused, reason};
        least = LinearCosts{pass, positions, weight.scalar_type()}.of(Path::kFused, *pattern);
      }
    }
    const bool loses =
        costs.in_16_bits ? loses_in_groups(pass, *geometry) : !no_fused && loses_depthwise(pass, *geometry);
    if (!no_sparse && !loses) {
      const bool most = pattern->density() > cpu::kMostDensity;
      const char* const reason = most ? "sparse convolution: torch is slower even with most weights"
                                      : "sparse convolution: few weights remain";
      const bool pixels = channels_last && taps(*geometry) == 1 && pattern->density() >= cpu::kFullDensity;
      const double margin = most ? cpu::kMostMargin : pixels ? cpu::kPixelMargin : 1;
      if (choice.path == Path::kFused && !channels_last && !costs.in_16_bits &&
          beats_fused_planes(*geometry, pattern->density())) {
        choice = {Path::kSparse, reason};
      } else {
        consider(Path::kSparse, costs.of_sparse(double(pattern->nnz()), threads) / margin, reason);
      }
    }
  }
  return obey(packed ? "packed convolution" : "convolution", {nullptr, no_fused, no_compact, no_sparse}, choice);
}

}  // namespace masked_ops
