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
  minus_coupling_ = to_device(coupling, basis_.size(), at::empty({0}, x.options().dtype(at::kDouble)));
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
  const Rows v = basis_.vectors(), now = row_of(steps()),
             next = row_of(steps() + 1);  // where the last one may be
  std::vector<at::Tensor> of_start;
  if (steps() == 0) {
    assign(next, product, basis_.unit());
    of_start = {inner_products(v, next), inner_products(now, next), inner_products(basis_.products(), now)};
  } else {
    assign(next, row_of(steps() - 1), -off_diagonal_.back());
    subtract_combination(next, next, factor(-basis_.unit()), product);
  }
  subtract_combination(next, next, at::mv(minus_coupling_, inner_products(v, next)), basis_.products());
  const at::Tensor overlap = inner_products(now, next);
  subtract_combination(next, next, overlap, now);
  // Twice: W has a large part in the basis, and what is left of that the coupling would magnify.
  orthogonalise(next, next, v);
  std::vector<at::Tensor> wanted{overlap, lengths(next)};
  wanted.insert(wanted.end(), of_start.begin(), of_start.end());
  const std::vector<double> read = to_host(wanted);
  const double diagonal = read[0], length = read[1];
  if (!std::isfinite(diagonal) || !std::isfinite(length)) return false;
  if (!of_start.empty()) start_overlaps_.assign(read.begin() + 2, read.end());
  largest_ = std::max({largest_, std::abs(diagonal), length});
  const bool ends = !(length > 100.0 * rounding_of(next.matrix().options()) * largest_);
  if (!ends) assign(next, next, 1.0 / length);
  diagonal_.push_back(diagonal);
  off_diagonal_.push_back(ends ? 0.0 : length);
  return true;
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
