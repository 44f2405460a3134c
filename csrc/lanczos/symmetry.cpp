#include "symmetry.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

namespace dynloss {
namespace {

// A callable may be as inexact as the tolerance, but not more than this.
constexpr double kMaxInexactness = 0.01;
// So many products say that it is no noise: what is quantised may be absent from some of them.
constexpr int kMaxProducts = 4;
// The asymmetry that noise explains, in units of its length within the rows. No symmetric Hessian of a
// network needs more than 4, in float32, float64 or bfloat16, however ill-conditioned; one with a layer whose
// second derivative is wrong more than 1e4, except in bfloat16.
constexpr double kExplained = 10.0;

}  // namespace

double Projection::asymmetry() const {
  const int64_t m = v.count() + (last ? 1 : 0);
  double largest = 0.0;
  for (int64_t i = 0; i < m * m; ++i) {
    largest = std::max(largest, std::abs(entries[i] - entries[i % m * m + i / m]));
  }
  return largest;
}

SymmetryCheck::SymmetryCheck(const SymmetricOperator& op, double tolerance)
    : negligible_(std::pow(rounding_of(op.options()), 2.0 / 3.0)) {
  if (!op.is_differentiated()) negligible_ = std::max(negligible_, std::min(tolerance, kMaxInexactness));
}

bool SymmetryCheck::fails(double asymmetry, double norm, const Projection& projection,
                          const Multiply& multiply) {
  const auto& [v, entries, unit, last] = projection;
  if (asymmetry <= std::max(negligible_ * norm, 2.0 * explained_ * unit)) return false;
  const int64_t m = v.count() + (last ? 1 : 0);
  std::mt19937_64 random(0);
  std::normal_distribution<double> normal;
  for (int i = 0; i < kMaxProducts; ++i) {
    std::vector<double> c(m);
    for (double& x : c) x = normal(random);
    const double length = std::sqrt(std::inner_product(c.begin(), c.end(), c.begin(), 0.0));
    for (double& x : c) x /= length;
    const at::Tensor weights = to_device(c, m, v.matrix());
    const at::Tensor x = combinations(weights.narrow(1, 0, v.count()), v);
    if (last) x.addcmul_(weights.narrow(1, v.count(), 1), last->tensor());
    const at::Tensor product = multiply(x.select(0, 0));
    std::vector<at::Tensor> wanted{inner_products(v, product)};
    if (last) wanted.push_back(inner_products(*last, product));
    const std::vector<double> overlaps = to_host(wanted);
    double noise = 0.0;
    for (int64_t j = 0; j < m; ++j) {
      noise = std::hypot(noise,
                         unit * overlaps[j] - std::inner_product(c.begin(), c.end(), &entries[j * m], 0.0));
    }
    if (asymmetry > kExplained * noise)
      continue;  // not where a product is not finite, for others to find out
    explained_ = asymmetry / unit;
    return false;
  }
  return true;
}

}  // namespace dynloss
