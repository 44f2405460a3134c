// The portable perceptron kernels: 16-byte vectors, which every x86-64 and aarch64 has.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/cross_entropy_row.h"
#include "cpu/perceptron_kernel.h"

#define INSTRUCTION_SET portable
#define VECTOR_BYTES 16
#include "cpu/perceptron_kernels.h"

namespace dynloss::cpu {

const PerceptronKernels<float> default_perceptron_f32 = portable::perceptron_kernels_of<float>;
const PerceptronKernels<double> default_perceptron_f64 = portable::perceptron_kernels_of<double>;

}  // namespace dynloss::cpu
