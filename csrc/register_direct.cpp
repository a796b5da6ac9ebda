// Operations as functions of Python: torch.ops boxes and unboxes the arguments of each call, which takes 0.7 us of the
// 2 us that a small layer runs for. Calls with other arguments than plain tensors and under torch function modes go
// there all the same.
#include "register_direct.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>

#include "autograd.h"

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

template <PyObject* (*kFunction)(PyObject*, PyObject* const*, Py_ssize_t)>
PyCFunction as_method() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(kFunction));
}

PyMethodDef methods[] = {
    {"linear", as_method<linear_direct>(), METH_FASTCALL, "masked_ops::linear(input, weight, mask, bias)"},
    {"packed_linear", as_method<packed_linear_direct>(), METH_FASTCALL,
     "masked_ops::packed_linear(input, values, bits, in_features, bias)"},
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
