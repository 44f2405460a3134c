#include "small_eigen.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace dynloss {
namespace {

// A symmetric matrix on its way to diagonal form by rotations and reflections Q, of which the first columns
// are kept: once it is tridiagonal, the matrix is Qᵀ T Q with the diagonal and off-diagonal of T.
class Diagonalisation {
 public:
  Diagonalisation(std::vector<double> matrix, int64_t size, int64_t columns)
      : a_(std::move(matrix)), m_(size), columns_(columns), q_(size * columns), d_(size), e_(size) {
    for (int64_t i = 0; i < columns_; ++i) q_[i * columns_ + i] = 1.0;
  }

  EigenPairs run() && {
    for (int64_t j = 0; j + 2 < m_; ++j) reflect(j);
    for (int64_t i = 0; i < m_; ++i) {
      d_[i] = a_[i * m_ + i];
      if (i + 1 < m_) e_[i] = a_[(i + 1) * m_ + i];
    }
    int64_t steps = 0;
    for (int64_t end = m_ - 1; end > 0;) {
      int64_t begin = end;
      while (begin > 0 && !negligible(begin - 1)) --begin;
      if (begin == end) {
        --end;
        continue;
      }
      TORCH_INTERNAL_ASSERT(++steps <= 60 * m_, "QR of a projected problem does not converge");
      chase(begin, end);
    }
    return {std::move(d_), std::move(q_)};
  }

 private:
  // Zeros column j below the first subdiagonal.
  void reflect(int64_t j) {
    const int64_t first = j + 1;
    std::vector<double> u(m_), p(m_);
    double norm = 0.0;
    for (int64_t i = first; i < m_; ++i) norm = std::hypot(norm, u[i] = a_[i * m_ + j]);
    if (norm == 0.0) return;
    const double target = -std::copysign(norm, u[first]);
    if (std::all_of(u.begin() + first + 1, u.end(), [](double x) { return x == 0.0; })) {
      change_sign(first);  // all that is left of a reflection of a tridiagonal matrix
      return;
    }
    u[first] -= target;
    double length = 0.0;
    for (int64_t i = first; i < m_; ++i) length = std::hypot(length, u[i]);
    for (int64_t i = first; i < m_; ++i) u[i] /= length;
    a_[first * m_ + j] = target;

    double bend = 0.0;  // uᵀ A u
    for (int64_t i = first; i < m_; ++i) {
      for (int64_t k = first; k < m_; ++k) p[i] += a_[i * m_ + k] * u[k];
      bend += u[i] * p[i];
    }
    for (int64_t i = first; i < m_; ++i) p[i] -= bend * u[i];
    for (int64_t i = first; i < m_; ++i) {
      for (int64_t k = first; k < m_; ++k) a_[i * m_ + k] -= 2.0 * (u[i] * p[k] + p[i] * u[k]);
    }
    std::fill(p.begin(), p.end(), 0.0);
    for (int64_t i = first; i < m_; ++i) {
      for (int64_t k = 0; k < columns_; ++k) p[k] += u[i] * q_[i * columns_ + k];
    }
    for (int64_t i = first; i < m_; ++i) {
      for (int64_t k = 0; k < columns_; ++k) q_[i * columns_ + k] -= 2.0 * u[i] * p[k];
    }
  }

  void change_sign(int64_t i) {
    for (int64_t k = i - 1; k < m_; ++k) {
      if (k != i) a_[k * m_ + i] = a_[i * m_ + k] = -a_[i * m_ + k];
    }
    for (int64_t k = 0; k < columns_; ++k) q_[i * columns_ + k] = -q_[i * columns_ + k];
  }

  bool negligible(int64_t i) {
    const double around = std::abs(d_[i]) + std::abs(d_[i + 1]);
    const double floor = std::numeric_limits<double>::min();
    return std::abs(e_[i]) <= std::max(std::numeric_limits<double>::epsilon() * around, floor);
  }

  // One QR step with Wilkinson's shift on the unreduced block from begin to end.
  void chase(int64_t begin, int64_t end) {
    const double half = 0.5 * (d_[end - 1] - d_[end]);
    const double last = e_[end - 1];
    const double shift = d_[end] - last * (last / (half + std::copysign(std::hypot(half, last), half)));
    double x = d_[begin] - shift;
    double z = e_[begin];
    for (int64_t k = begin; k < end; ++k) {
      const double radius = std::hypot(x, z);
      const double c = radius > 0.0 ? x / radius : 1.0;
      const double s = radius > 0.0 ? z / radius : 0.0;
      if (k > begin) e_[k - 1] = radius;
      const double upper = d_[k], lower = d_[k + 1], off = e_[k];
      d_[k] = c * c * upper + 2.0 * c * s * off + s * s * lower;
      d_[k + 1] = s * s * upper - 2.0 * c * s * off + c * c * lower;
      e_[k] = c * s * (lower - upper) + (c * c - s * s) * off;
      if (k + 1 < end) {
        x = e_[k];
        z = s * e_[k + 1];
        e_[k + 1] *= c;
      }
      for (int64_t j = 0; j < columns_; ++j) {
        double &first = q_[k * columns_ + j], &second = q_[(k + 1) * columns_ + j];
        const double turned = c * first + s * second;
        second = c * second - s * first;
        first = turned;
      }
    }
  }

  std::vector<double> a_;
  int64_t m_, columns_;
  std::vector<double> q_;  // (m, columns)
  std::vector<double> d_, e_;
};

}  // namespace

EigenPairs symmetric_eigen(const std::vector<double>& matrix, int64_t size, int64_t components) {
  double scale = 0.0;  // squares of the scaled entries neither overflow nor vanish
  for (const double entry : matrix) scale = std::max(scale, std::abs(entry));
  if (scale == 0.0) scale = 1.0;
  std::vector<double> symmetric(size * size);
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j < size; ++j) {
      symmetric[i * size + j] = 0.5 * (matrix[i * size + j] / scale + matrix[j * size + i] / scale);
    }
  }
  EigenPairs pairs = Diagonalisation(std::move(symmetric), size, components).run();
  for (double& value : pairs.values) value *= scale;
  return pairs;
}

EigenPairs tridiagonal_eigen(const std::vector<double>& alpha, const std::vector<double>& beta,
                             int64_t components) {
  const auto size = static_cast<int64_t>(alpha.size());
  std::vector<double> matrix(size * size);
  for (int64_t i = 0; i < size; ++i) {
    matrix[i * size + i] = alpha[i];
    if (i + 1 < size) matrix[i * size + i + 1] = matrix[(i + 1) * size + i] = beta[i];
  }
  return symmetric_eigen(matrix, size, components);
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
