#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace dynloss {

// Rows first, first + step, ... of a matrix, each contiguous, or a single vector as one row. What is small
// and on the host is done by plain loops on it: after a product the caches are cold, and a view or a call of
// BLAS through ATen takes several times as long as the work.
class Rows {
 public:
  Rows(const at::Tensor& x) : Rows(x, 0, x.dim() == 2 ? x.size(0) : 1) {}  // all of it
  Rows(const at::Tensor& matrix, int64_t first, int64_t count, int64_t step = 1)
      : matrix_(matrix), first_(first), count_(count), step_(step) {}

  int64_t count() const { return count_; }
  int64_t length() const { return matrix_.size(-1); }
  bool small() const;

  at::Tensor tensor() const;  // shape (count, length)
  at::Tensor vector() const;  // of a single row, shape (length,)

  template <typename T>
  T* row(int64_t i) const {
    const int64_t stride = matrix_.dim() == 2 ? matrix_.stride(0) : 0;
    return static_cast<T*>(matrix_.data_ptr()) + (first_ + i * step_) * stride;
  }

  const at::Tensor& matrix() const { return matrix_; }

 private:
  at::Tensor matrix_;
  int64_t first_, count_, step_;
};

// Linear algebra of a few long rows in double or single precision on any device; nothing is recorded for
// autograd.

// a bᵀ: shape (rows of a, rows of b), or (rows of a,) for a single row b.
at::Tensor inner_products(const Rows& a, const Rows& b);

// coefficients · rows: shape (rows of coefficients, length).
at::Tensor combinations(const Rows& coefficients, const Rows& rows);

// out = x - coefficients · rows for single rows x and out, which may be the same, and a vector of
// coefficients.
void subtract_combination(const Rows& out, const Rows& x, const at::Tensor& coefficients, const Rows& rows);

// out = x for single rows.
void copy(const Rows& out, const Rows& x);

// x *= factor for a single row.
void scale(const Rows& x, double factor);

// The lengths of rows, on the host.
std::vector<double> norms(const Rows& x);

// A small tensor as doubles on the host: the one synchronisation of a decision.
std::vector<double> to_host(const at::Tensor& values);

// A row-major matrix as a tensor with the dtype and on the device of `like`.
at::Tensor to_device(const std::vector<double>& values, int64_t columns, const at::Tensor& like);

}  // namespace dynloss
