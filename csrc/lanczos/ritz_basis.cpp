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
      rows_(at::empty({2 * capacity, length}, options)) {}

double RitzBasis::propose(const Rows& x, double norm) {
  const Rows v = vectors(), slot = candidate_row();
  if (size_ == 0) {
    copy(slot, x);
  } else {
    subtract_combination(slot, x, inner_products(v, x), v);
    subtract_combination(slot, slot, inner_products(v, slot), v);
  }
  return normalise(norm);
}

double RitzBasis::propose_product() {
  const Rows v = vectors(), slot = candidate_row();
  subtract_combination(slot, Rows(rows_, 2 * size_ - 1, 1), product_overlaps_, v);
  subtract_combination(slot, slot, inner_products(v, slot), v);
  return normalise(product_norm_);
}

double RitzBasis::propose_orthogonal(const Rows& x, double norm) {
  const Rows v = vectors();
  subtract_combination(candidate_row(), x, inner_products(v, x), v);
  return normalise(norm);
}

double RitzBasis::normalise(double norm) {
  const Rows slot = candidate_row();
  const double remainder = norms(slot).front();
  // Below this what is left of x is rounding. (Also false for a norm that is not finite.)
  if (!(remainder > 100.0 * epsilon_ * norm)) return 0.0;
  scale(slot, 1.0 / remainder);
  return remainder;
}

std::vector<double> RitzBasis::overlaps(const Rows& x) const { return to_host(inner_products(x, vectors())); }

bool RitzBasis::accept(const at::Tensor& product) {
  const BelowAutograd below;
  const int64_t m = size_;
  copy(Rows(rows_, 2 * m + 1, 1), product);
  // Entry (i, a, b) is the inner product of {v_i, H v_i}[a] with {v, H v}[b].
  const at::Tensor gram = inner_products(Rows(rows_, 0, 2 * (m + 1)), Rows(rows_, 2 * m, 2));
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
  product_overlaps_ = gram.as_strided({m + 1}, {4}, 1);
  product_norm_ = std::sqrt(inner[4 * m + 3]);
  projection_ = std::move(grown);
  ++size_;
  return true;
}

void RitzBasis::restart(const std::vector<double>& coefficients, const std::vector<double>& values) {
  const BelowAutograd below;
  const auto keep = static_cast<int64_t>(values.size());
  const at::Tensor factors = to_device(coefficients, size_, rows_);
  for (const at::Tensor& columns : blocks(rows_.narrow(0, 0, 2 * size_).view({size_, 2 * length_}), keep)) {
    columns.narrow(0, 0, keep).copy_(combinations(factors, columns));
  }
  size_ = keep;
  projection_.assign(keep * keep, 0.0);
  for (int64_t i = 0; i < keep; ++i) projection_[i * keep + i] = values[i];
}

at::Tensor RitzBasis::combine(const std::vector<double>& coefficients) const {
  return combinations(to_device(coefficients, size_, rows_), vectors());
}

std::vector<double> RitzBasis::residual_norms(const std::vector<double>& coefficients,
                                              const std::vector<double>& values) {
  const BelowAutograd below;
  std::vector<double> paired(2 * coefficients.size());  // of v_j and of H v_j
  for (size_t i = 0; i < coefficients.size(); ++i) {
    paired[2 * i] = -values[i / size_] * coefficients[i];
    paired[2 * i + 1] = coefficients[i];
  }
  residual_factors_ = to_device(paired, 2 * size_, rows_);
  const at::Tensor rows = rows_.narrow(0, 0, 2 * size_);
  std::vector<at::Tensor> parts;
  for (const at::Tensor& columns : blocks(rows, static_cast<int64_t>(values.size()))) {
    const at::Tensor part = combinations(residual_factors_, columns);
    if (columns.size(1) == length_) {
      residuals_ = part;
      return norms(part);
    }
    parts.push_back(at::linalg_vector_norm(part, 2, 1));
  }
  return to_host(at::linalg_vector_norm(at::stack(parts), 2, 0));
}

Rows RitzBasis::residual(int64_t i) const {
  if (residuals_.defined()) return Rows(residuals_, i, 1);
  return combinations(Rows(residual_factors_, i, 1), Rows(rows_, 0, 2 * size_));
}

}  // namespace dynloss
