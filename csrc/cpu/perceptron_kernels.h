// Included once per instruction set, as rows.h is and under the same conditions.

namespace dynloss::cpu::INSTRUCTION_SET {

#include "vector.h"
//
#include "perceptron_block.h"
//
#include "perceptron_few_planes.h"
//
#include "perceptron_member.h"

template <typename T>
constexpr PerceptronKernels<T> perceptron_kernels_of = {&evaluate_perceptron<T>, &multiply_perceptron<T>,
                                                        &descend<T>};

}  // namespace dynloss::cpu::INSTRUCTION_SET
