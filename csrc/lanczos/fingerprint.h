#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace dynloss {

// Of float32 or float64 tensors, one integer each: (tensors,) int64, on their device. It is Σ w_i f_i modulo
// 2⁶⁴, where the w_i are the 32-bit words of the values, in the order of memory for dense tensors on the host
// and in that of the indices elsewhere, and f_i is an odd factor for each place. So it knows no rounding, no
// NaN and no order of summation, but which values are at which place.
at::Tensor fingerprints(const std::vector<at::Tensor>& tensors);

}  // namespace dynloss
