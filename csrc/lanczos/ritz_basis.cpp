#include "ritz_basis.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "row_algebra.h"

namespace dynloss {
namespace {

// Lengths of products that leave room, in float32 too, for the squares of residuals and of sums.
constexpr double kShortest = 1e-8;
constexpr double kLongest = 1e8;
// What is left of a vector is nothing but rounding below so many roundings of what it was.
constexpr double kRoundings = 100.0;

using Columns = std::vector<std::vector<double>>;

double norm_of(const std::vector<double>& x) {
  return std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0));
}

// Reflects the entries from `first` on of every column (Householder), so that those of x, which ends where
// the columns do, become a multiple of the first unit vector.
void reflect(Columns& columns, int64_t first, std::vector<double> x) {
  x[0] += std::copysign(norm_of(x), x[0]);
  const double square = std::inner_product(x.begin(), x.end(), x.begin(), 0.0);
  if (!(square > 0.0)) return;
  for (std::vector<double>& column : columns) {
    const double factor = 2.0 * std::inner_product(x.begin(), x.end(), column.begin() + first, 0.0) / square;
    for (size_t i = 0; i < x.size(); ++i) column[first + i] -= factor * x[i];
  }
}

Columns identity(int64_t size) {
  Columns out(size, std::vector<double>(size));
  for (int64_t i = 0; i < size; ++i) out[i][i] = 1.0;
  return out;
}

// Of a square matrix, row-major.
std::vector<double> first_rows(const Columns& columns, int64_t count) {
  std::vector<double> out;
  for (int64_t i = 0; i < count; ++i) {
    for (const std::vector<double>& column : columns) out.push_back(column[i]);
  }
  return out;
}

}  // namespace

RitzBasis::RitzBasis(int64_t capacity, const SymmetricOperator& op)
    : dimension_(op.dimension()),
      epsilon_(rounding_of(op.options())),
      // There are never more residuals than vectors, nor both together than dimensions; four rows are a
      // probe's.
      rows_(at::empty({capacity < dimension_ ? 2 * capacity : dimension_ + 4, op.size()}, op.options())),
      blind_(!Rows(rows_).on_host()) {}

bool RitzBasis::propose(const Rows& x, double norm) {
  const Rows slot = spare_row(0);
  if (num_rows_ == 0) {
    assign(slot, x);
    if (!normalise(slot, 0.0)) return false;
    num_rows_ = 1;
    return true;
  }
  const std::vector<double> read = to_host({orthogonalise(slot, x, Rows(rows_, 0, num_rows_))});
  std::vector<double> direction(read.begin() + size_, read.end());
  if (direction.back() > rounding(norm) && num_rows_ < dimension_) {
    assign(slot, slot, 1.0 / direction.back());
    ++num_rows_;
    for (std::vector<double>& column : columns_) column.push_back(0.0);
  } else {
    direction.pop_back();
  }
  return lead_with(std::move(direction), rounding(norm));
}

bool RitzBasis::propose_product() {
  if (!waiting_.empty()) return true;  // its direction is the only one
  const std::vector<double>& last = columns_.back();
  return lead_with({last.begin() + size_, last.end()}, rounding(largest_length_));
}

bool RitzBasis::propose_residual(const double* coefficients, double norm) {
  return lead_with(beside(coefficients), rounding(norm));
}

double RitzBasis::rounding(double length) const { return kRoundings * epsilon_ * length; }

// Rotates F so that its first row, the candidate, has this direction; false where that is negligible.
bool RitzBasis::lead_with(std::vector<double> direction, double negligible) {
  const auto count = static_cast<int64_t>(direction.size());
  if (!(norm_of(direction) > negligible)) return false;
  if (count == 1) return true;
  Columns rotation = identity(count);
  reflect(rotation, 0, direction);
  reflect(columns_, size_, std::move(direction));
  const at::AutoDispatchBelowADInplaceOrView below;
  replace_by_combinations(directions().tensor(), to_device(first_rows(rotation, count), count, rows_));
  return true;
}

bool RitzBasis::make_unit(const Rows& x, double negligible) const {
  if (!blind_) return normalise(x, negligible);
  const at::AutoDispatchBelowADInplaceOrView below;
  normalise_blindly(x, at::full({}, negligible, rows_.options().dtype(at::kDouble)));
  return true;
}

