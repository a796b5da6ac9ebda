// The Autograd kernels of the packed family, closed like the masked one.
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/tensordot.h>
#include <ATen/ops/where.h>

#include "autograd.h"
#include "autograd_common.h"
#include "checks.h"
#include "ops.h"

namespace masked_ops {
namespace {

MASKED_OPS_HANDLE(packed_linear)
MASKED_OPS_HANDLE(packed_linear_grad_input)
MASKED_OPS_HANDLE(packed_linear_grad_values)
MASKED_OPS_HANDLE(packed_convolution)
MASKED_OPS_HANDLE(packed_convolution_grad_input)
MASKED_OPS_HANDLE(packed_convolution_grad_values)
MASKED_OPS_HANDLE(unpack_values)
MASKED_OPS_HANDLE(pack_values)

// The bits as a bool matrix.
Tensor mask_of(const Tensor& bits, const c10::SymInt& in_features) {
  const Tensor shifts = at::arange(8, bits.options());
  const Tensor all = bits.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(1).flatten(1);
  return all.narrow_symint(1, 0, in_features).to(at::kBool);
}

// By index rather than masked_scatter, which vmap does not know. Pruned places read the zero behind the values.
Tensor unpack_composite(const Tensor& values, const Tensor& bits, const c10::SymInt& in_features) {
  const Tensor mask = mask_of(bits, in_features);
  const Tensor place = mask.flatten().cumsum(0).sub(1);
  const Tensor from = at::where(mask.flatten(), place, at::Scalar(values.numel()));
  const Tensor padded = at::cat({values, values.new_zeros({1})});
  return padded.index_select(0, from).view_symint({bits.sym_size(0), in_features});
}

Tensor pack_composite(const Tensor& weight, const Tensor& bits) {
  const Tensor places = mask_of(bits, weight.sym_size(1)).flatten().nonzero().squeeze(1);
  return weight.reshape({-1}).index_select(0, places);
}

struct PackedLinear : torch::autograd::Function<PackedLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& values, const Tensor& bits,
                        const c10::SymInt& in_features, const OptionalTensor& bias) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({input, values, bits});
    ctx->saved_data["in_features"] = in_features;
    ctx->saved_data["has_bias"] = bias && bias->defined();
    return packed_linear_op().call(input, values, bits, in_features, bias);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &dy = grads[0], &input = saved[0], &values = saved[1], &bits = saved[2];
    const c10::SymInt in_features = ctx->saved_data["in_features"].toSymInt();
    variable_list result(5);
    // Without a bias the node has no fourth tensor to ask about.
    const bool of_bias = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(3);
    if (ctx->needs_input_grad(0) && ctx->needs_input_grad(1) && records_nothing() &&
        computes_here(dy, input, values, bits)) {
      at::AutoDispatchBelowADInplaceOrView below;
      std::tie(result[0], result[1], result[4]) = packed_linear_gradients(dy, input, values, bits, of_bias);
    } else {
      if (ctx->needs_input_grad(0)) result[0] = packed_linear_grad_input_op().call(dy, values, bits, in_features);
      if (ctx->needs_input_grad(1)) {
        result[1] = packed_linear_grad_values_op().call(dy, input, bits, values.sym_size(0));
      }
    }
    if (of_bias && !result[4].defined()) result[4] = sum_to_last_dim(dy);
    return result;
  }
};

struct PackedLinearGradInput : torch::autograd::Function<PackedLinearGradInput> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& values, const Tensor& bits,
                        const c10::SymInt& in_features) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({grad_output, values, bits});
    ctx->saved_data["in_features"] = in_features;
    return packed_linear_grad_input_op().call(grad_output, values, bits, in_features);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &g = grads[0], &grad_output = saved[0], &values = saved[1], &bits = saved[2];
    const c10::SymInt in_features = ctx->saved_data["in_features"].toSymInt();
    variable_list result(4);
    if (ctx->needs_input_grad(0)) result[0] = packed_linear_op().call(g, values, bits, in_features, std::nullopt);
    if (ctx->needs_input_grad(1)) {
      result[1] = packed_linear_grad_values_op().call(grad_output, g, bits, values.sym_size(0));
    }
    return result;
  }
};

