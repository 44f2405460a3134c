#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "operator.h"
#include "row_algebra.h"

namespace dynloss {

// An orthonormal basis V (one vector per row) and what is known of its products W = H V: a Krylov
// decomposition (Stewart 2001) Wᵀ = Vᵀ T + Fᵀ S with orthonormal rows F beside V, the directions of all
// residuals. A Krylov space has one, and each vector from elsewhere, as an old eigenvector or a random probe,
// may add one more.
//
// So every Ritz pair's residual T y - θ y, S y is a matter of small matrices, whatever the basis was built
// from; the direction of any is had by a rotation of F; and a product, which is no longer needed afterwards,
// costs two passes over V and F. With W kept beside V they would be four to six over as many rows.
// The decomposition takes no symmetry of H for granted: T and S are what was subtracted from a product.
//
// Products are taken in a unit, a power of two, in which no square of theirs overflows or vanishes; T, S,
// residuals and what else is said of H here are in it, too.
//
// On a device the basis grows blindly, without a word to the host: `settle` reads in one go what was found
// since the last time, and everything that speaks of numbers on the host comes after it. Once a Krylov space
// has come to its end, as that of an operator with few eigenvalues does again and again, it asks every time.
class RitzBasis {
 public:
  RitzBasis(int64_t capacity, const SymmetricOperator& op);

  int64_t size() const { return size_; }
  // Whether the last product taken in may be proposed before it is settled what it is.
  bool can_wait() const { return blind_ && waiting_.size() < 2 && num_rows_ == size_ + 1; }

  // Makes the part of x orthogonal to the basis, normalised, the candidate for the next basis vector. False,
  // and no candidate, where x, of the given norm, lies in the basis to rounding.
  bool propose(const Rows& x, double norm);
  // Proposes the product taken in last; not after a restart. Before that is settled nobody knows that it lies
  // in the basis.
  bool propose_product();
  // Proposes the residual, of the given norm, of the Ritz pair with these coefficients.
  bool propose_residual(const double* coefficients, double norm);
  at::Tensor candidate() const { return Rows(rows_, size_, 1).vector(); }

  // Takes in the candidate together with its product.
  void accept(const at::Tensor& product);

  // Whether the products taken in are finite; the first that is not, and what came after it, are gone again.
  // So is without a word what was multiplied blindly after the end of a Krylov space.
  bool settle();

  // x_i · v_j of the rows of x, shape (rows, size()), on the host.
  std::vector<double> overlaps(const Rows& x) const;

  // Replaces the basis by vectors of it: row i is Σ_j coefficients[i, j] v_j.
  void restart(const std::vector<double>& coefficients);

  // Σ_j coefficients[i, j] v_j, shape (rows, length).
  at::Tensor combine(const std::vector<double>& coefficients) const;

  // The norm of the residual H y - θ y of a Ritz pair.
  double residual_norm(const double* coefficients, double value) const;

  Rows vectors() const { return {rows_, 0, size_}; }                     // V
  Rows directions() const { return {rows_, size_, num_rows_ - size_}; }  // F
  Rows spare_row(int64_t i) const { return {rows_, num_rows_ + i, 1}; }
  // At least two for each column that the basis may still grow by.
  int64_t num_spare_rows() const { return rows_.size(0) - num_rows_; }

  // Divides a row by its length; false where that is at most `negligible`, which a blind basis does not say.
  bool make_unit(const Rows& x, double negligible) const;

  // T[i, j] = v_i · H v_j, row-major (size, size); symmetric up to the operator's own asymmetry.
  std::vector<double> projection() const;

  // The part of a vector's product beside the basis, in terms of F: S x for its coefficients x.
  std::vector<double> beside(const double* coefficients) const;
  // H v_i · x for all i and an x beside the basis, given by its overlaps with F: Sᵀ x.
  std::vector<double> product_overlaps(const double* x) const;

  // A product in this unit is `unit()` times that of the operator.
  double unit() const { return unit_; }

  // max |T[i, j] - T[j, i]| over everything seen: rounding alone for a symmetric operator.
  double asymmetry() const { return asymmetry_; }

  // The length of a product's noise, as its asymmetry shows it.
  double noise() const;

 private:
  // A product taken in, in case that its unit turns out to be wrong; its overlaps with the rows of V and F
  // and the length of the rest; its own length.
  struct Waiting {
    at::Tensor product, overlaps, length;
    int64_t num_rows;
  };

  double rounding(double length) const;
  std::vector<double> product(const double* coefficients) const;  // of a vector, in terms of V and F
  bool lead_with(std::vector<double> direction, double negligible);
  Waiting take_in(const at::Tensor& product, const Rows& scaled);
  at::Tensor expected_overlaps(const Rows& product) const;
  bool append(std::vector<double> column, double length);
  void change_unit(double ratio);

  int64_t dimension_;
  int64_t size_ = 0;      // rows of V, the first ones,
  int64_t num_rows_ = 0;  // and those of F after them
  double epsilon_;
  at::Tensor rows_;
  bool blind_;
  // [T; S], a column for each product that was read, each of as many numbers as there are rows.
  std::vector<std::vector<double>> columns_;
  std::vector<Waiting> waiting_;  // the other products
  double unit_ = 1.0;
  double largest_length_ = 0.0;  // of a product
  double asymmetry_ = 0.0;
  double asymmetry_squares_ = 0.0;  // their sum over num_pairs_
  int64_t num_pairs_ = 0;
};

}  // namespace dynloss
