#include "ritz_basis.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <utility>

#include "row_algebra.h"

namespace dynloss {
namespace {

// Differences of squares below this, in units of the rounding of the largest, are not good to a thousandth.
constexpr double kRoundingsOfAGoodDifference = 1e4;

// Squared lengths of products that leave room, in float32 too, for the squares of residuals and of sums.
constexpr double kSmallestSquare = 1e-16;
constexpr double kLargestSquare = 1e16;

}  // namespace

RitzBasis::RitzBasis(int64_t capacity, int64_t length, const at::TensorOptions& options)
    : length_(length),
      epsilon_(rounding_of(options)),
      // Where the basis may span all but one dimension, a probe of that one still has its columns.
      rows_(at::empty({2 * (capacity < length ? capacity : capacity + 1), length}, options)),
      blind_(!Rows(rows_).on_host()) {}

bool RitzBasis::propose(const Rows& x, double norm) {
  const Rows v = vectors(), slot = spare_row(0);
  if (size_ == 0) {
    assign(slot, x);
    return make_unit(slot, 0.0);
  }
  return finish_candidate(x, inner_products(v, x), norm);
}

bool RitzBasis::propose_product() {
  // Rounding that is left of a product is as large as H makes it, however short the product is.
  const Rows product(rows_, 2 * size_ - 1, 1);
  const at::Tensor overlaps = product_overlaps_.as_strided({size_}, {4}, 1);
  const at::Tensor square = blind_ ? product_overlaps_.as_strided({}, {}, 4 * size_ - 1) : at::Tensor();
  return finish_candidate(product, overlaps, std::sqrt(largest_square_), square);
}

bool RitzBasis::propose_residual(const double* coefficients, double value, double norm) {
  std::vector<double> minus_factors = residual_factors(coefficients, value);
  for (double& factor : minus_factors) factor = -factor;
  const at::Tensor weights = to_device(minus_factors, 1, at::empty({0}, rows_.options().dtype(at::kDouble)));
  const Rows slot = spare_row(0);
  // The basis has no part in a residual but what rounding left, which may be all of it.
  const at::Tensor rest = subtract_and_overlap(slot, std::nullopt, weights.view(-1), pairs(), vectors());
  return finish_candidate(slot, rest, norm);
}

bool RitzBasis::finish_candidate(const Rows& x, const at::Tensor& overlaps, double norm,
                                 const at::Tensor& square) {
  const Rows slot = spare_row(0);
  orthogonalise(slot, x, overlaps, vectors());
  // In units of what x was: below this what is left is nothing else.
  const double rounding = 100.0 * epsilon_;
  return make_unit(slot, rounding * norm, square.defined() ? square.sqrt().mul_(rounding) : square);
}

bool RitzBasis::make_unit(const Rows& x, double negligible, const at::Tensor& or_this) const {
  if (!blind_) return normalise(x, negligible);
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor known = at::full({}, negligible, rows_.options().dtype(at::kDouble));
  normalise_blindly(x, or_this.defined() ? known.maximum(or_this) : known);
  return true;
}

std::vector<double> RitzBasis::overlaps(const Rows& x) const {
  return to_host({inner_products(x, vectors())});
}

at::Tensor RitzBasis::overlaps_of_pair(int64_t j) const {
  return inner_products(Rows(rows_, 0, 2 * (j + 1)), Rows(rows_, 2 * j, 2));
}

void RitzBasis::accept(const at::Tensor& product) {
  assign(spare_row(1), product, unit_);
  product_overlaps_ = overlaps_of_pair(size_++);
  waiting_.push_back(product_overlaps_);
}

RitzBasis::Settled RitzBasis::settle() {
  if (waiting_.empty()) return Settled::kGood;
  const std::vector<double> read = to_host(std::exchange(waiting_, {}));
  const int64_t proposed = std::exchange(size_, settled_);
  for (const double* overlaps = read.data(); size_ < proposed; overlaps += 4 * size_) {
    const int64_t j = size_;
    if (overlaps[4 * j] == 0.0) {
      blind_ = false;
      return Settled::kNothingNew;
    }
    const double square = overlaps[4 * j + 3];
    std::vector<double> again;
    if (!(square <= kLargestSquare) || std::max(largest_square_, square) < kSmallestSquare) {
      const double factor = scale_into_range(Rows(rows_, 2 * j + 1, 1));
      if (!std::isfinite(factor)) return Settled::kNonFinite;
      if (factor != 1.0) {
        change_unit(factor);
        product_overlaps_ = overlaps_of_pair(j);
        again = to_host({product_overlaps_});
        overlaps = again.data();
      }
    }
    // A NaN or an infinity in the product survives every inner product with it: 0 · inf is NaN.
    if (!std::all_of(overlaps, overlaps + 4 * (j + 1), [](double x) { return std::isfinite(x); })) {
      return Settled::kNonFinite;
    }
    append(overlaps);
    if (!again.empty()) break;  // what came after it is in the old unit
  }
  return Settled::kGood;
}

void RitzBasis::append(const double* overlaps) {
  const int64_t m = size_;
  const auto vector_product = [&](int64_t i) { return overlaps[4 * i + 1]; };
  const auto product_vector = [&](int64_t i) { return overlaps[4 * i + 2]; };
  const auto product_product = [&](int64_t i) { return overlaps[4 * i + 3]; };
  std::vector<double> projection((m + 1) * (m + 1)), squares((m + 1) * (m + 1));
  for (int64_t i = 0; i < m; ++i) {
    std::copy_n(&projection_[i * m], m, &projection[i * (m + 1)]);
    std::copy_n(&product_squares_[i * m], m, &squares[i * (m + 1)]);
    projection[i * (m + 1) + m] = vector_product(i);
    projection[m * (m + 1) + i] = product_vector(i);
    squares[i * (m + 1) + m] = squares[m * (m + 1) + i] = product_product(i);
    const double difference = std::abs(vector_product(i) - product_vector(i));
    asymmetry_ = std::max(asymmetry_, difference);
    asymmetry_squares_ += difference * difference;
  }
  num_pairs_ += m;
  projection.back() = vector_product(m);
  squares.back() = product_product(m);
  largest_square_ = std::max(largest_square_, product_product(m));
  projection_ = std::move(projection);
  product_squares_ = std::move(squares);
  settled_ = ++size_;
}

void RitzBasis::change_unit(double ratio) {
  for (int64_t i = 0; i < size_; ++i) assign(Rows(rows_, 2 * i + 1, 1), Rows(rows_, 2 * i + 1, 1), ratio);
  for (double& entry : projection_) entry *= ratio;
  for (double& entry : product_squares_) entry = entry * ratio * ratio;  // where ratio² may be infinite
  asymmetry_ *= ratio;
  asymmetry_squares_ = asymmetry_squares_ * ratio * ratio;
  largest_square_ = largest_square_ * ratio * ratio;
  unit_ *= ratio;
}

double RitzBasis::noise() const {
  if (num_pairs_ == 0) return 0.0;
  // Each difference is one component of the noise of one product less one of another's.
  const double component = std::sqrt(asymmetry_squares_ / (2.0 * static_cast<double>(num_pairs_)));
  return component * std::sqrt(static_cast<double>(length_));
}

void RitzBasis::restart(const std::vector<double>& coefficients, const std::vector<double>& values) {
  const int64_t m = size_, keep = static_cast<int64_t>(values.size());
  const at::AutoDispatchBelowADInplaceOrView below;
  replace_by_combinations(rows_.narrow(0, 0, 2 * m).view({m, 2 * length_}),
                          to_device(coefficients, m, rows_));
  std::vector<double> squares(keep * keep);
  for (int64_t i = 0; i < keep; ++i) {
    const std::vector<double> image = times_product_squares(&coefficients[i * m]);
    for (int64_t j = 0; j < keep; ++j) {
      squares[i * keep + j] = std::inner_product(image.begin(), image.end(), &coefficients[j * m], 0.0);
    }
  }
  product_squares_ = std::move(squares);
  projection_.assign(keep * keep, 0.0);
  for (int64_t i = 0; i < keep; ++i) projection_[i * keep + i] = values[i];
  settled_ = size_ = keep;
}

at::Tensor RitzBasis::combine(const std::vector<double>& coefficients) const {
  return combinations(to_device(coefficients, size_, rows_), vectors());
}

std::vector<double> RitzBasis::residual_norms(const std::vector<double>& coefficients,
                                              const std::vector<double>& values,
                                              const std::vector<double>& enough) const {
  // ‖H y - θ y‖² = ‖H y‖² - θ² costs no look at the vectors; but where that cancels, only they know.
  const double cancelled_below = kRoundingsOfAGoodDifference * epsilon_ * largest_square_;
  const int64_t m = size_;
  std::vector<double> norms, factors;
  std::vector<size_t> cancelled;
  for (size_t i = 0; i < values.size(); ++i) {
    const double* c = &coefficients[i * m];
    const double square =
        std::inner_product(c, c + m, times_product_squares(c).begin(), -values[i] * values[i]);
    norms.push_back(std::sqrt(std::max(square, cancelled_below)));
    if (square > cancelled_below || norms.back() <= enough[i]) continue;
    cancelled.push_back(i);
    const std::vector<double> own = residual_factors(c, values[i]);
    factors.insert(factors.end(), own.begin(), own.end());
  }
  if (cancelled.empty()) return norms;
  const std::vector<double> exact = combination_norms(to_device(factors, 2 * m, rows_), pairs());
  for (size_t i = 0; i < cancelled.size(); ++i) norms[cancelled[i]] = exact[i];
  return norms;
}

std::vector<double> RitzBasis::residual_factors(const double* coefficients, double value) const {
  std::vector<double> factors;
  for (int64_t j = 0; j < size_; ++j) {
    factors.push_back(-value * coefficients[j]);
    factors.push_back(coefficients[j]);
  }
  return factors;
}

std::vector<double> RitzBasis::times_product_squares(const double* x) const {
  std::vector<double> out;
  for (int64_t i = 0; i < size_; ++i) {
    out.push_back(std::inner_product(x, x + size_, &product_squares_[i * size_], 0.0));
  }
  return out;
}

}  // namespace dynloss
