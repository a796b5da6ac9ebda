// The way in to every Autograd kernel. Three, in this order: functorch transforms, forward-mode tangents and complex
// tensors take the composite of torch's own operations, for which every transform is defined; inputs that need a
// gradient take a Function, whose backward calls the family through the dispatcher; everything else goes straight below
// autograd.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

namespace masked_ops {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// name_op(): the operation through the dispatcher; its signature is that of name_autograd.
#define MASKED_OPS_HANDLE(name)                                                                \
  const auto& name##_op() {                                                                    \
    static const auto handle = find_operator<decltype(name##_autograd)>("masked_ops::" #name); \
    return handle;                                                                             \
  }

// Complex tensors are special because their gradients need conjugates that the family does not write.
inline bool is_special(const Tensor& t) { return t.defined() && (t.is_complex() || t._fw_grad(/*level=*/0).defined()); }
inline bool is_special(const OptionalTensor& t) { return t && is_special(*t); }
inline bool needs_grad(const Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool needs_grad(const OptionalTensor& t) { return t && needs_grad(*t); }

// The key is included only while a transform is active; functorch's own thread-local state stays after its first use.
template <typename... Tensors>
bool takes_composite(const Tensors&... tensors) {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
         (is_special(tensors) || ...);
}

template <typename... Tensors>
bool takes_function(const Tensors&... tensors) {
  return c10::GradMode::is_enabled() && (needs_grad(tensors) || ...);
}

inline std::vector<int64_t> all_but(int64_t dim, int64_t rank) {
  std::vector<int64_t> dims;
  for (int64_t i = 0; i < rank; ++i) {
    if (i != dim) dims.push_back(i);
  }
  return dims;
}

inline Tensor sum_to_last_dim(const Tensor& t) { return t.dim() > 1 ? t.sum(all_but(t.dim() - 1, t.dim())) : t; }

// The geometry of a convolution, between the dispatcher's arguments and the node's saved data.
struct SymGeometry {
  std::vector<c10::SymInt> stride, padding, dilation;
  bool transposed;
  std::vector<c10::SymInt> output_padding;
  c10::SymInt groups;

  // As one list, each part after its length: every entry of saved_data costs an allocation and more.
  void save(AutogradContext* ctx) const {
    std::vector<c10::SymInt> numbers = {transposed, groups};
    for (const auto* part : {&stride, &padding, &dilation, &output_padding}) {
      numbers.emplace_back(static_cast<int64_t>(part->size()));
      numbers.insert(numbers.end(), part->begin(), part->end());
    }
    ctx->saved_data["geometry"] = std::move(numbers);
  }
  static SymGeometry load(AutogradContext* ctx) {
    const std::vector<c10::SymInt> numbers = ctx->saved_data["geometry"].toSymIntVector();
    auto at = numbers.begin() + 2;
    const auto part = [&] {
      const auto first = at + 1;
      at = first + at->expect_int();
      return std::vector<c10::SymInt>(first, at);
    };
    SymGeometry result = {part(), part(), part(), numbers[0].expect_int() != 0, {}, numbers[1]};
    result.output_padding = part();
    return result;
  }
  // The operation with these numbers after its other arguments.
  template <typename Operator, typename... Arguments>
  Tensor call(const Operator& op, const Arguments&... arguments) const {
    return op.call(arguments..., stride, padding, dilation, transposed, output_padding, groups);
  }
};

// The gradient of a convolution's bias. An input without channels has an output without channels, however many the bias
// has.
inline Tensor sum_to_channels(const Tensor& grad_output, const c10::SymInt& channels) {
  return grad_output.sym_size(1) == channels ? grad_output.sum(all_but(1, grad_output.dim()))
                                             : grad_output.new_zeros_symint(channels);
}

}  // namespace masked_ops
