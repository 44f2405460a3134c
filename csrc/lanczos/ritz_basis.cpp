#include "ritz_basis.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "row_algebra.h"

namespace dynloss {
namespace {

// Rows up to this long are cheaper to hold than to compute twice.
constexpr int64_t kShort = 16384;

// Squared lengths of products that leave room, in float32 too, for the squares of residuals and of sums.
constexpr double kSmallestSquare = 1e-16;
constexpr double kLargestSquare = 1e16;

}  // namespace

RitzBasis::RitzBasis(int64_t capacity, int64_t length, const at::TensorOptions& options)
    : length_(length),
      epsilon_(options.dtype() == at::kFloat ? std::numeric_limits<float>::epsilon()
                                             : std::numeric_limits<double>::epsilon()),
      // Where the basis may span all but one dimension, a probe of that one still has its columns.
      rows_(at::empty({2 * (capacity < length ? capacity : capacity + 1), length}, options)) {}

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
  const int64_t m = size_;
  const Rows w(rows_, 2 * m + 1, 1);
  copy(w, product);
  if (unit_ != 1.0) scale(w, unit_);
  at::Tensor gram;
  std::vector<double> inner;
  // Entry (i, a, b) is the inner product of {v_i, H v_i}[a] with {v, H v}[b].
  const auto multiply = [&] {
    gram = inner_products(Rows(rows_, 0, 2 * (m + 1)), Rows(rows_, 2 * m, 2));
    inner = to_host(gram);
  };
  multiply();
  const double square = inner[4 * m + 3];
  if (!(square <= kLargestSquare) || std::max(largest_square_, square) < kSmallestSquare) {
    const double unit = normalising_power_of_two(product);
    if (!std::isfinite(unit)) return false;
    if (unit > 0.0) {
      change_unit(unit);
      copy(w, product);
      scale(w, unit_);
      multiply();
    }
  }
  // A NaN or an infinity in the product survives every inner product with it: 0 · inf is NaN.
  if (!std::all_of(inner.begin(), inner.end(), [](double x) { return std::isfinite(x); })) return false;
  const auto vector_product = [&](int64_t i) { return inner[4 * i + 1]; };
  const auto product_vector = [&](int64_t i) { return inner[4 * i + 2]; };
  std::vector<double> grown((m + 1) * (m + 1));
  for (int64_t i = 0; i < m; ++i) {
    std::copy_n(&projection_[i * m], m, &grown[i * (m + 1)]);
    grown[i * (m + 1) + m] = vector_product(i);
    grown[m * (m + 1) + i] = product_vector(i);
    const double difference = std::abs(vector_product(i) - product_vector(i));
    asymmetry_ = std::max(asymmetry_, difference);
    asymmetry_squares_ += difference * difference;
  }
  num_pairs_ += m;
  grown[m * (m + 1) + m] = vector_product(m);
  product_overlaps_ = gram.as_strided({m + 1}, {4}, 1);
  product_norm_ = std::sqrt(inner[4 * m + 3]);
  largest_square_ = std::max(largest_square_, inner[4 * m + 3]);
  projection_ = std::move(grown);
  ++size_;
  return true;
}

void RitzBasis::change_unit(double unit) {
  const double ratio = unit / unit_;
  for (int64_t i = 0; i < size_; ++i) scale(Rows(rows_, 2 * i + 1, 1), ratio);
  for (double& entry : projection_) entry *= ratio;
  asymmetry_ *= ratio;
  asymmetry_squares_ *= ratio * ratio;
  largest_square_ *= ratio * ratio;
  unit_ = unit;
}

void RitzBasis::start_probe(const at::Tensor& x) {
  const Rows first = spare_row(2), v = vectors();
  subtract_combination(first, x, inner_products(v, x), v);
  subtract_combination(first, first, inner_products(v, first), v);
  scale(first, 1.0 / norms(first).front());
  restart_probe();
}

void RitzBasis::restart_probe() {
  probed_ = 0;
  last_off_diagonal_ = largest_probed_ = 0.0;
  copy(probe_row(), spare_row(2));
}

std::pair<double, double> RitzBasis::advance_probe(const at::Tensor& product) {
  const Rows now = probe_row();
  const Rows next = spare_row(1 - probed_ % 2);  // where the last vector is
  if (probed_ == 0) {
    copy(next, product);
    scale(next, unit_);
  } else {
    scale(next, -last_off_diagonal_);
    subtract_combination(next, next, at::full({1}, -unit_, rows_.options().dtype(at::kDouble)), product);
  }
  const at::Tensor overlap = inner_products(now, next);
  subtract_combination(next, next, overlap, now);
  const Rows v = vectors();
  subtract_combination(next, next, inner_products(v, next), v);
  const double diagonal = to_host(overlap).front(), length = norms(next).front();
  largest_probed_ = std::max({largest_probed_, std::abs(diagonal), length});
  last_off_diagonal_ = length > 100.0 * epsilon_ * largest_probed_ ? length : 0.0;
  if (last_off_diagonal_ > 0.0) scale(next, 1.0 / length);
  ++probed_;
  return {diagonal, std::isfinite(length) ? last_off_diagonal_ : length};
}

void RitzBasis::collect_probe(double coefficient) {
  const Rows to = collected();
  if (probed_ == 0) {
    copy(to, probe_row());
    scale(to, coefficient);
    return;
  }
  subtract_combination(to, to, at::full({1}, -coefficient, rows_.options().dtype(at::kDouble)), probe_row());
}

double RitzBasis::noise() const {
  if (num_pairs_ == 0) return 0.0;
  // Each difference is one component of the noise of one product less one of another's.
  const double component = std::sqrt(asymmetry_squares_ / (2.0 * static_cast<double>(num_pairs_)));
  return component * std::sqrt(static_cast<double>(length_));
}

void RitzBasis::restart(const std::vector<double>& coefficients, const std::vector<double>& values) {
  const auto keep = static_cast<int64_t>(values.size());
  const at::AutoDispatchBelowADInplaceOrView below;
  replace_by_combinations(rows_.narrow(0, 0, 2 * size_).view({size_, 2 * length_}),
                          to_device(coefficients, size_, rows_));
  size_ = keep;
  projection_.assign(keep * keep, 0.0);
  for (int64_t i = 0; i < keep; ++i) projection_[i * keep + i] = values[i];
}

at::Tensor RitzBasis::combine(const std::vector<double>& coefficients) const {
  return combinations(to_device(coefficients, size_, rows_), vectors());
}

std::vector<double> RitzBasis::residual_norms(const std::vector<double>& coefficients,
                                              const std::vector<double>& values) {
  std::vector<double> paired(2 * coefficients.size());  // of v_j and of H v_j
  for (size_t i = 0; i < coefficients.size(); ++i) {
    paired[2 * i] = -values[i / size_] * coefficients[i];
    paired[2 * i + 1] = coefficients[i];
  }
  residual_factors_ = to_device(paired, 2 * size_, rows_);
  const Rows rows(rows_, 0, 2 * size_);
  if (length_ > kShort) return combination_norms(residual_factors_, rows);
  residuals_ = combinations(residual_factors_, rows);
  return norms(residuals_);
}

Rows RitzBasis::residual(int64_t i) const {
  if (residuals_.defined()) return Rows(residuals_, i, 1);
  return combinations(Rows(residual_factors_, i, 1), Rows(rows_, 0, 2 * size_));
}

}  // namespace dynloss
