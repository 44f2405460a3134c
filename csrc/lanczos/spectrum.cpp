#include "spectrum.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "row_algebra.h"
#include "small_eigen.h"

namespace dynloss {
namespace {

void check_finite(double x) {
  if (!std::isfinite(x)) throw std::runtime_error("H: expected finite products, got one that is not finite");
}

// The row becomes H v in a unit in which no square overflows or vanishes, which is returned.
double multiply_into(const Rows& row, SymmetricOperator& op, const at::Tensor& v,
                     const std::function<void()>& poll) {
  poll();
  assign(row, op.apply(v));
  const double unit = scale_into_range(row);
  check_finite(unit);
  return unit;
}

// What is less than this share of what it is left of is mere rounding.
double negligible_share(const SymmetricOperator& op) { return 10.0 * rounding_of(op.options()); }

// Nodes and weights from the Lanczos matrix.
Quadrature quadrature_of(const std::vector<double>& alpha, const std::vector<double>& beta) {
  const EigenPairs pairs = tridiagonal_eigen(alpha, beta, 1);
  std::vector<size_t> order(alpha.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return pairs.values[a] < pairs.values[b]; });
  Quadrature out;
  for (const size_t i : order) {
    out.nodes.push_back(pairs.values[i]);
    out.weights.push_back(pairs.vectors[i] * pairs.vectors[i]);
  }
  return out;
}

}  // namespace

Quadrature gauss_quadrature(SymmetricOperator& op, const at::Tensor& start, int64_t steps,
                            const std::function<void()>& poll) {
  const at::NoGradGuard no_grad;
  const int64_t limit = std::min(steps, op.size());
  // One row more than there are Lanczos vectors, for the last product.
  const at::Tensor rows = at::empty({limit + 1, op.size()}, op.options());
  const Rows first(rows, 0, 1);
  assign(first, start);
  normalise(first, 0.0);
  std::vector<double> alpha, beta;
  double unit = 1.0, largest = 0.0;
  for (int64_t j = 0; j < limit; ++j) {
    const Rows known(rows, 0, j + 1), slot(rows, j + 1, 1);
    const at::Tensor v = Rows(rows, j, 1).vector();
    if (j == 0) {
      unit = multiply_into(slot, op, v, poll);
    } else {
      poll();
      assign(slot, op.apply(v), unit);
    }
    const at::Tensor overlaps = inner_products(known, slot);
    orthogonalise(slot, slot, overlaps, known);
    const std::vector<double> read = to_host({overlaps.narrow(0, j, 1), lengths(slot)});
    const double diagonal = read[0], next = read[1];
    check_finite(diagonal);
    check_finite(next);
    alpha.push_back(diagonal / unit);
    largest = std::max({largest, std::abs(diagonal), next});
    // Where nothing is left of the product, the space is invariant, and its spectrum is known exactly.
    if (j + 1 == limit || next <= negligible_share(op) * largest) break;
    beta.push_back(next / unit);
    assign(slot, slot, 1.0 / next);
  }
  return quadrature_of(alpha, beta);
}

TraceSamples sample_trace(SymmetricOperator& op, int64_t range, int64_t samples,
                          const at::Generator& generator, const std::function<void()>& poll) {
  const at::NoGradGuard no_grad;
  const at::Tensor rows = at::empty({range + 1, op.size()}, op.options());  // Q, and room for one product
  const auto quadratic_form = [&](const at::Tensor& v) {
    const Rows product(rows, range, 1);
    const double unit = multiply_into(product, op, v, poll);
    return to_host({inner_products(v, product)}).front() / unit;
  };
  for (int64_t i = 0; i < range; ++i) {
    const Rows known(rows, 0, i), slot(rows, i, 1);
    const auto extend = [&] {  // by the slot; false where Q has all of it but mere rounding
      const at::Tensor before = lengths(slot);
      if (i > 0) orthogonalise(slot, slot, known);
      const std::vector<double> read = to_host({before, lengths(slot)});
      if (!(read[1] > negligible_share(op) * read[0])) return false;
      assign(slot, slot, 1.0 / read[1]);
      return true;
    };
    multiply_into(slot, op, random_signs(op, generator), poll);
    // Where Q holds the whole range of H, any direction will do.
    while (!extend()) assign(slot, random_normal(op, generator));
  }
  TraceSamples out;
  for (int64_t i = 0; i < range; ++i) out.on_range += quadratic_form(Rows(rows, i, 1).vector());
  if (range == op.size()) return out;
  for (int64_t i = 0; i < samples; ++i) {
    const at::Tensor z = random_signs(op, generator);
    if (range > 0) orthogonalise(z, z, Rows(rows, 0, range));
    out.beside_it.push_back(quadratic_form(z));
  }
  return out;
}

}  // namespace dynloss
