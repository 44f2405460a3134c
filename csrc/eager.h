// Plain eager calls of the forward ops, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace dynloss {

// Adds cross_entropy and cross_entropy_with_gradient to the module.
void bind_eager(pybind11::module_& module);

}  // namespace dynloss
