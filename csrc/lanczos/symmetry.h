#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <vector>

#include "operator.h"
#include "row_algebra.h"

namespace dynloss {

// A projection of an operator, V H Vᵀ, row-major, `unit` times as large as it is, where V are the rows of v
// and perhaps one more.
struct Projection {
  Rows v;
  std::vector<double> entries;
  double unit;
  std::optional<Rows> last = std::nullopt;

  double asymmetry() const;  // max |T[i, j] - T[j, i]|, in the unit
};

// Tells an operator that is not symmetric from one with noisy products.
class SymmetryCheck {
 public:
  using Multiply = std::function<at::Tensor(const at::Tensor&)>;

  SymmetryCheck(const SymmetricOperator& op, double tolerance);

  // Whether the noise of products fails to explain an asymmetry seen in the projection. The noise is how far
  // the product with a random combination of the rows, rounded at random where that can be had, is from the
  // combination of their products: next to nothing for a linear map that is not symmetric. There are no such
  // products where the asymmetry is negligible beside the norm of the operator, or was explained before.
  bool fails(double asymmetry, double norm, const Projection& projection, const Multiply& multiply);

 private:
  double negligible_;       // in units of the norm
  double explained_ = 0.0;  // asymmetry
};

}  // namespace dynloss