struct PackedLinearGradValues : torch::autograd::Function<PackedLinearGradValues> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input, const Tensor& bits,
                        const c10::SymInt& nnz) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({grad_output, input, bits});
    return packed_linear_grad_values_op().call(grad_output, input, bits, nnz);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &g = grads[0], &grad_output = saved[0], &input = saved[1], &bits = saved[2];
    const c10::SymInt in_features = input.sym_size(-1);
    variable_list result(4);
    if (ctx->needs_input_grad(0)) result[0] = packed_linear_op().call(input, g, bits, in_features, std::nullopt);
    if (ctx->needs_input_grad(1)) result[1] = packed_linear_grad_input_op().call(grad_output, g, bits, in_features);
    return result;
  }
};

// The three convolutions, with the sizes of the weight and the geometry.
struct PackedGeometry : SymGeometry {
  std::vector<c10::SymInt> weight_size;

  void save(AutogradContext* ctx) const {
    SymGeometry::save(ctx);
    ctx->saved_data["weight_size"] = weight_size;
  }
  static PackedGeometry load(AutogradContext* ctx) {
    return {SymGeometry::load(ctx), ctx->saved_data["weight_size"].toSymIntVector()};
  }
  Tensor forward(const Tensor& input, const Tensor& values, const Tensor& bits, const OptionalTensor& bias) const {
    return call(packed_convolution_op(), input, values, bits, weight_size, bias);
  }
  Tensor grad_input(const Tensor& grad_output, const Tensor& values, const Tensor& bits,
                    c10::SymIntArrayRef input_size) const {
    return call(packed_convolution_grad_input_op(), grad_output, values, bits, weight_size, input_size);
  }
  Tensor grad_values(const Tensor& grad_output, const Tensor& input, const Tensor& bits, const c10::SymInt& nnz) const {
    return call(packed_convolution_grad_values_op(), grad_output, input, bits, weight_size, nnz);
  }

  c10::SymInt out_channels() const { return transposed ? weight_size[1] * groups : weight_size[0]; }
  Tensor dense(const Tensor& values, const Tensor& bits) const {
    c10::SymInt cols = 1;
    for (size_t d = 1; d < weight_size.size(); ++d) cols *= weight_size[d];
    return unpack_composite(values, bits, cols).view_symint(weight_size);
  }
};

struct PackedConvolution : torch::autograd::Function<PackedConvolution> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& values, const Tensor& bits,
                        const OptionalTensor& bias, const PackedGeometry& geometry) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({input, values, bits});
    ctx->saved_data["has_bias"] = bias && bias->defined();
    geometry.save(ctx);
    return geometry.forward(input, values, bits, bias);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const PackedGeometry geometry = PackedGeometry::load(ctx);
    const Tensor &dy = grads[0], &input = saved[0], &values = saved[1], &bits = saved[2];
    variable_list result(5);
    if (ctx->needs_input_grad(0)) result[0] = geometry.grad_input(dy, values, bits, input.sym_sizes());
    if (ctx->needs_input_grad(1)) result[1] = geometry.grad_values(dy, input, bits, values.sym_size(0));
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(3)) {
      result[3] = sum_to_channels(dy, geometry.out_channels());
    }
    return result;
  }
};

struct PackedConvolutionGradInput : torch::autograd::Function<PackedConvolutionGradInput> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& values, const Tensor& bits,
                        c10::SymIntArrayRef input_size, const PackedGeometry& geometry) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({grad_output, values, bits});
    geometry.save(ctx);
    return geometry.grad_input(grad_output, values, bits, input_size);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const PackedGeometry geometry = PackedGeometry::load(ctx);
    const Tensor &g = grads[0], &grad_output = saved[0], &values = saved[1], &bits = saved[2];
    variable_list result(5);
    if (ctx->needs_input_grad(0)) result[0] = geometry.forward(g, values, bits, std::nullopt);
    if (ctx->needs_input_grad(1)) result[1] = geometry.grad_values(grad_output, g, bits, values.sym_size(0));
    return result;
  }
};

