// Each kernel's own check: at its first use on a device, a few small cases with tails in every dimension against
// torch's operations, on whole numbers, which are exact in every dtype. It synchronises the device.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cstring>

#include "device_ops.h"

namespace masked_ops::device {
namespace {

constexpr at::ScalarType kFloats[] = {at::kFloat, at::kBFloat16, at::kHalf};

// Whole numbers from -2 to 2 that repeat in no period of a tile, without touching torch's generator.
at::Tensor whole(at::IntArrayRef sizes, int64_t seed, at::ScalarType dtype, c10::Device device) {
  const int64_t n = c10::multiply_integers(sizes);
  const at::Tensor i = at::arange(n, at::TensorOptions(at::kLong).device(device));
  return i.mul(2654435761 + 2 * seed).bitwise_right_shift(13).remainder(5).sub(2).to(dtype).view(sizes);
}

struct Case {
  const Api& api;
  at::Tensor mask;  // bool
  Packed packed;
  cuda::MaskFacts facts{};
  at::Tensor offsets;

  // A fifth of all weights, or of these.
  Case(const Api& functions, int64_t rows, int64_t cols, bool few, c10::Device device)
      : api(functions), mask(whole({rows, cols}, 1, at::kFloat, device).eq(1)) {
    if (few) mask.logical_and_(whole({rows, cols}, 6, at::kFloat, device).eq(1));
    packed = pack_mask(api, mask, rows, cols);
    const at::Tensor host = packed.facts.cpu();
    std::memcpy(&facts, host.const_data_ptr<int64_t>(), sizeof(facts));
    offsets = row_offsets(api, packed.words, rows, cols);
  }
  int64_t rows() const { return mask.size(0); }
  int64_t cols() const { return mask.size(1); }
  at::Tensor masked(const at::Tensor& weight) const { return at::where(mask, weight, at::Scalar(0)); }
};

std::string check_facts(const Case& c) {
  const at::Tensor live_rows = c.mask.any(1).sum(), live_cols = c.mask.any(0).sum();
  const bool right = c.facts.nnz == c.mask.sum().item<int64_t>() && !c.facts.soft &&
                     c.facts.live_rows == live_rows.item<int64_t>() && c.facts.live_cols == live_cols.item<int64_t>();
  return right ? "" : "facts of a mask are wrong";
}

std::string check_mask_copy(const Case& c) {
  const c10::Device device = c.mask.device();
  if (std::string wrong = check_facts(c); !wrong.empty()) return wrong;
  for (const at::ScalarType dtype : {at::kByte, at::kHalf, at::kFloat, at::kDouble, at::kComplexDouble}) {
    const at::Tensor weight = whole({c.rows(), c.cols()}, 3, at::kFloat, device).to(dtype);
    const at::Tensor out = at::zeros_like(weight).fill_(7);
    mask_copy(c.api, copy_kind(dtype, dtype), weight, c.packed.words, c.rows(), c.cols(), out);
    if (!out.equal(c.masked(weight))) return "a masked copy is wrong";
    // In place, as gradients are masked.
    mask_copy(c.api, copy_kind(dtype, dtype), weight, c.packed.words, c.rows(), c.cols(), weight);
    if (!weight.equal(out)) return "masking in place is wrong";
  }
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    const at::Tensor weight = whole({c.rows(), c.cols()}, 3, at::kFloat, device);
    const at::Tensor narrow = at::zeros_like(weight, dtype), wide = at::zeros_like(weight);
    mask_copy(c.api, copy_kind(at::kFloat, dtype), weight, c.packed.words, c.rows(), c.cols(), narrow);
    mask_copy(c.api, copy_kind(dtype, at::kFloat), weight.to(dtype), c.packed.words, c.rows(), c.cols(), wide);
    if (!narrow.equal(c.masked(weight).to(dtype))) return "a masked copy that rounds is wrong";
    if (!wide.equal(c.masked(weight))) return "a masked copy that widens is wrong";
  }
  const at::Tensor soft = whole({c.rows(), c.cols()}, 5, at::kFloat, device);
  const at::Tensor facts = pack_mask(c.api, soft, c.rows(), c.cols()).facts.cpu();
  return facts.const_data_ptr<int64_t>()[1] ? "" : "a soft mask is taken for a binary one";
}

at::Tensor bits_of(const at::Tensor& mask) {
  const int64_t bytes = (mask.size(1) + 7) / 8;
  at::Tensor padded = at::zeros({mask.size(0), 8 * bytes}, mask.options().dtype(at::kByte));
  padded.narrow(1, 0, mask.size(1)).copy_(mask);
  const at::Tensor shifts = at::arange(8, padded.options());
  return padded.view({mask.size(0), bytes, 8}).bitwise_left_shift(shifts).sum(2, /*keepdim=*/false, at::kByte);
}

std::string check_packed(const Case& c) {
  const c10::Device device = c.mask.device();
  const Packed packed = pack_bits(c.api, bits_of(c.mask), c.cols());
  if (!packed.words.equal(c.packed.words)) return "packed bits are read wrong";
  if (!packed.facts.equal(c.packed.facts)) return "facts of packed bits are wrong";
  for (const at::ScalarType dtype : {at::kByte, at::kHalf, at::kFloat, at::kDouble}) {
    const at::Tensor weight = whole({c.rows(), c.cols()}, 3, at::kFloat, device).to(dtype);
    const at::Tensor values = compress(c.api, weight, c.packed.words, c.offsets, c.facts.nnz);
    if (!values.equal(weight.masked_select(c.mask))) return "packing values is wrong";
    const at::Tensor back = expand(c.api, values, c.packed.words, c.offsets, c.rows(), c.cols());
    if (!back.equal(c.masked(weight))) return "unpacking values is wrong";
  }
  return "";
}

std::string check_decode(const Case& c) {
  const c10::Device device = c.mask.device();
  const at::Tensor index = decode_index(c.api, c.packed.words, c.rows(), c.cols(), c.facts.nnz, c.offsets);
  if (!index.defined()) return "it has no index of a small mask";
  for (const at::ScalarType dtype : kFloats) {
    const at::Tensor weight = whole({c.rows(), c.cols()}, 3, dtype, device), bias = whole({c.rows()}, 4, dtype, device);
    const at::Tensor values = weight.masked_select(c.mask);
    for (const int64_t M : {1, 5, 16, 64}) {
      const at::Tensor x = whole({M, c.cols()}, M, dtype, device);
      const at::Tensor y = decode(c.api, x, values, index, c.rows(), bias);
      if (!y.defined()) return "it refuses a small case";
      if (!y.equal(at::linear(x, c.masked(weight), bias))) return "its product is wrong";
    }
  }
  return "";
}

std::string check_laid_out(const Case& c, Form form) {
  const c10::Device device = c.mask.device();
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    const at::Tensor weight = whole({c.rows(), c.cols()}, 3, dtype, device), bias = whole({c.rows()}, 4, dtype, device);
    const Layout layout = lay_out(c.api, form, c.packed.words, c.offsets, c.rows(), c.cols());
    const at::Tensor values = weight.masked_select(c.mask);
    const at::Tensor data = fill(c.api, form, layout, c.packed.words, c.offsets, c.cols(), values);
    for (const int64_t M : {1, 2, 4, 16, 19}) {
      if (form == Form::kSlices && M > cuda::kMostSlicedRows) break;
      const at::Tensor x = whole({M, c.cols()}, M, dtype, device);
      const at::Tensor y = decode(c.api, form, x, layout, data, c.rows(), bias);
      if (!y.defined()) return "it refuses a small case";
      if (!y.equal(at::linear(x, c.masked(weight), bias))) return "its product is wrong";
    }
  }
  return "";
}

