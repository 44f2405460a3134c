#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "ritz_basis.h"

namespace dynloss {

// The vectors that a search starts from, such as old eigenvectors, and what has become of them.
class StartVectors {
 public:
  // rows: (m, P), or undefined for none.
  explicit StartVectors(const at::Tensor& rows);

  // One vector made of all, or an undefined one where there is none but zeros.
  at::Tensor sum() const;

  Rows row(int64_t i) const { return {rows_, i, 1}; }
  double length(int64_t i) const { return lengths_[i]; }

  // A vector that the basis has lost, each at most once. A Krylov space has one vector for equal eigenvalues;
  // the others are among the old vectors.
  std::optional<int64_t> lost(const RitzBasis& basis);

  // Which of them each of some unit vectors, given by their coefficients in the basis, continues: one that it
  // overlaps with by at least a half, the largest overlap first, each at most once; -1 for none. Gives the
  // vectors the signs of those.
  std::vector<int64_t> follow(const RitzBasis& basis, std::vector<double>& coefficients);

  // To be called whenever the basis has changed.
  void forget_overlaps() { overlaps_.clear(); }

 private:
  // Row i: the overlaps of vector i with the basis.
  const double* overlaps(int64_t i, const RitzBasis& basis);

  at::Tensor rows_;
  std::vector<double> lengths_;
  std::vector<int64_t> unseen_;   // vectors other than 0 that were not yet looked for
  std::vector<double> overlaps_;  // with the basis as it is, or empty
};

}  // namespace dynloss
