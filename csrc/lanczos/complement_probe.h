#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "ritz_basis.h"

namespace dynloss {

// The Lanczos process with H + Fᵀ C F in the complement of a basis, where F are the directions of its
// residuals, by its three-term recurrence: it keeps the vectors that the basis has room for, which has to
// stay as it is meanwhile, and may be longer.
class ComplementProbe {
 public:
  // Columns of the basis that have to be free, where the process works.
  static constexpr int64_t kColumns = 2;

  explicit ComplementProbe(const RitzBasis& basis) : basis_(basis) {}

  // From the part of x beside the basis. C is the coupling, row-major (rows of F, rows of F).
  void start(const at::Tensor& x, std::vector<double> coupling);

  // The vector to be multiplied next.
  at::Tensor vector() const { return row_of(steps()).vector(); }

  // Takes its product with H; false, and nothing done, where that is not finite in the unit of the basis.
  bool advance(const at::Tensor& product);

  // The Lanczos matrix so far. An off-diagonal of 0 says that there is no next vector.
  const std::vector<double>& diagonal() const { return diagonal_; }
  const std::vector<double>& off_diagonal() const { return off_diagonal_; }
  int64_t steps() const { return static_cast<int64_t>(diagonal_.size()); }

  // The vector that the process starts from; and after its first step the projection of H on the basis and
  // this, row-major, in the unit of the basis.
  Rows first() const { return row_of(0); }
  std::vector<double> projection_with_start() const;

  // A combination of the vectors is collected from those that are kept or, where that are not all, the last
  // one during a second run from the start.
  bool keeps_all() const { return steps() < window_; }
  void restart();
  void collect(int64_t step, double coefficient);
  Rows collected() const { return basis_.spare_row(window_ + 1); }

 private:
  Rows start_row() const { return basis_.spare_row(window_); }
  Rows row_of(int64_t step) const { return basis_.spare_row(step % window_); }
  at::Tensor expected_overlaps(const Rows& product, const at::Tensor& of_directions) const;
  at::Tensor factor(double value) const;  // as subtract_combination takes it

  const RitzBasis& basis_;
  int64_t window_ = 2;  // vectors kept
  at::Tensor minus_coupling_;
  std::vector<double> diagonal_, off_diagonal_;
  std::vector<double> start_overlaps_;  // v_i · H x, x · H x and H v_i · x of the start x
  double largest_ = 0.0;                // of both
};

}  // namespace dynloss
