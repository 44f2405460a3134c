#include "ritz_basis.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "row_algebra.h"

namespace dynloss {
namespace {

// For the views; nothing here is ever differentiated.
using BelowAutograd = at::AutoDispatchBelowADInplaceOrView;

// The columns of rows, some at a time, such that `count` rows as short as a block are small beside one row:
// another set of whole rows would be the largest thing in memory.
std::vector<at::Tensor> blocks(const at::Tensor& rows, int64_t count) {
  const int64_t length = rows.size(1);
  const int64_t width = std::max<int64_t>(length / (8 * count), 16384);
  std::vector<at::Tensor> columns;
  for (int64_t first = 0; first < length; first += width) {
    columns.push_back(rows.narrow(1, first, std::min(width, length - first)));
  }
  return columns;
}

}  // namespace

RitzBasis::RitzBasis(int64_t capacity, int64_t length, const at::TensorOptions& options)
    : capacity_(capacity),
      length_(length),
      epsilon_(options.dtype() == at::kFloat ? std::numeric_limits<float>::epsilon()
                                             : std::numeric_limits<double>::epsilon()),
      rows_(at::empty({capacity, 2, length}, options)) {}

double RitzBasis::propose(const at::Tensor& x, double norm) {
  const BelowAutograd below;
  if (size_ == 0) {
    candidate().copy_(x);
  } else {
    const at::Tensor v = vectors(), slot = candidate();
    subtract_combination(slot, x, inner_products(v, x), v);
    subtract_combination(slot, slot, inner_products(v, slot), v);
  }
  return normalise(norm);
}

double RitzBasis::propose_product() {
  if (!product_overlaps_.defined()) return propose(product_, product_norm_);
  const BelowAutograd below;
  const at::Tensor v = vectors(), slot = candidate();
  subtract_combination(slot, product_, product_overlaps_, v);
  subtract_combination(slot, slot, inner_products(v, slot), v);
  return normalise(product_norm_);
}

double RitzBasis::propose_orthogonal(const at::Tensor& x, double norm) {
  const BelowAutograd below;
  const at::Tensor v = vectors();
  subtract_combination(candidate(), x, inner_products(v, x), v);
  return normalise(norm);
}

double RitzBasis::normalise(double norm) {
  const at::Tensor slot = candidate();
  const double remainder = norms(slot).front();
  // Below this what is left of x is rounding. (Also false for a norm that is not finite.)
  if (!(remainder > 100.0 * epsilon_ * norm)) return 0.0;
  scale(slot, 1.0 / remainder);
  return remainder;
}

std::vector<double> RitzBasis::overlaps(const at::Tensor& x) const {
  const BelowAutograd below;
  return to_host(inner_products(x, vectors()));
}

bool RitzBasis::accept(const at::Tensor& product) {
  const BelowAutograd below;
  const int64_t m = size_;
  const at::Tensor newest = pair(m);
  newest.select(0, 1).copy_(product);
  // Entry (i, a, b) is the inner product of {v_i, H v_i}[a] with {v, H v}[b].
  const at::Tensor gram = inner_products(rows_.narrow(0, 0, m + 1).view({2 * (m + 1), length_}), newest);
  const std::vector<double> inner = to_host(gram);
  const auto vector_product = [&](int64_t i) { return inner[4 * i + 1]; };
  const auto product_vector = [&](int64_t i) { return inner[4 * i + 2]; };
  // A NaN or an infinity in the product survives every inner product with it: 0 · inf is NaN.
  for (int64_t i = 0; i <= m; ++i) {
    if (!std::isfinite(vector_product(i)) || !std::isfinite(product_vector(i))) return false;
  }
  std::vector<double> grown((m + 1) * (m + 1));
  for (int64_t i = 0; i < m; ++i) {
    std::copy_n(&projection_[i * m], m, &grown[i * (m + 1)]);
    grown[i * (m + 1) + m] = vector_product(i);
    grown[m * (m + 1) + i] = product_vector(i);
    asymmetry_ = std::max(asymmetry_, std::abs(vector_product(i) - product_vector(i)));
  }
  grown[m * (m + 1) + m] = vector_product(m);
  product_ = newest.select(0, 1);
  product_overlaps_ = gram.view({m + 1, 2, 2}).select(1, 0).select(1, 1);
  product_norm_ = std::sqrt(inner[4 * m + 3]);
  projection_ = std::move(grown);
  ++size_;
  return true;
}

void RitzBasis::restart(const std::vector<double>& coefficients, const std::vector<double>& values) {
  const BelowAutograd below;
  const auto keep = static_cast<int64_t>(values.size());
  product_overlaps_.reset();
  const at::Tensor factors = to_device(coefficients, size_, rows_);
  for (const at::Tensor& columns : blocks(rows_.narrow(0, 0, size_).view({size_, 2 * length_}), keep)) {
    columns.narrow(0, 0, keep).copy_(combinations(factors, columns));
  }
  size_ = keep;
  projection_.assign(keep * keep, 0.0);
  for (int64_t i = 0; i < keep; ++i) projection_[i * keep + i] = values[i];
}

at::Tensor RitzBasis::combine(const std::vector<double>& coefficients) const {
  const BelowAutograd below;
  return combinations(to_device(coefficients, size_, rows_), vectors());
}

std::vector<double> RitzBasis::residual_norms(const std::vector<double>& coefficients,
                                              const std::vector<double>& values) const {
  const BelowAutograd below;
  const at::Tensor factors = residual_factors(coefficients, values);
  const at::Tensor rows = rows_.narrow(0, 0, size_).view({2 * size_, length_});
  std::vector<at::Tensor> parts;
  for (const at::Tensor& columns : blocks(rows, static_cast<int64_t>(values.size()))) {
    const at::Tensor part = combinations(factors, columns);
    if (columns.size(1) == length_) return norms(part);
    parts.push_back(at::linalg_vector_norm(part, 2, 1));
  }
  return to_host(at::linalg_vector_norm(at::stack(parts), 2, 0));
}

at::Tensor RitzBasis::residual(const std::vector<double>& coefficients, double value) const {
  const BelowAutograd below;
  const at::Tensor rows = rows_.narrow(0, 0, size_).view({2 * size_, length_});
  return combinations(residual_factors(coefficients, {value}), rows).select(0, 0);
}

// Of v_j and of H v_j.
at::Tensor RitzBasis::residual_factors(const std::vector<double>& coefficients,
                                       const std::vector<double>& values) const {
  std::vector<double> paired(2 * coefficients.size());
  for (size_t i = 0; i < coefficients.size(); ++i) {
    paired[2 * i] = -values[i / size_] * coefficients[i];
    paired[2 * i + 1] = coefficients[i];
  }
  // Not the memory of `paired` itself.
  return to_device(paired, 2 * size_, rows_).clone();
}

}  // namespace dynloss
