// Operations as functions of Python: torch.ops boxes and unboxes the arguments of each call, which takes 0.7 us of the
// 2 us that a small linear layer runs for, and 3 us of a convolution with its lists of numbers. Calls with other
// arguments than plain tensors and under torch function modes go there all the same.
#include "register_direct.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/add.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <limits>
#include <optional>

#include "autograd.h"
#include "autograd_common.h"

namespace py = pybind11;

namespace masked_ops {
namespace {

// The operations of torch.ops, by the functions below; never freed.
enum Operation { kLinear, kPackedLinear, kOperations };
PyObject* boxed[kOperations];

PyObject* call_boxed(Operation operation, PyObject* const* args, Py_ssize_t n) {
  return PyObject_Vectorcall(boxed[operation], args, static_cast<size_t>(n), nullptr);
}

// Whether nobody but the dispatcher has a say in a call with these tensors and with this one, if it is not None.
bool are_plain(PyObject* const* tensors, int n, PyObject* optional) {
  for (int i = 0; i < n; ++i) {
    if (!THPVariable_CheckExact(tensors[i])) return false;
  }
  return (optional == Py_None || THPVariable_CheckExact(optional)) && !at::impl::torch_function_mode_enabled();
}

std::optional<at::Tensor> optional_tensor(PyObject* object) {
  return object == Py_None ? std::nullopt : std::optional<at::Tensor>(THPVariable_Unpack(object));
}

template <typename Call>
PyObject* without_gil(const Call& call) {
  at::Tensor result;
  {
    const py::gil_scoped_release release;
    result = call();
  }
  return THPVariable_Wrap(std::move(result));
}

// (input, weight, mask, bias)
PyObject* linear_direct(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  if (n != 4 || !are_plain(args, 3, args[3])) return call_boxed(kLinear, args, n);
  const at::Tensor input = THPVariable_Unpack(args[0]), weight = THPVariable_Unpack(args[1]),
                   mask = THPVariable_Unpack(args[2]);
  const auto bias = optional_tensor(args[3]);
  return without_gil([&] { return call_linear(input, weight, mask, bias); });
  END_HANDLE_TH_ERRORS
}

// (input, values, bits, in_features, bias)
PyObject* packed_linear_direct(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  if (n != 5 || !are_plain(args, 3, args[4]) || !PyLong_CheckExact(args[3])) {
    return call_boxed(kPackedLinear, args, n);
  }
  int overflow = 0;
  const int64_t in_features = PyLong_AsLongLongAndOverflow(args[3], &overflow);
  if (overflow) return call_boxed(kPackedLinear, args, n);
  const at::Tensor input = THPVariable_Unpack(args[0]), values = THPVariable_Unpack(args[1]),
                   bits = THPVariable_Unpack(args[2]);
  const auto bias = optional_tensor(args[4]);
  return without_gil([&] { return call_packed_linear(input, values, bits, in_features, bias); });
  END_HANDLE_TH_ERRORS
}

// Whether a product by input is done as it stands: autocast would cast, and the conjugate is not this family's.
bool multiplies_as_it_is(const at::Tensor& weight) {
  return !weight.is_complex() && !at::autocast::is_autocast_enabled(weight.device().type());
}

at::Tensor plus(const at::Tensor& y, const std::optional<at::Tensor>& bias) {
  if (!bias) return y;
  const bool in_place = computes_here(y, *bias) && !takes_composite(y, *bias) && bias->dim() == 1 && y.dim() > 0 &&
                        bias->size(0) == y.size(-1) && bias->scalar_type() == y.scalar_type();
  return in_place ? y.add_(*bias) : y.add(*bias);
}

// (input, weight, mask, bias); None, and nothing is done, unless it is a plain call.
PyObject* matmul_direct(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  if (n != 4 || !are_plain(args, 3, args[3])) Py_RETURN_NONE;
  const at::Tensor input = THPVariable_Unpack(args[0]), weight = THPVariable_Unpack(args[1]),
                   mask = THPVariable_Unpack(args[2]);
  if (!multiplies_as_it_is(weight)) Py_RETURN_NONE;
  const auto bias = optional_tensor(args[3]);
  return without_gil([&] { return plus(call_linear_grad_input(input, weight, mask), bias); });
  END_HANDLE_TH_ERRORS
}

// (input, values, bits, out_features, bias); as above.
PyObject* packed_matmul_direct(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  if (n != 5 || !are_plain(args, 3, args[4]) || !PyLong_CheckExact(args[3])) Py_RETURN_NONE;
  int overflow = 0;
  const int64_t out_features = PyLong_AsLongLongAndOverflow(args[3], &overflow);
  const at::Tensor input = THPVariable_Unpack(args[0]), values = THPVariable_Unpack(args[1]),
                   bits = THPVariable_Unpack(args[2]);
  if (overflow || !multiplies_as_it_is(values)) Py_RETURN_NONE;
  const auto bias = optional_tensor(args[4]);
  return without_gil([&] { return plus(call_packed_linear_grad_input(input, values, bits, out_features), bias); });
  END_HANDLE_TH_ERRORS
}

// At most kMost numbers that no check of the operation's could refuse for their size.
class Numbers {
 public:
  // n of them, from a tuple or a list of n, or from one for all; false if the object is something else.
  bool read(PyObject* object, Py_ssize_t n) {
    const bool many = PyTuple_Check(object) || PyList_Check(object);  // torch.Size is a tuple
    if (n > kMost || (many && PySequence_Fast_GET_SIZE(object) != n)) return false;
    size_ = static_cast<size_t>(n);
    for (Py_ssize_t i = 0; i < n; ++i) {
      if (!read_one(many ? PySequence_Fast_GET_ITEM(object, i) : object, values_[static_cast<size_t>(i)])) return false;
    }
    return true;
  }
  c10::SymIntArrayRef get() const {
    return c10::fromIntArrayRefKnownNonNegative(at::IntArrayRef(values_.data(), size_));
  }
  static bool read_one(PyObject* object, int64_t& value) {
    if (!PyLong_CheckExact(object)) return false;
    int overflow = 0;
    value = PyLong_AsLongLongAndOverflow(object, &overflow);
    return !overflow && value >= 0 && value <= std::numeric_limits<int32_t>::max();
  }

