#pragma once

#include <pybind11/pybind11.h>

namespace dynloss {

// Adds the Lanczos driver and the operators it can drive to the extension module.
void bind_lanczos(pybind11::module_& module);

}  // namespace dynloss
