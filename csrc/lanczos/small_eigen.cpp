#include "small_eigen.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

namespace dynloss {
namespace {

// Nothing beside a largest entry of 1; the squares of lengths that are no less have all their digits.
constexpr double kNothing = 1e-140;

// y += factor * x, of arrays apart.
void add(double* y, double factor, const double* x, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] += factor * x[i];
}

void rotate(double* x, double* y, double c, double s, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const double turned = c * x[i] + s * y[i];
    y[i] = c * y[i] - s * x[i];
    x[i] = turned;
  }
}

// A symmetric matrix, its largest entry 1, on its way to diagonal form by rotations and reflections Q, of
// which the first columns are kept: once it is tridiagonal, the matrix is Qᵀ T Q with the diagonal and
// off-diagonal of T.
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
      if (++steps > 60 * m_) throw std::logic_error("QR of a projected problem does not converge");
      chase(begin, end);
    }
    return {std::move(d_), std::move(q_)};
  }

 private:
  // Zeros column j below the first subdiagonal.
  void reflect(int64_t j) {
    const int64_t first = j + 1;
    std::vector<double> u(m_), p(m_);
    double square = 0.0;
    for (int64_t i = first; i < m_; ++i) {
      u[i] = a_[i * m_ + j];
      square += u[i] * u[i];
    }
    const double norm = std::sqrt(square);
    if (norm < kNothing) return;
    const double target = -std::copysign(norm, u[first]);
    if (std::all_of(u.begin() + first + 1, u.end(), [](double x) { return x == 0.0; })) {
      change_sign(first);  // all that is left of a reflection of a tridiagonal matrix
      return;
    }
    const double length = std::sqrt(2.0 * norm * (norm + std::abs(u[first])));  // of u - target e
    u[first] -= target;
    for (int64_t i = first; i < m_; ++i) u[i] /= length;
    a_[first * m_ + j] = target;

    for (int64_t i = first; i < m_; ++i) {  // A u, by columns: their sums are independent
      add(&p[first], u[i], &a_[i * m_ + first], m_ - first);
    }
    double bend = 0.0;  // uᵀ A u
    for (int64_t i = first; i < m_; ++i) bend += u[i] * p[i];
    for (int64_t i = first; i < m_; ++i) p[i] -= bend * u[i];
    for (int64_t i = first; i < m_; ++i) {
      add(&a_[i * m_ + first], -2.0 * u[i], &p[first], m_ - first);
      add(&a_[i * m_ + first], -2.0 * p[i], &u[first], m_ - first);
    }
    std::fill(p.begin(), p.end(), 0.0);
    for (int64_t i = first; i < m_; ++i) {
      add(p.data(), u[i], &q_[i * columns_], columns_);
    }
    for (int64_t i = first; i < m_; ++i) {
      add(&q_[i * columns_], -2.0 * u[i], p.data(), columns_);
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
    return std::abs(e_[i]) <= std::max(std::numeric_limits<double>::epsilon() * around, kNothing);
  }

  // One QR step with Wilkinson's shift on the unreduced block from begin to end.
  void chase(int64_t begin, int64_t end) {
    const double half = 0.5 * (d_[end - 1] - d_[end]);
    const double last = e_[end - 1];
    const double shift = d_[end] - last * (last / (half + std::copysign(std::hypot(half, last), half)));
    double x = d_[begin] - shift;
    double z = e_[begin];
    for (int64_t k = begin; k < end; ++k) {
      const double radius = std::sqrt(x * x + z * z);
      const double c = radius > kNothing ? x / radius : 1.0;
      const double s = radius > kNothing ? z / radius : 0.0;
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
      rotate(&q_[k * columns_], &q_[(k + 1) * columns_], c, s, columns_);
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
