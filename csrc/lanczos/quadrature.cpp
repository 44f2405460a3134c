#include "quadrature.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace dynloss {

Tridiagonal tridiagonalize(SymmetricOperator& op, const at::Tensor& start, int64_t steps,
                           const std::function<void()>& poll) {
  const int64_t limit = std::min(steps, op.size());
  const at::Tensor basis = at::empty({limit, op.size()}, op.options());
  basis.select(0, 0).copy_(start.div(at::linalg_vector_norm(start)));
  const double epsilon = start.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                            : std::numeric_limits<float>::epsilon();
  Tridiagonal result;
  double scale = 0;
  for (int64_t j = 0; j < limit; ++j) {
    poll();
    const at::Tensor known = basis.narrow(0, 0, j + 1);
    at::Tensor w = op.apply(basis.select(0, j));
    const at::Tensor first = at::mv(known, w);
    w = w.sub(at::mv(known.t(), first));
    w = w.sub(at::mv(known.t(), at::mv(known, w)));
    const at::Tensor norm = at::linalg_vector_norm(w);
    const at::Tensor read = at::stack({first.select(0, j), norm}).to(at::kDouble).cpu();
    const double diagonal = read.const_data_ptr<double>()[0], next = read.const_data_ptr<double>()[1];
    if (!std::isfinite(diagonal) || !std::isfinite(next)) {
      throw std::runtime_error("a product with the operator is not finite");
    }
    result.diagonal.push_back(diagonal);
    scale = std::max({scale, std::abs(diagonal), next});
    // What is left of w is rounding: the space is invariant, and its spectrum is known exactly.
    if (j + 1 == limit || next <= 10 * epsilon * scale) break;
    result.off_diagonal.push_back(next);
    basis.select(0, j + 1).copy_(w.div(norm));
  }
  return result;
}

}  // namespace dynloss
