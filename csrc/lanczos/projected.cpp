#include "projected.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_eigh.h>

#include <algorithm>
#include <cmath>

namespace dynloss {

EigenPairs symmetric_eigen(const std::vector<double>& matrix, int64_t size) {
  const at::AutoDispatchBelowADInplaceOrView below;
  at::Tensor symmetric = at::empty({size, size}, at::kDouble);
  double* entries = symmetric.mutable_data_ptr<double>();
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j < size; ++j) {
      entries[i * size + j] = 0.5 * (matrix[i * size + j] + matrix[j * size + i]);
    }
  }
  const auto [values, vectors] = at::linalg_eigh(symmetric);
  // LAPACK leaves the eigenvectors in columns of a column-major matrix: in rows of its transpose.
  const at::Tensor rows = vectors.mT().contiguous();
  const double* value_begin = values.const_data_ptr<double>();
  const double* row_begin = rows.const_data_ptr<double>();
  return {{value_begin, value_begin + size}, {row_begin, row_begin + size * size}};
}

double shifted_minres_residual(const std::vector<double>& alpha, const std::vector<double>& beta,
                               double shift) {
  // QR of the (q + 1, q) tridiagonal by Givens rotations; each rotation multiplies the residual by |sin|. The
  // diagonal entry and the one right of it in the current row are all that the next rotation needs.
  double residual = 1.0;
  double diagonal = alpha[0] - shift;
  double above = beta[0];
  for (size_t j = 0; j < alpha.size(); ++j) {
    const double radius = std::hypot(diagonal, beta[j]);
    if (radius == 0.0) return residual;
    const double cosine = diagonal / radius;
    const double sine = beta[j] / radius;
    residual *= std::abs(sine);
    if (j + 1 == alpha.size()) break;
    diagonal = cosine * (alpha[j + 1] - shift) - sine * above;
    above = cosine * beta[j + 1];
  }
  return residual;
}

}  // namespace dynloss
