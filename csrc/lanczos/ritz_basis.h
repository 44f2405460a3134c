#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace dynloss {

// An orthonormal basis V (one vector per row), its products W = H V, and the projection T = V Wᵀ.
//
// Keeping W makes every Ritz pair's residual computable without a product, whatever the basis was built from:
// Krylov vectors, old eigenvectors, random probes.
class RitzBasis {
 public:
  RitzBasis(int64_t capacity, int64_t length, const at::TensorOptions& options);

  int64_t size() const { return size_; }
  int64_t capacity() const { return capacity_; }

  // Makes the part of x orthogonal to the basis, normalised, the candidate for the next basis vector
  // (classical Gram-Schmidt, twice). Returns that part's norm; 0, and no candidate, where x, of the given
  // norm, lies in the basis to rounding.
  double propose(const at::Tensor& x, double norm);
  // The same for the product taken in last, whose overlaps with the basis are known already.
  double propose_product();
  // The same for what is orthogonal to the basis but for rounding, as a Ritz pair's residual is: in one pass.
  double propose_orthogonal(const at::Tensor& x, double norm);
  at::Tensor candidate() const { return pair(size_).select(0, 0); }

  // x_i · v_j of the rows of x, shape (rows, size()), on the host.
  std::vector<double> overlaps(const at::Tensor& x) const;

  // Takes in the candidate together with its product; false, and nothing taken in, where the product is not
  // finite.
  bool accept(const at::Tensor& product);

  // Replaces the basis by Ritz vectors: row i is Σ_j coefficients[i, j] v_j with the Ritz value values[i].
  void restart(const std::vector<double>& coefficients, const std::vector<double>& values);

  // Σ_j coefficients[i, j] v_j, shape (rows, length).
  at::Tensor combine(const std::vector<double>& coefficients) const;

  // Norms of the residuals H y - θ y of the Ritz pairs; and one such residual, shape (length,).
  std::vector<double> residual_norms(const std::vector<double>& coefficients,
                                     const std::vector<double>& values) const;
  at::Tensor residual(const std::vector<double>& coefficients, double value) const;

  // T[i, j] = v_i · H v_j, row-major (size, size); symmetric up to the operator's own asymmetry.
  const std::vector<double>& projection() const { return projection_; }

  // max |T[i, j] - T[j, i]| over everything seen: rounding alone for a symmetric operator.
  double asymmetry() const { return asymmetry_; }

 private:
  at::Tensor pair(int64_t row) const { return rows_.select(0, row); }
  at::Tensor vectors() const { return rows_.narrow(0, 0, size_).select(1, 0); }
  double normalise(double norm);
  at::Tensor residual_factors(const std::vector<double>& coefficients,
                              const std::vector<double>& values) const;

  int64_t capacity_;
  int64_t length_;
  int64_t size_ = 0;
  double epsilon_;
  at::Tensor rows_;  // (capacity, 2, length): v_j beside w_j, so that one GEMM reaches both
  std::vector<double> projection_;
  double asymmetry_ = 0.0;

  at::Tensor product_;           // the one taken in last,
  at::Tensor product_overlaps_;  // v_i · product, undefined after a restart,
  double product_norm_ = 0.0;    // and its norm
};

}  // namespace dynloss