std::vector<double> RitzBasis::overlaps(const Rows& x) const {
  return to_host({inner_products(x, vectors())});
}

void RitzBasis::accept(const at::Tensor& product) {
  if (unit_ == 1.0) {
    waiting_.push_back(take_in(product, product));
  } else {
    assign(spare_row(0), product, unit_);
    waiting_.push_back(take_in(product, spare_row(0)));
  }
}

RitzBasis::Waiting RitzBasis::take_in(const at::Tensor& product, const Rows& scaled) {
  const Rows slot = spare_row(0);
  const at::Tensor length = lengths(scaled);
  ++size_;
  const at::Tensor overlaps =
      orthogonalise(slot, scaled, expected_overlaps(scaled), Rows(rows_, 0, num_rows_));
  if (blind_) {
    const at::AutoDispatchBelowADInplaceOrView below;
    normalise_blindly(slot, length.squeeze(0).clamp_min(largest_length_).mul_(kRoundings * epsilon_));
  }
  return {product, overlaps, length, num_rows_++};
}

// With the product of the last vector. As H is symmetric, those of the vectors before are known from their
// products, and are zero but for one or two in a Krylov space. On a device all are measured.
at::Tensor RitzBasis::expected_overlaps(const Rows& product) const {
  if (!product.on_host()) return inner_products(Rows(rows_, 0, num_rows_), product);
  const int64_t last = size_ - 1;
  const at::Tensor measured = inner_products(Rows(rows_, last, num_rows_ - last), product);
  const at::Tensor out = at::empty({num_rows_}, measured.options());
  auto* to = out.mutable_data_ptr<double>();
  for (const std::vector<double>& column : columns_) *to++ = column[last];
  std::copy_n(measured.const_data_ptr<double>(), measured.numel(), to);
  return out;
}

bool RitzBasis::settle() {
  if (waiting_.empty()) return true;
  const std::vector<Waiting> waiting = std::exchange(waiting_, {});
  std::vector<at::Tensor> wanted;
  for (const Waiting& taken : waiting) wanted.insert(wanted.end(), {taken.overlaps, taken.length});
  const std::vector<double> read = to_host(wanted);
  const double* next = read.data();
  for (const Waiting& taken : waiting) {
    // As before it, until it turns out to be good.
    size_ = static_cast<int64_t>(columns_.size());
    num_rows_ = taken.num_rows;
    std::vector<double> numbers(next, next + num_rows_ + 2);
    next += numbers.size();
    const double length = numbers.back();
    double factor = 1.0;
    if (!(length <= kLongest) || std::max(largest_length_, length) < kShortest) {
      const Rows slot = spare_row(0);
      assign(slot, taken.product, unit_);
      factor = scale_into_range(slot);
      if (!std::isfinite(factor)) return false;
      if (factor != 1.0) {
        change_unit(factor);
        const Waiting again = take_in(taken.product, slot);
        numbers = to_host({again.overlaps, again.length});
        size_ = static_cast<int64_t>(columns_.size());
        num_rows_ = taken.num_rows;
      }
    }
    // A NaN or an infinity in the product survives every inner product with it: 0 · inf is NaN.
    if (!std::all_of(numbers.begin(), numbers.end(), [](double x) { return std::isfinite(x); })) return false;
    const double own_length = numbers.back();
    numbers.pop_back();
    // What comes after a product without a direction is nothing, and after a change of the unit in the old
    // one.
    if (!append(std::move(numbers), own_length) || factor != 1.0) break;
  }
  return true;
}

// Whether it has brought a new direction.
bool RitzBasis::append(std::vector<double> column, double length) {
  const int64_t m = size_++;
  for (int64_t i = 0; i < m; ++i) {
    const double difference = std::abs(column[i] - columns_[i][m]);
    asymmetry_ = std::max(asymmetry_, difference);
    asymmetry_squares_ += difference * difference;
  }
  num_pairs_ += m;
  largest_length_ = std::max(largest_length_, length);
  const double rest = column.back();
  // Rounding that is left of a product is as large as H makes it, however short the product is.
  const bool is_new = rest > rounding(largest_length_) && num_rows_ < dimension_;
  if (is_new) {
    if (!blind_) assign(spare_row(0), spare_row(0), 1.0 / rest);
    for (std::vector<double>& other : columns_) other.push_back(0.0);
    ++num_rows_;
  } else {
    column.pop_back();
    blind_ = false;
  }
  columns_.push_back(std::move(column));
  return is_new;
}

