#pragma once

#include <pybind11/pybind11.h>

namespace masked_ops {

// Adds the functions to the Python module; to be called once set_boxed was.
void define_direct(const pybind11::module_& m);

}  // namespace masked_ops
