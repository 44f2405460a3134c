#pragma once

#include <ATen/core/Generator.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "operator.h"

namespace dynloss {

// What estimators of the trace are made of: with Q the range of H on some random vectors, orthonormalised,
// the trace of H on Q, and zᵀ H z for random z of ±1 without their part in Q.
struct TraceSamples {
  double on_range = 0.0;
  std::vector<double> beside_it;
};

// range: random vectors that span Q, none for Hutchinson's estimator; at most op.size(), where nothing is
// beside it. Products: 2 range + samples. generator: on the CPU. poll is called before every product and may
// throw. Throws std::runtime_error on a non-finite product.
TraceSamples sample_trace(SymmetricOperator& op, int64_t range, int64_t samples,
                          const at::Generator& generator, const std::function<void()>& poll);

}  // namespace dynloss