void RitzBasis::change_unit(double ratio) {
  for (std::vector<double>& column : columns_) {
    for (double& entry : column) entry *= ratio;
  }
  asymmetry_ *= ratio;
  asymmetry_squares_ = asymmetry_squares_ * ratio * ratio;  // where ratio² may be infinite
  largest_length_ *= ratio;
  unit_ *= ratio;
}

double RitzBasis::noise() const {
  if (num_pairs_ == 0) return 0.0;
  // Each difference is one component of the noise of one product less one of another's.
  const double component = std::sqrt(asymmetry_squares_ / (2.0 * static_cast<double>(num_pairs_)));
  return component * std::sqrt(static_cast<double>(dimension_));
}

void RitzBasis::restart(const std::vector<double>& coefficients) {
  const int64_t m = size_, beside = num_rows_ - m;
  const int64_t keep = static_cast<int64_t>(coefficients.size()) / m;
  Columns columns;
  for (int64_t i = 0; i < keep; ++i) {
    const std::vector<double> image = product(&coefficients[i * m]);
    std::vector<double>& column = columns.emplace_back();
    for (int64_t j = 0; j < keep; ++j) {
      column.push_back(std::inner_product(image.begin(), image.begin() + m, &coefficients[j * m], 0.0));
    }
    column.insert(column.end(), image.begin() + m, image.end());
  }
  // The residuals of fewer vectors have fewer directions: those come first.
  Columns rotation = identity(beside);
  int64_t rank = 0;
  for (; rank < std::min(keep, beside); ++rank) {
    const auto rest = [&](const std::vector<double>& column) {
      return std::vector<double>(column.begin() + keep + rank, column.end());
    };
    std::vector<double> longest = rest(columns.front());
    for (const std::vector<double>& column : columns) {
      if (norm_of(rest(column)) > norm_of(longest)) longest = rest(column);
    }
    if (!(norm_of(longest) > rounding(largest_length_))) break;
    if (longest.size() == 1) continue;
    reflect(rotation, rank, longest);
    reflect(columns, keep + rank, std::move(longest));
  }
  for (std::vector<double>& column : columns) column.resize(keep + rank);
  columns_ = std::move(columns);
  // [coefficients, 0; 0, the first rows of the rotation]
  std::vector<double> all((keep + rank) * num_rows_);
  const std::vector<double> of_rest = first_rows(rotation, rank);
  for (int64_t i = 0; i < keep; ++i) std::copy_n(&coefficients[i * m], m, &all[i * num_rows_]);
  for (int64_t i = 0; i < rank; ++i) {
    std::copy_n(&of_rest[i * beside], beside, &all[(keep + i) * num_rows_ + m]);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  replace_by_combinations(rows_.narrow(0, 0, num_rows_), to_device(all, num_rows_, rows_));
  size_ = keep;
  num_rows_ = keep + rank;
}

at::Tensor RitzBasis::combine(const std::vector<double>& coefficients) const {
  return combinations(to_device(coefficients, size_, rows_), vectors());
}

double RitzBasis::residual_norm(const double* coefficients, double value) const {
  std::vector<double> residual = product(coefficients);
  for (int64_t i = 0; i < size_; ++i) residual[i] -= value * coefficients[i];
  return norm_of(residual);
}

std::vector<double> RitzBasis::projection() const {
  std::vector<double> out(size_ * size_);
  for (int64_t i = 0; i < size_ * size_; ++i) out[i] = columns_[i % size_][i / size_];
  return out;
}

std::vector<double> RitzBasis::beside(const double* coefficients) const {
  const std::vector<double> all = product(coefficients);
  return {all.begin() + size_, all.end()};
}

std::vector<double> RitzBasis::product_overlaps(const double* x) const {
  std::vector<double> out;
  for (const std::vector<double>& column : columns_) {
    out.push_back(std::inner_product(column.begin() + size_, column.end(), x, 0.0));
  }
  return out;
}

std::vector<double> RitzBasis::product(const double* coefficients) const {
  std::vector<double> out(num_rows_);
  for (int64_t j = 0; j < size_; ++j) {
    for (int64_t i = 0; i < num_rows_; ++i) out[i] += coefficients[j] * columns_[j][i];
  }
  return out;
}

}  // namespace dynloss
