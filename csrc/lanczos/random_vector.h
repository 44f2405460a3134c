#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include "operator.h"

namespace dynloss {

// Random vectors for an operator. The generator is on the CPU whatever the device, so that a seed stands for
// the same vectors everywhere.

// Normal numbers.
at::Tensor random_normal(const SymmetricOperator& op, const at::Generator& generator);

// Numbers of 1 and -1.
at::Tensor random_signs(const SymmetricOperator& op, const at::Generator& generator);

}  // namespace dynloss
