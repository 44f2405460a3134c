#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "row_algebra.h"

namespace dynloss {

// An orthonormal basis V (one vector per row), its products W = H V, and the projection T = V Wᵀ.
//
// Keeping W makes every Ritz pair's residual computable without a product, whatever the basis was built from:
// Krylov vectors, old eigenvectors, random probes. Products are kept in a unit, a power of two, in which no
// square of theirs overflows or vanishes; so are projection, residuals and what else is said of H here.
class RitzBasis {
 public:
  RitzBasis(int64_t capacity, int64_t length, const at::TensorOptions& options);

  int64_t size() const { return size_; }

  // Makes the part of x orthogonal to the basis, normalised, the candidate for the next basis vector
  // (classical Gram-Schmidt, twice). Returns that part's norm; 0, and no candidate, where x, of the given
  // norm, lies in the basis to rounding.
  double propose(const Rows& x, double norm);
  // The same for the product taken in last, whose overlaps with the basis are known already; not after a
  // restart.
  double propose_product();
  at::Tensor candidate() const { return candidate_row().vector(); }

  // x_i · v_j of the rows of x, shape (rows, size()), on the host.
  std::vector<double> overlaps(const Rows& x) const;

  // Takes in the candidate together with its product; false, and nothing taken in, where the product is not
  // finite.
  bool accept(const at::Tensor& product);

  // Replaces the basis by Ritz vectors: row i is Σ_j coefficients[i, j] v_j with the Ritz value values[i].
  void restart(const std::vector<double>& coefficients, const std::vector<double>& values);

  // Σ_j coefficients[i, j] v_j, shape (rows, length).
  at::Tensor combine(const std::vector<double>& coefficients) const;

  // Norms of the residuals H y - θ y of Ritz pairs; and afterwards, on the same basis, the residual of the
  // i-th.
  std::vector<double> residual_norms(const std::vector<double>& coefficients,
                                     const std::vector<double>& values);
  Rows residual(int64_t i) const;

  // The Lanczos process in the complement of the basis, by its three-term recurrence: it keeps no vectors, so
  // that its length is not bound by the basis, which stays as it is. It works in kProbeColumns free columns.
  static constexpr int64_t kProbeColumns = 2;
  void start_probe(const at::Tensor& x);
  at::Tensor probe() const { return probe_row().vector(); }  // the vector to be multiplied next
  // Takes the product; returns the new diagonal and off-diagonal entry of the Lanczos matrix. An off-diagonal
  // of 0 says that there is no next vector.
  std::pair<double, double> advance_probe(const at::Tensor& product);
  // For a second run from the same start, in which a combination of the vectors is collected.
  void restart_probe();
  void collect_probe(double coefficient);
  Rows collected() const { return spare_row(3); }

  // T[i, j] = v_i · H v_j, row-major (size, size); symmetric up to the operator's own asymmetry.
  const std::vector<double>& projection() const { return projection_; }

  // A product in this unit is `unit()` times that of the operator.
  double unit() const { return unit_; }

  // max |T[i, j] - T[j, i]| over everything seen: rounding alone for a symmetric operator.
  double asymmetry() const { return asymmetry_; }

  // The length of a product's noise, as its asymmetry shows it.
  double noise() const;

 private:
  Rows vectors() const { return {rows_, 0, size_, 2}; }
  Rows candidate_row() const { return {rows_, 2 * size_, 1}; }
  double normalise(double norm);
  // The rows of free columns: of the probe, the vectors last and now by turns, the first, the collected one.
  Rows spare_row(int64_t i) const { return {rows_, 2 * size_ + i, 1}; }
  Rows probe_row() const { return spare_row(probed_ % 2); }
  void change_unit(double unit);

  int64_t length_;
  int64_t size_ = 0;
  double epsilon_;
  at::Tensor rows_;  // (2 * capacity, length): v_j before w_j, so that one GEMM reaches both
  std::vector<double> projection_;
  double unit_ = 1.0;
  double largest_square_ = 0.0;  // of the length of a product
  double asymmetry_ = 0.0;
  double asymmetry_squares_ = 0.0;  // their sum over num_pairs_
  int64_t num_pairs_ = 0;

  at::Tensor product_overlaps_;  // v_i · w for the product w taken in last,
  double product_norm_ = 0.0;    // and its norm

  int64_t probed_ = 0;  // products of the probe
  double last_off_diagonal_ = 0.0;
  double largest_probed_ = 0.0;

  at::Tensor residual_factors_;  // of the pairs last asked for: of v_j and H v_j by turns
  at::Tensor residuals_;         // themselves, where they are short
};

}  // namespace dynloss