struct PackedConvolutionGradValues : torch::autograd::Function<PackedConvolutionGradValues> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input, const Tensor& bits,
                        const c10::SymInt& nnz, const PackedGeometry& geometry) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({grad_output, input, bits});
    geometry.save(ctx);
    return geometry.grad_values(grad_output, input, bits, nnz);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const PackedGeometry geometry = PackedGeometry::load(ctx);
    const Tensor &g = grads[0], &grad_output = saved[0], &input = saved[1], &bits = saved[2];
    variable_list result(5);
    if (ctx->needs_input_grad(0)) result[0] = geometry.forward(input, g, bits, std::nullopt);
    if (ctx->needs_input_grad(1)) result[1] = geometry.grad_input(grad_output, g, bits, input.sym_sizes());
    return result;
  }
};

struct UnpackValues : torch::autograd::Function<UnpackValues> {
  static Tensor forward(AutogradContext* ctx, const Tensor& values, const Tensor& bits,
                        const c10::SymInt& in_features) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({bits});
    ctx->saved_data["nnz"] = values.sym_size(0);
    return unpack_values_op().call(values, bits, in_features);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor bits = ctx->get_saved_variables()[0];
    return {pack_values_op().call(grads[0], bits, ctx->saved_data["nnz"].toSymInt()), Tensor(), Tensor()};
  }
};

struct PackValues : torch::autograd::Function<PackValues> {
  static Tensor forward(AutogradContext* ctx, const Tensor& weight, const Tensor& bits, const c10::SymInt& nnz) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({bits});
    ctx->saved_data["in_features"] = weight.sym_size(1);
    return pack_values_op().call(weight, bits, nnz);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor bits = ctx->get_saved_variables()[0];
    return {unpack_values_op().call(grads[0], bits, ctx->saved_data["in_features"].toSymInt()), Tensor(), Tensor()};
  }
};

}  // namespace

Tensor packed_linear_autograd(const Tensor& input, const Tensor& values, const Tensor& bits, c10::SymInt in_features,
                              const OptionalTensor& bias) {
  check_defined("input", input);
  check_defined("weight_values", values);
  check_defined("weight_bits", bits);
  if (takes_composite(input, values, bias)) return at::linear(input, unpack_composite(values, bits, in_features), bias);
  if (takes_function(input, values, bias)) return PackedLinear::apply(input, values, bits, in_features, bias);
  at::AutoDispatchBelowADInplaceOrView below;
  return packed_linear_op().call(input, values, bits, in_features, bias);
}

Tensor packed_linear_grad_input_autograd(const Tensor& grad_output, const Tensor& values, const Tensor& bits,
                                         c10::SymInt in_features) {
  if (takes_composite(grad_output, values)) {
    return at::matmul(grad_output, unpack_composite(values, bits, in_features));
  }
  if (takes_function(grad_output, values)) return PackedLinearGradInput::apply(grad_output, values, bits, in_features);
  at::AutoDispatchBelowADInplaceOrView below;
  return packed_linear_grad_input_op().call(grad_output, values, bits, in_features);
}

Tensor packed_linear_grad_values_autograd(const Tensor& grad_output, const Tensor& input, const Tensor& bits,
                                          c10::SymInt nnz) {
  if (takes_composite(grad_output, input)) {
    const std::vector<int64_t> rows = all_but(grad_output.dim() - 1, grad_output.dim());
    return pack_composite(at::tensordot(grad_output, input, rows, rows), bits);
  }
  if (takes_function(grad_output, input)) return PackedLinearGradValues::apply(grad_output, input, bits, nnz);
  at::AutoDispatchBelowADInplaceOrView below;
  return packed_linear_grad_values_op().call(grad_output, input, bits, nnz);
}

Tensor packed_convolution_autograd(const Tensor& input, const Tensor& values, const Tensor& bits,
                                   c10::SymIntArrayRef weight_size, const OptionalTensor& bias,
                                   c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                   c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
                                   c10::SymInt groups) {
  const PackedGeometry geometry = {
      {stride.vec(), padding.vec(), dilation.vec(), transposed, output_padding.vec(), groups}, weight_size.vec()};
  if (takes_composite(input, values, bias)) {
    return at::convolution_symint(input, geometry.dense(values, bits), bias, stride, padding, dilation, transposed,
                                  output_padding, groups);
  }
  if (takes_function(input, values, bias)) return PackedConvolution::apply(input, values, bits, bias, geometry);
  at::AutoDispatchBelowADInplaceOrView below;
  return geometry.forward(input, values, bits, bias);
}

