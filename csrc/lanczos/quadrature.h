#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "operator.h"

namespace dynloss {

// Gauss quadrature of the spectral measure of H seen from a vector x: xᵀ f(H) x / xᵀ x ≈ Σ weights[i]
// f(nodes[i]), exact for polynomials up to degree 2 steps - 1 (Golub & Meurant 1994).
struct Quadrature {
  std::vector<double> nodes;    // ascending
  std::vector<double> weights;  // positive, sum 1
};

// By Lanczos with full reorthogonalisation; fewer nodes than steps where the Krylov space of x is exhausted.
// Throws std::runtime_error for a product that is not finite.
Quadrature lanczos_quadrature(SymmetricOperator& op, const at::Tensor& x, int64_t steps,
                              const std::function<void()>& poll);

}  // namespace dynloss
