#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "operator.h"

namespace dynloss {

// Qᵀ H Q of the Krylov space of a start vector: its eigenvalues are the nodes of the Gauss quadrature of the
// spectral measure of that vector, and the squared first components of its eigenvectors the weights
// (Golub & Meurant 1994).
struct Tridiagonal {
  std::vector<double> diagonal;      // (m,), m <= steps: less where the space is invariant before
  std::vector<double> off_diagonal;  // (m - 1,)
};

// Lanczos with full reorthogonalisation (classical Gram-Schmidt, twice); one small read per step. start:
// (P,), not zero. poll is called before every product and may throw. Throws std::runtime_error on a
// non-finite product.
Tridiagonal tridiagonalize(SymmetricOperator& op, const at::Tensor& start, int64_t steps,
                           const std::function<void()>& poll);

}  // namespace dynloss
