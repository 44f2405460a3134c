#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "operator.h"

namespace dynloss {

// What estimators of a whole spectrum are made of. `poll` is called before every product and may throw; a
// product that is not finite throws std::runtime_error.

// The Gauss quadrature of the spectral measure of a vector (Golub & Welsch 1969).
struct Quadrature {
  std::vector<double> nodes;    // (m,), ascending, m <= steps: less where the Krylov space ends before
  std::vector<double> weights;  // (m,), of sum 1
  double asymmetry = 0.0;       // of H beyond noise, in units of ‖H‖
};

// By Lanczos with full reorthogonalisation, at one small read per step. start: not zero.
Quadrature gauss_quadrature(SymmetricOperator& op, const at::Tensor& start, int64_t steps,
                            const std::function<void()>& poll);

// With Q the range of H on some random vectors, orthonormalised, the trace of H on Q, and zᵀ H z for random z
// of ±1 without their part in Q.
struct TraceSamples {
  double on_range = 0.0;
  std::vector<double> beside_it;
  double asymmetry =
      0.0;  // of H beyond noise, in units of its Frobenius norm: the others are worth nothing then
};

// range: random vectors that span Q, none for Hutchinson's estimator; at most op.dimension(), where nothing
// is beside it. Products: 2 range + samples. generator: on the CPU.
TraceSamples sample_trace(SymmetricOperator& op, int64_t range, int64_t samples,
                          const at::Generator& generator, const std::function<void()>& poll);

}  // namespace dynloss
