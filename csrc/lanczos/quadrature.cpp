#include "quadrature.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "row_algebra.h"

namespace dynloss {

Tridiagonal tridiagonalize(SymmetricOperator& op, const at::Tensor& start, int64_t steps,
                           const std::function<void()>& poll) {
  const int64_t limit = std::min(steps, op.size());
  // One row more than there are Lanczos vectors, for the last product.
  const at::Tensor rows = at::empty({limit + 1, op.size()}, op.options());
  const double epsilon = start.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                            : std::numeric_limits<float>::epsilon();
  const Rows first(rows, 0, 1);
  copy(first, start);
  normalise(first, 0.0);
  Tridiagonal result;
  double unit = 1.0;  // in which no square of a product overflows or vanishes
  double largest = 0.0;
  for (int64_t j = 0; j < limit; ++j) {
    poll();
    const Rows known(rows, 0, j + 1), slot(rows, j + 1, 1);
    const at::Tensor product = op.apply(Rows(rows, j, 1).vector());
    if (j == 0) {
      unit = normalising_power_of_two(product);
      if (unit == 0.0) unit = 1.0;
    }
    copy(slot, product);
    scale(slot, unit);
    const at::Tensor overlaps = inner_products(known, slot);
    subtract_combination(slot, slot, overlaps, known);
    subtract_combination(slot, slot, inner_products(known, slot), known);
    const std::vector<double> read = to_host({overlaps.narrow(0, j, 1), lengths(slot)});
    const double diagonal = read[0], next = read[1];
    if (!std::isfinite(diagonal) || !std::isfinite(next)) {
      throw std::runtime_error("a product with the operator is not finite");
    }
    result.diagonal.push_back(diagonal / unit);
    largest = std::max({largest, std::abs(diagonal), next});
    // What is left of the product is rounding: the space is invariant, and its spectrum is known exactly.
    if (j + 1 == limit || next <= 10 * epsilon * largest) break;
    result.off_diagonal.push_back(next / unit);
    scale(slot, 1.0 / next);
  }
  return result;
}

}  // namespace dynloss
