// The Autograd kernels of the closed family: the derivative of each operation is written with the others, so that
// derivatives of any order are exact.
#include "autograd.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/tensordot.h>

#include "autograd_common.h"
#include "checks.h"
#include "masking.h"
#include "ops.h"

namespace masked_ops {
namespace {

MASKED_OPS_HANDLE(apply_mask)
MASKED_OPS_HANDLE(linear)
MASKED_OPS_HANDLE(linear_grad_input)
MASKED_OPS_HANDLE(linear_grad_weight)
MASKED_OPS_HANDLE(convolution)
MASKED_OPS_HANDLE(convolution_grad_input)
MASKED_OPS_HANDLE(convolution_grad_weight)

// Whether backward may use the values that forward kept. They are no function of the weight that autograd knows: only
// where nothing is recorded.
bool reusable(const Tensor& values, const Tensor& dy) {
  return values.defined() && records_nothing() && is_eager(dy) && is_eager(values);
}

// Whether forward may keep its values. Not where hooks take what is saved: activation checkpointing compares that with
// what the block saves when it is run again, and by then the mask is known and another path may serve.
bool keeps_values() { return at::SavedTensorDefaultHooks::get_tls_state().stack.empty(); }

struct ApplyMask : torch::autograd::Function<ApplyMask> {
  static Tensor forward(AutogradContext* ctx, const Tensor& weight, const Tensor& mask,
                        const std::optional<at::ScalarType>& dtype) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({mask});
    ctx->saved_data["dtype"] = weight.scalar_type();
    return apply_mask_op().call(weight, mask, dtype);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const at::ScalarType dtype = ctx->saved_data["dtype"].toScalarType();
    return {apply_mask_op().call(grads[0], ctx->get_saved_variables()[0], dtype), Tensor(), Tensor()};
  }
};

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const Tensor& mask,
                        const OptionalTensor& bias) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor output, values;
    if (computes_here(input, weight, mask)) {
      std::tie(output, values) = linear_with_values(input, weight, mask, bias);
      // On CUDA only the gradient of the input reads them.
      if (!keeps_values() || (values.is_cuda() && !needs_grad(input))) values = Tensor();
    } else {
      output = linear_op().call(input, weight, mask, bias);
    }
    ctx->save_for_backward({input, weight, mask, values});
    ctx->saved_data["has_bias"] = bias && bias->defined();
    return output;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &dy = grads[0], &input = saved[0], &weight = saved[1], &mask = saved[2], &values = saved[3];
    variable_list result(4);
    // Without a bias the node has no fourth input to ask about.
    const bool of_bias = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(3);
    if (ctx->needs_input_grad(0) && ctx->needs_input_grad(1) && reusable(values, dy) && values.is_cpu() &&
        computes_here(input, weight, mask)) {
      at::AutoDispatchBelowADInplaceOrView below;
      std::tie(result[0], result[1], result[3]) = linear_gradients(dy, input, weight, mask, values, of_bias);
    } else {
      if (ctx->needs_input_grad(0)) {
        result[0] = reusable(values, dy) ? linear_grad_input_with_values(dy, weight, mask, values)
                                         : linear_grad_input_op().call(dy, weight, mask);
      }
      if (ctx->needs_input_grad(1)) result[1] = linear_grad_weight_op().call(dy, input, mask);
    }
    if (of_bias && !result[3].defined()) result[3] = sum_to_last_dim(dy);
    return result;
  }
};

struct LinearGradInput : torch::autograd::Function<LinearGradInput> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& weight, const Tensor& mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({grad_output, weight, mask});
    return linear_grad_input_op().call(grad_output, weight, mask);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &g = grads[0], &grad_output = saved[0], &weight = saved[1], &mask = saved[2];
    variable_list result(3);
    if (ctx->needs_input_grad(0)) result[0] = linear_op().call(g, weight, mask, std::nullopt);
    if (ctx->needs_input_grad(1)) result[1] = linear_grad_weight_op().call(grad_output, g, mask);
    return result;
  }
};

struct LinearGradWeight : torch::autograd::Function<LinearGradWeight> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input, const Tensor& mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({grad_output, input, mask});
    return linear_grad_weight_op().call(grad_output, input, mask);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &g = grads[0], &grad_output = saved[0], &input = saved[1], &mask = saved[2];
    variable_list result(3);
    if (ctx->needs_input_grad(0)) result[0] = linear_op().call(input, g, mask, std::nullopt);
    if (ctx->needs_input_grad(1)) result[1] = linear_grad_input_op().call(grad_output, g, mask);
    return result;
  }
};

// The three operations of the family.
struct Geometry : SymGeometry {
  static Geometry load(AutogradContext* ctx) { return {SymGeometry::load(ctx)}; }
  // Of an eager call.
  static at::DimVector ints(const std::vector<c10::SymInt>& numbers) {
    at::DimVector result;
    for (const c10::SymInt& n : numbers) result.push_back(n.expect_int());
    return result;
  }

