#include "convolution_plan.h"

#include <ATen/native/ConvUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>

#include "cpu/costs.h"
#include "masking.h"
#include "memory.h"
#include "parallel.h"

namespace masked_ops {
namespace {

// A tensor as images in one of the two layouts that the kernels know.
class ImagesOf {
 public:
  explicit ImagesOf(const at::Tensor& t) : channels_last_(suggests_channels_last(t)) {
    tensor_ = t.contiguous(channels_last_ ? channels_last_of(t.dim()) : at::MemoryFormat::Contiguous);
  }
  cpu::Images<const float> input() const { return {tensor_.const_data_ptr<float>(), channels_last_}; }

 private:
  bool channels_last_;
  at::Tensor tensor_;
};

}  // namespace

at::MemoryFormat result_format(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                               const Geometry& of) {
  // Every backend for the CPU asks for this first; to find which one it is takes half a microsecond.
  if (input.dim() < 4 || !prefers_channels_last(input, weight)) return at::MemoryFormat::Contiguous;
  const auto numbers = [](at::IntArrayRef values) { return c10::fromIntArrayRefSlow(values); };
  const auto backend = at::native::select_conv_backend(input, weight, bias, numbers(of.stride), numbers(of.padding),
                                                       numbers(of.dilation), of.transposed, numbers(of.output_padding),
                                                       of.groups, at::OptionalSymIntArrayRef());
  return at::native::_determine_backend_memory_format(input, weight, backend);
}

ConvolutionPlan::ConvolutionPlan(Pass pass, const Geometry& of, at::IntArrayRef input, bool channels_last,
                                 const at::Tensor& weight, PatternPtr of_mask, bool have_values, bool packed)
    : of(of), pattern(std::move(of_mask)) {
  const bool known = of.weight.size() <= 5 && of.consistent(input);
  if (known) geometry = of.for_kernels(input);
  const auto empty = [](at::IntArrayRef sizes) { return std::find(sizes.begin(), sizes.end(), 0) != sizes.end(); };
  // Torch refuses what does not fit in its own words, and knows the shapes of nothing.
  const bool trivial = !known || empty(input) || empty(of.output_sizes(input)) || empty(of.weight);
  const Pass seen = !of.transposed || pass == Pass::kGradWeight ? pass
                    : pass == Pass::kForward                    ? Pass::kGradInput
                                                                : Pass::kForward;
  const Choice choice =
      choose_convolution(seen, known ? &geometry : nullptr, channels_last, weight, pattern.get(), have_values, packed);
  path = trivial ? Path::kCopy : choice.path;
  reason = choice.reason;
}

namespace {

cpu::Team team_of(const cpu::Convolution& c, const Pattern& pattern) {
  const int64_t positions = c.batch * c.output[0] * c.output[1] * c.output[2];
  return team_for(positions * std::max<int64_t>(pattern.nnz(), c.out_channels));
}

// One product with the weight, or the weight transposed, from images of floats into others.
void multiply_floats(const cpu::Convolution& c, const Pattern& pattern, bool transposed, const at::Tensor& from,
                     const at::Tensor& values, const at::Tensor& bias, const at::Tensor& to) {
  const auto index = pattern.conv_index(c, transposed);
  const cpu::Images<float> images = {to.mutable_data_ptr<float>(), suggests_channels_last(to)};
  index->kernels().conv_spmm(team_of(c, pattern), c, index->get(), values.const_data_ptr<float>(),
                             ImagesOf(from).input(), bias.defined() ? bias.const_data_ptr<float>() : nullptr, images);
}

void correlate_floats(const cpu::Convolution& c, const Pattern& pattern, const at::Tensor& dy, const at::Tensor& x,
                      const at::Tensor& values) {
  const auto index = pattern.conv_index(c, /*transposed=*/false);
  const ImagesOf of_dy(dy), of_x(x);
  index->kernels().conv_sddmm(team_of(c, pattern), c, index->get(), of_dy.input(), of_x.input(),
                              values.mutable_data_ptr<float>());
}

// Images of 16 bits pass through the kernels as floats, some at a time: a whole one at least.
class Chunks {
 public:
  Chunks(const cpu::Convolution& c, const at::Tensor& one, const at::Tensor& other) : all_(c) {
    const int64_t bytes = (one.numel() + other.numel()) / c.batch * int64_t{sizeof(float)};
    chunk_ = std::clamp<int64_t>(cpu::kConvertedBytes / std::max<int64_t>(bytes, 1), 1, c.batch);
  }
  // Space for the images of a chunk, in the layout of all.
  at::Tensor buffer(const at::Tensor& images) const {
    at::DimVector sizes(images.sizes());
    sizes[0] = chunk_;
    return at::empty(sizes, images.options().dtype(at::kFloat), images.suggest_memory_format());
  }
  // body(geometry, part): part(images) are those of the chunk.
  template <typename Body>
  void for_each(const Body& body) const {
    cpu::Convolution c = all_;
    for (int64_t first = 0; first < all_.batch; first += chunk_) {
      c.batch = std::min(chunk_, all_.batch - first);
      body(c, [&, first](const at::Tensor& images) { return images.narrow(0, first, c.batch); });
    }
  }