std::string check_grad_weight(const Case& c) {
  const c10::Device device = c.mask.device();
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    for (const int64_t M : {1, 70, 300, 1200}) {
      const at::Tensor dy = whole({M, c.rows()}, M, dtype, device), x = whole({M, c.cols()}, 3, dtype, device);
      const at::Tensor expected = c.masked(at::matmul(dy.to(at::kFloat).t(), x.to(at::kFloat)));
      for (const at::ScalarType output : {dtype, at::kFloat}) {
        const at::Tensor dw = at::zeros({c.rows(), c.cols()}, dy.options().dtype(output)).fill_(7);
        if (!gemm_grad_weight(c.api, dy, x, c.packed.words, dw)) return "it refuses a small case";
        if (!dw.equal(expected.to(output))) return "its grad_weight is wrong";
      }
    }
  }
  return "";
}

std::string check_gemm(const Case& c, Kernel kernel) {
  const c10::Device device = c.mask.device();
  for (const bool transposed : {false, true}) {
    const at::Tensor order = fragments(c.api, c.packed.words, c.rows(), c.cols(), transposed);
    for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
      const at::Tensor weight = whole({c.rows(), c.cols()}, 3, dtype, device);
      const at::Tensor bias = transposed ? at::Tensor() : whole({c.rows()}, 4, dtype, device);
      for (const int64_t M : {1, 70, 300}) {
        const at::Tensor x = whole({M, transposed ? c.rows() : c.cols()}, M, dtype, device);
        const at::Tensor y = gemm(c.api, kernel, transposed, x, weight, order, bias);
        if (!y.defined()) return "it refuses a small case";
        const at::Tensor masked = c.masked(weight);
        const at::Tensor expected = transposed ? at::matmul(x, masked) : at::linear(x, masked, bias);
        if (!y.equal(expected)) return transposed ? "its grad_input is wrong" : "its product is wrong";
      }
    }
  }
  return "";
}

}  // namespace

std::string check(const Api& api, Kernel kernel, c10::Device device) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  try {
    for (const auto [rows, cols] : {std::pair<int64_t, int64_t>{37, 83}, {136, 200}, {328, 520}, {24, 4504}}) {
      // Long rows, of which clusters of blocks have a part each, and groups of four steps.
      const bool more_than_a_segment = cols > cuda::kGatherColumns;
      if (more_than_a_segment && kernel != Kernel::kDecodeGathered) continue;
      const Case c(api, rows, cols, more_than_a_segment, device);
      std::string wrong;
      switch (kernel) {
        case Kernel::kMaskCopy:
          wrong = check_mask_copy(c);
          break;
        case Kernel::kPacked:
          wrong = check_packed(c);
          break;
        case Kernel::kDecode:
          wrong = check_decode(c);
          break;
        case Kernel::kDecodeSliced:
          if (cols % 2 == 0) wrong = check_laid_out(c, Form::kSlices);
          break;
        case Kernel::kDecodeGathered:
          if (cols % 8 == 0) wrong = check_laid_out(c, Form::kGathered);
          break;
        case Kernel::kGemmSm80:
        case Kernel::kGemmSm90:
          if (rows % 8 == 0) wrong = check_gemm(c, kernel);
          if (rows % 8 == 0 && wrong.empty() && kernel == Kernel::kGemmSm90) wrong = check_grad_weight(c);
          break;
      }
      if (!wrong.empty()) return wrong;
    }
    return "";
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
}

}  // namespace masked_ops::device