 private:
  static constexpr Py_ssize_t kMost = 5;
  std::array<int64_t, kMost> values_;
  size_t size_ = 0;
};

// The last six arguments of both functions below.
struct ConvolutionNumbers {
  Numbers stride, padding, dilation, output_padding;
  int64_t groups;
  bool transposed;

  bool read(PyObject* const* args, Py_ssize_t n) {
    if (!PyBool_Check(args[4])) return false;
    transposed = args[4] == Py_True;
    return stride.read(args[0], n) && padding.read(args[1], n) && dilation.read(args[2], n) &&
           Numbers::read_one(args[3], groups) && output_padding.read(args[5], n);
  }
};

// Of the number of dimensions of a convolution without batch and channels; 0 if it has no kernel.
int64_t dimensions(PyObject* object) {
  int64_t n = 0;
  return Numbers::read_one(object, n) && n <= 3 ? n : 0;
}

// (n, input, weight, mask, bias, stride, padding, dilation, groups, transposed, output_padding); None, and nothing is
// done, unless it is a plain call with a batch.
PyObject* convolution_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  ConvolutionNumbers numbers;
  if (count != 11 || !are_plain(args + 1, 3, args[4])) Py_RETURN_NONE;
  const int64_t n = dimensions(args[0]);
  if (n == 0 || !numbers.read(args + 5, n)) Py_RETURN_NONE;
  const at::Tensor input = THPVariable_Unpack(args[1]), weight = THPVariable_Unpack(args[2]),
                   mask = THPVariable_Unpack(args[3]);
  // The parts of a complex convolution are several.
  if (input.dim() != n + 2 || weight.dim() != n + 2 || weight.is_complex()) Py_RETURN_NONE;
  const auto bias = optional_tensor(args[4]);
  return without_gil([&] {
    return call_convolution(input, weight, mask, bias, numbers.stride.get(), numbers.padding.get(),
                            numbers.dilation.get(), numbers.transposed, numbers.output_padding.get(), numbers.groups);
  });
  END_HANDLE_TH_ERRORS
}

// (n, input, values, bits, weight_size, bias, stride, padding, dilation, groups, transposed, output_padding); as above.
PyObject* packed_convolution_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  ConvolutionNumbers numbers;
  Numbers size;
  if (count != 12 || !are_plain(args + 1, 3, args[5])) Py_RETURN_NONE;
  const int64_t n = dimensions(args[0]);
  const bool sequence = PyTuple_Check(args[4]) || PyList_Check(args[4]);
  if (n == 0 || !sequence || !size.read(args[4], n + 2) || !numbers.read(args + 6, n)) Py_RETURN_NONE;
  const at::Tensor input = THPVariable_Unpack(args[1]), values = THPVariable_Unpack(args[2]),
                   bits = THPVariable_Unpack(args[3]);
  if (input.dim() != n + 2) Py_RETURN_NONE;
  const auto bias = optional_tensor(args[5]);
  return without_gil([&] {
    return call_packed_convolution(input, values, bits, size.get(), bias, numbers.stride.get(), numbers.padding.get(),
                                   numbers.dilation.get(), numbers.transposed, numbers.output_padding.get(),
                                   numbers.groups);
  });
  END_HANDLE_TH_ERRORS
}

template <PyObject* (*kFunction)(PyObject*, PyObject* const*, Py_ssize_t)>
PyCFunction as_method() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(kFunction));
}

PyMethodDef methods[] = {
    {"linear", as_method<linear_direct>(), METH_FASTCALL, "masked_ops::linear(input, weight, mask, bias)"},
    {"packed_linear", as_method<packed_linear_direct>(), METH_FASTCALL,
     "masked_ops::packed_linear(input, values, bits, in_features, bias)"},
    {"matmul", as_method<matmul_direct>(), METH_FASTCALL, "matmul(input, weight, mask, bias)"},
    {"packed_matmul", as_method<packed_matmul_direct>(), METH_FASTCALL,
     "packed_matmul(input, values, bits, out_features, bias)"},
    {"convolution", as_method<convolution_direct>(), METH_FASTCALL,
     "convolution(n, input, weight, mask, bias, stride, padding, dilation, groups, transposed, output_padding)"},
    {"packed_convolution", as_method<packed_convolution_direct>(), METH_FASTCALL,
     "packed_convolution(n, input, values, bits, weight_size, bias, stride, padding, dilation, groups, transposed, "
     "output_padding)"},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void define_direct(const py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
  py::module_(m).def(
      "set_boxed",
      [](const py::object& linear, const py::object& packed_linear) {
        boxed[kLinear] = py::object(linear).release().ptr();
        boxed[kPackedLinear] = py::object(packed_linear).release().ptr();
      },
      py::arg("linear"), py::arg("packed_linear"),
      "The operations of torch.ops, for calls that the functions of the same names do not take.");
}

}  // namespace masked_ops
