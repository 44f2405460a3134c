// csrc/lanczos/small_eigen: what it returns, put together again in extended precision.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "lanczos/small_eigen.h"

using namespace dynloss;

namespace {

using Matrix = std::vector<double>;  // row-major
using Real = long double;

std::mt19937_64 randomness(0);

double normal() { return std::normal_distribution<double>()(randomness); }

// Entry i, j is a normal number times the product of two of the scales.
Matrix scaled(int64_t size, const std::vector<double>& scales) {
  Matrix a(size * size);
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j <= i; ++j) a[i * size + j] = a[j * size + i] = scales[i] * normal() * scales[j];
  return a;
}

// Q Qᵀ = 1 and Qᵀ D Q = A, to some roundings of the norm of A.
void check_pairs(const Matrix& a, int64_t size) {
  const EigenPairs pairs = symmetric_eigen(a, size, size);
  Real norm = 0.0L;
  for (const double x : a) norm = std::hypot(norm, Real(x));
  const Real tolerance = 4e-16L * (10 + size);
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < size; ++j) {
      Real product = 0.0L, entry = 0.0L;
      for (int64_t k = 0; k < size; ++k) {
        product += Real(pairs.vectors[i * size + k]) * pairs.vectors[j * size + k];
        entry += Real(pairs.vectors[k * size + i]) * pairs.values[k] * pairs.vectors[k * size + j];
      }
      CHECK(std::abs(product - (i == j)) <= tolerance);
      CHECK(std::abs(entry - a[i * size + j]) <= tolerance * norm);
    }
  // Fewer components are the first of these.
  const int64_t few = (size + 1) / 2;
  const EigenPairs part = symmetric_eigen(a, size, few);
  CHECK(part.values == pairs.values);
  for (int64_t i = 0; i < size; ++i)
    for (int64_t k = 0; k < few; ++k) CHECK(part.vectors[i * few + k] == pairs.vectors[i * size + k]);
}

void test_matrices() {
  for (const int64_t size : {1, 2, 3, 4, 7, 16, 33, 64}) {
    context = "size " + std::to_string(size);
    check_pairs(Matrix(size * size, 0.0), size);
    check_pairs(Matrix(size * size, 1.0), size);
    for (const double scale : {1.0, 1e-150, 1e140}) check_pairs(scaled(size, Matrix(size, scale)), size);
    // Of every order at once, in order and not: squares and products of what is small vanish.
    for (const double decades : {8.0, 75.0, 150.0, 300.0}) {
      Matrix graded(size), mixed(size);
      for (int64_t i = 0; i < size; ++i) graded[i] = std::pow(10.0, -decades * i / size);
      for (double& x : mixed) x = std::pow(10.0, -decades * std::generate_canonical<double, 53>(randomness));
      check_pairs(scaled(size, graded), size);
      check_pairs(scaled(size, mixed), size);
      std::reverse(graded.begin(), graded.end());
      check_pairs(scaled(size, graded), size);
    }
    // Blocks of 1 that are joined by less and less.
    for (const double link : {1e-16, 1e-130, 1e-139, 1e-141, 1e-155, 1e-165, 1e-300}) {
      Matrix a = scaled(size, Matrix(size, 1.0));
      for (int64_t i = 0; i < size; ++i)
        for (int64_t j = 0; j < size; ++j)
          if (i / 3 != j / 3) a[i * size + j] *= link;
      check_pairs(a, size);
    }
    // Tridiagonal, as Lanczos makes them, with some zeros.
    Matrix a(size * size);
    for (int64_t i = 0; i < size; ++i) {
      a[i * size + i] = normal();
      if (i > 0 && randomness() % 4 != 0) a[i * size + i - 1] = a[(i - 1) * size + i] = std::abs(normal());
    }
    check_pairs(a, size);
  }
}

}  // namespace

int main() {
  test_matrices();
  return finish("csrc/lanczos/small_eigen");
}