  Tensor forward(const Tensor& input, const Tensor& weight, const Tensor& mask, const OptionalTensor& bias) const {
    return call(convolution_op(), input, weight, mask, bias);
  }
  Tensor grad_input(const Tensor& grad_output, const Tensor& weight, const Tensor& mask,
                    c10::SymIntArrayRef input_size) const {
    return call(convolution_grad_input_op(), grad_output, weight, mask, input_size);
  }
  Tensor grad_weight(const Tensor& grad_output, const Tensor& input, const Tensor& mask) const {
    return call(convolution_grad_weight_op(), grad_output, input, mask);
  }
};

struct Convolution : torch::autograd::Function<Convolution> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const Tensor& mask,
                        const OptionalTensor& bias, const Geometry& geometry) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor output, values;
    if (computes_here(input, weight, mask)) {
      std::tie(output, values) = convolution_with_values(
          input, weight, mask, bias, geometry.ints(geometry.stride), geometry.ints(geometry.padding),
          geometry.ints(geometry.dilation), geometry.transposed, geometry.ints(geometry.output_padding),
          geometry.groups.expect_int());
      if (!keeps_values()) values = Tensor();
    } else {
      output = geometry.forward(input, weight, mask, bias);
    }
    ctx->save_for_backward({input, weight, mask, values});
    ctx->saved_data["has_bias"] = bias && bias->defined();
    geometry.save(ctx);
    return output;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Geometry geometry = Geometry::load(ctx);
    const Tensor &dy = grads[0], &input = saved[0], &weight = saved[1], &mask = saved[2], &values = saved[3];
    variable_list result(5);
    const bool of_input = ctx->needs_input_grad(0), of_weight = ctx->needs_input_grad(1);
    if (records_nothing() && computes_here(input, weight, mask) && is_eager(dy)) {
      at::AutoDispatchBelowADInplaceOrView below;
      std::tie(result[0], result[1]) =
          convolution_gradients(dy, input, weight, mask, values, of_input, of_weight, geometry.ints(geometry.stride),
                                geometry.ints(geometry.padding), geometry.ints(geometry.dilation), geometry.transposed,
                                geometry.ints(geometry.output_padding), geometry.groups.expect_int());
    } else {
      if (of_input) result[0] = geometry.grad_input(dy, weight, mask, input.sym_sizes());
      if (of_weight) result[1] = geometry.grad_weight(dy, input, mask);
    }
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(3)) {
      const c10::SymInt channels = geometry.transposed ? weight.sym_size(1) * geometry.groups : weight.sym_size(0);
      result[3] = sum_to_channels(dy, channels);
    }
    return result;
  }
};

struct ConvolutionGradInput : torch::autograd::Function<ConvolutionGradInput> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& weight, const Tensor& mask,
                        c10::SymIntArrayRef input_size, const Geometry& geometry) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({grad_output, weight, mask});
    geometry.save(ctx);
    return geometry.grad_input(grad_output, weight, mask, input_size);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Geometry geometry = Geometry::load(ctx);
    const Tensor &g = grads[0], &grad_output = saved[0], &weight = saved[1], &mask = saved[2];
    variable_list result(5);
    if (ctx->needs_input_grad(0)) result[0] = geometry.forward(g, weight, mask, std::nullopt);
    if (ctx->needs_input_grad(1)) result[1] = geometry.grad_weight(grad_output, g, mask);
    return result;
  }
};

struct ConvolutionGradWeight : torch::autograd::Function<ConvolutionGradWeight> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input, const Tensor& mask,
                        const Geometry& geometry) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({grad_output, input, mask});
    geometry.save(ctx);
    return geometry.grad_weight(grad_output, input, mask);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Geometry geometry = Geometry::load(ctx);
    const Tensor &g = grads[0], &grad_output = saved[0], &input = saved[1], &mask = saved[2];
    variable_list result(4);
    if (ctx->needs_input_grad(0)) result[0] = geometry.forward(input, g, mask, std::nullopt);
    if (ctx->needs_input_grad(1)) result[1] = geometry.grad_input(grad_output, g, mask, input.sym_sizes());
    return result;
  }
};

}  // namespace

Tensor apply_mask_autograd(const Tensor& weight, const Tensor& mask, std::optional<at::ScalarType> dtype) {
  check_defined("weight", weight);
  check_defined("mask", mask);
  if (takes_composite(weight)) {
    check_mask(weight, mask);
    if (dtype) check_cast(weight, *dtype);
    return masked_weight_composite(weight, mask).to(dtype.value_or(weight.scalar_type()));
  }
  if (takes_function(weight)) return ApplyMask::apply(weight, mask, dtype);
  at::AutoDispatchBelowADInplaceOrView below;
  return apply_mask_op().call(weight, mask, dtype);
}

Tensor linear_autograd(const Tensor& input, const Tensor& weight, const Tensor& mask, const OptionalTensor& bias) {
  check_defined("input", input);
  check_defined("weight", weight);
  check_defined("mask", mask);
  const bool has_bias = bias && bias->defined();
  // A bias that is no vector of N broadcasts, a weight of one dimension drops one: torch's own rules, by torch.
  const bool plain = weight.dim() == 2 && (!has_bias || (bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0)));
  if (takes_composite(input, weight, bias) || !plain) {
    check_linear(input, weight, mask, bias);
    return at::linear(input, masked_weight_composite(weight, mask), bias);
  }
  if (takes_function(input, weight, bias)) return Linear::apply(input, weight, mask, bias);
  at::AutoDispatchBelowADInplaceOrView below;
  return linear_op().call(input, weight, mask, bias);
}

