#include "quadrature.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/linalg_vector_norm.h>

#include <algorithm>
#include <stdexcept>

#include "projected.h"
#include "ritz_basis.h"

namespace dynloss {

Quadrature lanczos_quadrature(SymmetricOperator& op, const at::Tensor& x, int64_t steps,
                              const std::function<void()>& poll) {
  const at::NoGradGuard no_grad;
  RitzBasis basis(std::min(steps, op.size()), op.size(), op.options());
  at::Tensor next = x;
  while (basis.size() < basis.capacity() &&
         basis.propose(next, to_host(at::linalg_vector_norm(next)).front()) > 0.0) {
    poll();
    if (!basis.accept(op.apply(basis.candidate()))) {
      throw std::runtime_error(
          "a product H v is not finite: the loss overflows or is NaN at these parameters");
    }
    next = basis.product(basis.size() - 1);
  }
  EigenPairs pairs = symmetric_eigen(basis.projection(), basis.size());
  Quadrature rule{std::move(pairs.values), {}};
  for (int64_t i = 0; i < basis.size(); ++i) {
    const double first = pairs.vectors[i * basis.size()];
    rule.weights.push_back(first * first);
  }
  return rule;
}

}  // namespace dynloss
