#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "row_algebra.h"

namespace dynloss {

// An orthonormal basis V (one vector per row), its products W = H V, and the projection T = V Wᵀ.
//
// Keeping W makes every Ritz pair's residual computable without a product, whatever the basis was built from:
// Krylov vectors, old eigenvectors, random probes. Products are kept in a unit, a power of two, in which no
// square of theirs overflows or vanishes; so are projection, residuals and what else is said of H here.
//
// On a device the basis grows blindly, without a word to the host: `settle` reads in one go what was found
// since the last time, and everything that speaks of numbers on the host comes after it. Once a Krylov space
// has come to its end, as that of an operator with few eigenvalues does again and again, it asks every time.
class RitzBasis {
 public:
  RitzBasis(int64_t capacity, int64_t length, const at::TensorOptions& options);

  int64_t size() const { return size_; }
  // Whether a candidate may turn out to be none, and a product not to be finite, when they are read only.
  bool blind() const { return blind_; }
  int64_t num_waiting() const { return static_cast<int64_t>(waiting_.size()); }

  // Makes the part of x orthogonal to the basis, normalised, the candidate for the next basis vector
  // (classical Gram-Schmidt, twice). False, and no candidate, where x, of the given norm, lies in the basis
  // to rounding; while the basis is blind that is not said before `settle`.
  bool propose(const Rows& x, double norm);
  // Proposes the product taken in last, whose overlaps with the basis are known already; not after a restart.
  bool propose_product();
  // Proposes the residual, of the given norm, of the Ritz pair with these coefficients.
  bool propose_residual(const double* coefficients, double value, double norm);
  at::Tensor candidate() const { return spare_row(0).vector(); }

  // Takes in the candidate together with its product.
  void accept(const at::Tensor& product);

  // What the vectors taken in have turned out to be.
  enum class Settled {
    kGood,
    kNothingNew,  // the last candidate was none: it and what came after it are gone again
    kNonFinite    // a product is not finite: it and what came after it are gone again
  };
  Settled settle();

  // x_i · v_j of the rows of x, shape (rows, size()), on the host.
  std::vector<double> overlaps(const Rows& x) const;

  // Replaces the basis by Ritz vectors: row i is Σ_j coefficients[i, j] v_j with the Ritz value values[i].
  void restart(const std::vector<double>& coefficients, const std::vector<double>& values);

  // Σ_j coefficients[i, j] v_j, shape (rows, length).
  at::Tensor combine(const std::vector<double>& coefficients) const;

  // Norms of the residuals H y - θ y of Ritz pairs, to a thousandth; or bounds of them which are at most
  // `enough`.
  std::vector<double> residual_norms(const std::vector<double>& coefficients,
                                     const std::vector<double>& values,
                                     const std::vector<double>& enough) const;

  Rows vectors() const { return {rows_, 0, size_, 2}; }   // V
  Rows products() const { return {rows_, 1, size_, 2}; }  // W
  // Room for one more vector: there are two for each column that the basis may still grow by.
  Rows spare_row(int64_t i) const { return {rows_, 2 * size_ + i, 1}; }
  Rows vectors_and_spare() const { return {rows_, 0, size_ + 1, 2}; }  // V and spare_row(0)
  int64_t num_spare_rows() const { return rows_.size(0) - 2 * size_; }

  // Divides a row by its length; false where that is at most `negligible` or `or_this`, if it is defined,
  // which a blind basis does not say.
  bool make_unit(const Rows& x, double negligible, const at::Tensor& or_this = {}) const;

  // T[i, j] = v_i · H v_j, row-major (size, size); symmetric up to the operator's own asymmetry.
  const std::vector<double>& projection() const { return projection_; }

  // A product in this unit is `unit()` times that of the operator.
  double unit() const { return unit_; }

  // max |T[i, j] - T[j, i]| over everything seen: rounding alone for a symmetric operator.
  double asymmetry() const { return asymmetry_; }

  // The length of a product's noise, as its asymmetry shows it.
  double noise() const;

 private:
  // The overlaps and squares that come with the product of the j-th vector: (2 (j + 1), 2), on its device.
  // Entry (2 i + a, b) is the inner product of {v_i, H v_i}[a] with {v_j, H v_j}[b].
  at::Tensor overlaps_of_pair(int64_t j) const;
  // x of the given norm; `square`, where it is defined, is that of a length beside which x may be rounding,
  // too.
  bool finish_candidate(const Rows& x, const at::Tensor& overlaps, double norm,
                        const at::Tensor& square = {});
  void append(const double* overlaps);
  Rows pairs() const { return {rows_, 0, 2 * size_}; }
  // Factors of v_j and H v_j by turns which give the residuals of Ritz pairs.
  std::vector<double> residual_factors(const double* coefficients, double value) const;
  std::vector<double> times_product_squares(const double* x) const;  // W Wᵀ x
  void change_unit(double ratio);

  int64_t length_;
  int64_t size_ = 0;
  double epsilon_;
  at::Tensor rows_;  // (2 * capacity, length): v_j before w_j, so that one GEMM reaches both
  bool blind_;
  int64_t settled_ = 0;                  // vectors whose overlaps are on the host,
  std::vector<at::Tensor> waiting_;      // and the overlaps of the others
  std::vector<double> projection_;       // (settled_, settled_)
  std::vector<double> product_squares_;  // W Wᵀ, likewise
  double unit_ = 1.0;
  double largest_square_ = 0.0;  // of the length of a product
  double asymmetry_ = 0.0;
  double asymmetry_squares_ = 0.0;  // their sum over num_pairs_
  int64_t num_pairs_ = 0;

  at::Tensor product_overlaps_;  // of the pair taken in last
};

}  // namespace dynloss
