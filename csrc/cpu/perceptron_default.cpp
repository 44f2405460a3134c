// The portable perceptron kernels: 16-byte vectors, which every x86-64 and aarch64 has.
#define VECTOR_BYTES 16
#include "cpu/perceptron_kernel.h"
#include "cpu/target.h"

DYNLOSS_TARGET_BEGIN
#include "cpu/perceptron_kernels.h"
DYNLOSS_TARGET_END

namespace dynloss::cpu {

const PerceptronKernels<float> default_perceptron_f32 = portable::perceptron_kernels_of<float>;
const PerceptronKernels<double> default_perceptron_f64 = portable::perceptron_kernels_of<double>;

}  // namespace dynloss::cpu
