#include "binding.h"

namespace dynloss {

void bind_lanczos(pybind11::module_&) {}

}  // namespace dynloss
