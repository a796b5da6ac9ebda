#pragma once

#include <pybind11/pybind11.h>

namespace masked_ops {

// Adds the functions to the Python module, and set_boxed, which has to be called before they are.
void define_direct(const pybind11::module_& m);

}  // namespace masked_ops