Tensor packed_convolution_grad_input_autograd(const Tensor& grad_output, const Tensor& values, const Tensor& bits,
                                              c10::SymIntArrayRef weight_size, c10::SymIntArrayRef input_size,
                                              c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                              c10::SymIntArrayRef dilation, bool transposed,
                                              c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  const PackedGeometry geometry = {
      {stride.vec(), padding.vec(), dilation.vec(), transposed, output_padding.vec(), groups}, weight_size.vec()};
  if (takes_composite(grad_output, values)) {
    const Tensor input = grad_output.new_empty_symint(input_size);
    return std::get<0>(at::convolution_backward_symint(grad_output, input, geometry.dense(values, bits), std::nullopt,
                                                       stride, padding, dilation, transposed, output_padding, groups,
                                                       {true, false, false}));
  }
  if (takes_function(grad_output, values)) {
    return PackedConvolutionGradInput::apply(grad_output, values, bits, input_size, geometry);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return geometry.grad_input(grad_output, values, bits, input_size);
}

Tensor packed_convolution_grad_values_autograd(const Tensor& grad_output, const Tensor& input, const Tensor& bits,
                                               c10::SymIntArrayRef weight_size, c10::SymInt nnz,
                                               c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                               c10::SymIntArrayRef dilation, bool transposed,
                                               c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  const PackedGeometry geometry = {
      {stride.vec(), padding.vec(), dilation.vec(), transposed, output_padding.vec(), groups}, weight_size.vec()};
  if (takes_composite(grad_output, input)) {
    const Tensor weight = grad_output.new_empty_symint(weight_size);
    const Tensor grad_weight =
        std::get<1>(at::convolution_backward_symint(grad_output, input, weight, std::nullopt, stride, padding, dilation,
                                                    transposed, output_padding, groups, {false, true, false}));
    return pack_composite(grad_weight.flatten(1), bits);
  }
  if (takes_function(grad_output, input)) {
    return PackedConvolutionGradValues::apply(grad_output, input, bits, nnz, geometry);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return geometry.grad_values(grad_output, input, bits, nnz);
}

Tensor unpack_values_autograd(const Tensor& values, const Tensor& bits, c10::SymInt in_features) {
  if (takes_composite(values)) return unpack_composite(values, bits, in_features);
  if (takes_function(values)) return UnpackValues::apply(values, bits, in_features);
  at::AutoDispatchBelowADInplaceOrView below;
  return unpack_values_op().call(values, bits, in_features);
}

Tensor pack_values_autograd(const Tensor& weight, const Tensor& bits, c10::SymInt nnz) {
  if (takes_composite(weight)) return pack_composite(weight, bits);
  if (takes_function(weight)) return PackValues::apply(weight, bits, nnz);
  at::AutoDispatchBelowADInplaceOrView below;
  return pack_values_op().call(weight, bits, nnz);
}

Tensor call_packed_linear(const Tensor& input, const Tensor& values, const Tensor& bits, c10::SymInt in_features,
                          const OptionalTensor& bias) {
  return packed_linear_op().call(input, values, bits, in_features, bias);
}

Tensor call_packed_linear_grad_input(const Tensor& grad_output, const Tensor& values, const Tensor& bits,
                                     c10::SymInt in_features) {
  return packed_linear_grad_input_op().call(grad_output, values, bits, in_features);
}

Tensor call_packed_convolution(const Tensor& input, const Tensor& values, const Tensor& bits,
                               c10::SymIntArrayRef weight_size, const OptionalTensor& bias, c10::SymIntArrayRef stride,
                               c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
                               c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  return packed_convolution_op().call(input, values, bits, weight_size, bias, stride, padding, dilation, transposed,
                                      output_padding, groups);
}

}  // namespace masked_ops
