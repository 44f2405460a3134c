#include "complement_probe.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mv.h>

#include <algorithm>
#include <cmath>

#include "row_algebra.h"

namespace dynloss {

void ComplementProbe::start(const at::Tensor& x, std::vector<double> coupling) {
  for (double& entry : coupling) entry = -entry;  // as it is subtracted
  const int64_t count = basis_.directions().count();
  minus_coupling_ = at::empty({0}, x.options().dtype(at::kDouble));
  if (count > 0) minus_coupling_ = to_device(coupling, count, minus_coupling_);
  window_ = basis_.num_spare_rows() - 2;
  orthogonalise(start_row(), x, basis_.vectors());
  basis_.make_unit(start_row(), 0.0);
  restart();
}

void ComplementProbe::restart() {
  diagonal_.clear();
  off_diagonal_.clear();
  largest_ = 0.0;
  assign(row_of(0), start_row());
}

bool ComplementProbe::advance(const at::Tensor& product) {
  const Rows v = basis_.vectors(), f = basis_.directions(), now = row_of(steps()),
             next = row_of(steps() + 1);  // where the last one may be
  if (steps() == 0) {
    assign(next, product, basis_.unit());
  } else {
    assign(next, row_of(steps() - 1), -off_diagonal_.back());
    subtract_combination(next, next, factor(-basis_.unit()), product);
  }
  const at::Tensor of_product = inner_products(now, next), of_directions = inner_products(f, now);
  at::Tensor overlap = of_product;
  if (f.count() > 0) {
    const at::Tensor minus_weights = at::mv(minus_coupling_, of_directions);
    subtract_combination(next, next, minus_weights, f);
    overlap = of_product.sub(minus_weights.dot(of_directions));
  }
  subtract_combination(next, next, overlap, now);
  const at::Tensor of_basis = orthogonalise(next, next, expected_overlaps(next, of_directions), v);
  std::vector<at::Tensor> wanted{overlap, of_basis};
  if (steps() == 0) wanted.insert(wanted.end(), {of_product, of_directions});
  const std::vector<double> read = to_host(wanted);
  const int64_t m = basis_.size();
  const double diagonal = read[0], length = read[m + 1];
  if (!std::isfinite(diagonal) || !std::isfinite(length)) return false;
  if (steps() == 0) {
    start_overlaps_.assign(read.begin() + 1, read.begin() + m + 1);
    start_overlaps_.push_back(read[m + 2]);
    const std::vector<double> beyond = basis_.product_overlaps(&read[m + 3]);
    start_overlaps_.insert(start_overlaps_.end(), beyond.begin(), beyond.end());
  }
  largest_ = std::max({largest_, std::abs(diagonal), length});
  const bool ends = !(length > 100.0 * rounding_of(next.matrix().options()) * largest_);
  if (!ends) assign(next, next, 1.0 / length);
  diagonal_.push_back(diagonal);
  off_diagonal_.push_back(ends ? 0.0 : length);
  return true;
}

// Of the basis with H x, for an x with these overlaps with F: with a symmetric H they are those of its
// products with x.
at::Tensor ComplementProbe::expected_overlaps(const Rows& product, const at::Tensor& of_directions) const {
  if (!product.on_host()) return inner_products(basis_.vectors(), product);
  const std::vector<double> x = to_host({of_directions});
  return to_device(basis_.product_overlaps(x.data()), 1, of_directions).view(-1);
}

std::vector<double> ComplementProbe::projection_with_start() const {
  const int64_t m = basis_.size();
  std::vector<double> projection((m + 1) * (m + 1));
  for (int64_t i = 0; i < m; ++i) {
    std::copy_n(&basis_.projection()[i * m], m, &projection[i * (m + 1)]);
    projection[i * (m + 1) + m] = start_overlaps_[i];
    projection[m * (m + 1) + i] = start_overlaps_[m + 1 + i];
  }
  projection.back() = start_overlaps_[m];
  return projection;
}

void ComplementProbe::collect(int64_t step, double coefficient) {
  if (step == 0) {
    assign(collected(), row_of(0), coefficient);
  } else {
    subtract_combination(collected(), collected(), factor(-coefficient), row_of(step));
  }
}

at::Tensor ComplementProbe::factor(double value) const {
  return at::full({1}, value, minus_coupling_.options());
}

}  // namespace dynloss