 private:
  const cpu::Convolution& all_;
  int64_t chunk_;
};

}  // namespace

at::Tensor ConvolutionPlan::multiply(bool transposed, const at::Tensor& from, const at::Tensor& values,
                                     const at::Tensor& bias, at::IntArrayRef sizes, at::MemoryFormat format) const {
  at::Tensor to = empty_result(sizes, from.options(), format);
  if (from.scalar_type() == at::kFloat) {
    multiply_floats(geometry, *pattern, transposed, from, values, bias, to);
    return to;
  }
  const at::Tensor weights = values.to(at::kFloat), start = bias.defined() ? bias.to(at::kFloat) : bias;
  const Chunks chunks(geometry, from, to);
  const at::Tensor wide_from = chunks.buffer(from), wide_to = chunks.buffer(to);
  chunks.for_each([&](const cpu::Convolution& c, const auto& part) {
    const at::Tensor x = wide_from.narrow(0, 0, c.batch), y = wide_to.narrow(0, 0, c.batch);
    x.copy_(part(from));
    multiply_floats(c, *pattern, transposed, x, weights, start, y);
    part(to).copy_(y);
  });
  return to;
}

at::Tensor ConvolutionPlan::grad_values(const at::Tensor& grad_output, const at::Tensor& input) const {
  const at::Tensor &dy = of.transposed ? input : grad_output, &x = of.transposed ? grad_output : input;
  at::Tensor values = at::empty({pattern->nnz()}, grad_output.options().dtype(at::kFloat));
  if (grad_output.scalar_type() == at::kFloat) {
    correlate_floats(geometry, *pattern, dy, x, values);
  } else {
    const Chunks chunks(geometry, dy, x);
    const at::Tensor wide_dy = chunks.buffer(dy), wide_x = chunks.buffer(x);
    at::Tensor of_chunk = values;  // of the first; the others are added
    chunks.for_each([&](const cpu::Convolution& c, const auto& part) {
      const at::Tensor some_dy = wide_dy.narrow(0, 0, c.batch), some_x = wide_x.narrow(0, 0, c.batch);
      some_dy.copy_(part(dy));
      some_x.copy_(part(x));
      correlate_floats(c, *pattern, some_dy, some_x, of_chunk);
      if (!of_chunk.is_same(values)) values.add_(of_chunk);
      if (c.batch < geometry.batch && of_chunk.is_same(values)) of_chunk = at::empty_like(values);
    });
  }
  // A vector that runs beyond the images multiplies zeros by what lies there of the input. If that is Inf or NaN, a
  // weight that never met it would be NaN: then torch computes all of it.
  if (std::isfinite(values.sum().item<float>())) return values.to(grad_output.scalar_type());
  const at::Tensor weight = at::empty(of.weight, grad_output.options());
  return compress(of.grad_weight(grad_output, input, weight), *pattern);
}

}  // namespace masked_ops