Tensor linear_grad_input_autograd(const Tensor& grad_output, const Tensor& weight, const Tensor& mask) {
  if (takes_composite(grad_output, weight)) {
    check_mask(weight, mask);
    return at::matmul(grad_output, masked_weight_composite(weight, mask).conj());
  }
  if (takes_function(grad_output, weight)) return LinearGradInput::apply(grad_output, weight, mask);
  at::AutoDispatchBelowADInplaceOrView below;
  return linear_grad_input_op().call(grad_output, weight, mask);
}

Tensor linear_grad_weight_autograd(const Tensor& grad_output, const Tensor& input, const Tensor& mask) {
  if (takes_composite(grad_output, input)) {
    const std::vector<int64_t> rows = all_but(grad_output.dim() - 1, grad_output.dim());
    const Tensor grad_weight = at::tensordot(grad_output, input.conj(), rows, rows);
    check_mask(grad_weight, mask);
    return masked_weight_composite(grad_weight, mask);
  }
  if (takes_function(grad_output, input)) return LinearGradWeight::apply(grad_output, input, mask);
  at::AutoDispatchBelowADInplaceOrView below;
  return linear_grad_weight_op().call(grad_output, input, mask);
}

Tensor convolution_autograd(const Tensor& input, const Tensor& weight, const Tensor& mask, const OptionalTensor& bias,
                            c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                            bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  check_defined("input", input);
  check_defined("weight", weight);
  check_defined("mask", mask);
  if (takes_composite(input, weight, bias)) {
    check_mask(weight, mask);
    return at::convolution_symint(input, masked_weight_composite(weight, mask), bias, stride, padding, dilation,
                                  transposed, output_padding, groups);
  }
  if (takes_function(input, weight, bias)) {
    return Convolution::apply(
        input, weight, mask, bias,
        Geometry{{stride.vec(), padding.vec(), dilation.vec(), transposed, output_padding.vec(), groups}});
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_convolution(input, weight, mask, bias, stride, padding, dilation, transposed, output_padding, groups);
}

Tensor convolution_grad_input_autograd(const Tensor& grad_output, const Tensor& weight, const Tensor& mask,
                                       c10::SymIntArrayRef input_size, c10::SymIntArrayRef stride,
                                       c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
                                       c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  if (takes_composite(grad_output, weight)) {
    check_mask(weight, mask);
    const Tensor input = grad_output.new_empty_symint(input_size);
    return std::get<0>(at::convolution_backward_symint(grad_output, input, masked_weight_composite(weight, mask),
                                                       std::nullopt, stride, padding, dilation, transposed,
                                                       output_padding, groups, {true, false, false}));
  }
  const Geometry geometry = {{stride.vec(), padding.vec(), dilation.vec(), transposed, output_padding.vec(), groups}};
  if (takes_function(grad_output, weight)) {
    return ConvolutionGradInput::apply(grad_output, weight, mask, input_size, geometry);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return geometry.grad_input(grad_output, weight, mask, input_size);
}

Tensor convolution_grad_weight_autograd(const Tensor& grad_output, const Tensor& input, const Tensor& mask,
                                        c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                        c10::SymIntArrayRef dilation, bool transposed,
                                        c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  if (takes_composite(grad_output, input)) {
    const Tensor weight = grad_output.new_empty_symint(mask.sym_sizes());
    check_mask(weight, mask);
    const Tensor grad_weight =
        std::get<1>(at::convolution_backward_symint(grad_output, input, weight, std::nullopt, stride, padding, dilation,
                                                    transposed, output_padding, groups, {false, true, false}));
    return masked_weight_composite(grad_weight, mask);
  }
  const Geometry geometry = {{stride.vec(), padding.vec(), dilation.vec(), transposed, output_padding.vec(), groups}};
  if (takes_function(grad_output, input)) return ConvolutionGradWeight::apply(grad_output, input, mask, geometry);
  at::AutoDispatchBelowADInplaceOrView below;
  return geometry.grad_weight(grad_output, input, mask);
}

Tensor call_apply_mask(const Tensor& weight, const Tensor& mask, std::optional<at::ScalarType> dtype) {
  return apply_mask_op().call(weight, mask, dtype);
}

Tensor call_linear(const Tensor& input, const Tensor& weight, const Tensor& mask, const OptionalTensor& bias) {
  return linear_op().call(input, weight, mask, bias);
}

Tensor call_linear_grad_input(const Tensor& grad_output, const Tensor& weight, const Tensor& mask) {
  return linear_grad_input_op().call(grad_output, weight, mask);
}

Tensor call_convolution(const Tensor& input, const Tensor& weight, const Tensor& mask, const OptionalTensor& bias,
                        c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                        bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  return convolution_op().call(input, weight, mask, bias, stride, padding, dilation, transposed, output_padding,
                               groups);
}

}  // namespace masked_ops
