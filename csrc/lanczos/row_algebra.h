#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "shards.h"

namespace dynloss {

// Rows first, first + step, ... of a matrix, each contiguous, or a single vector as one row. What is on the
// host is done by plain loops on it: after a product of a small network, a view or a call of BLAS through
// ATen takes several times as long as the work; and BLAS adds up a long row in its own precision, which in
// float32 loses the eigenvalues of 10 million parameters.
class Rows {
 public:
  Rows(const at::Tensor& x) : Rows(x, 0, x.dim() == 2 ? x.size(0) : 1) {}  // all of it
  Rows(const at::Tensor& matrix, int64_t first, int64_t count, int64_t step = 1)
      : matrix_(matrix), first_(first), count_(count), step_(step) {}

  int64_t count() const { return count_; }
  int64_t length() const { return matrix_.size(-1); }
  bool on_host() const;

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

// Linear algebra of a few long rows in double or single precision on any device. Nothing is recorded for
// autograd, autocast and TF32 do not reach it, and on the host no result depends on the number of threads.

// While it lives, rows in this thread are shards, or whole for null: inner products and lengths are those of
// whole rows, the same bits in all processes, which make the same calls.
class OnShards {
 public:
  explicit OnShards(const Shards* shards);
  ~OnShards();
  OnShards(const OnShards&) = delete;
  OnShards& operator=(const OnShards&) = delete;

 private:
  const Shards* before_;
};

// a bᵀ in double precision: shape (rows of a, rows of b), or (rows of a,) for a single row b.
at::Tensor inner_products(const Rows& a, const Rows& b);

// coefficients · rows: shape (rows of coefficients, length).
at::Tensor combinations(const Rows& coefficients, const Rows& rows);

// Replaces the first rows of a (count, length) matrix by combinations of all of them, of which there are at
// most as many.
void replace_by_combinations(const at::Tensor& rows, const Rows& coefficients);

// out = x - coefficients · rows for single rows x and out, which may be the same, and coefficients as
// inner_products gives them.
void subtract_combination(const Rows& out, const Rows& x, const at::Tensor& coefficients, const Rows& rows);

// out = x without its part in orthonormal rows, for single rows x and out, which may be the same: classical
// Gram-Schmidt, as often as it takes. `overlaps` are those of the rows with x, or on the host a guess of
// them. Returns the overlaps, as they turned out to be, and as the last entry the length of what is left.
at::Tensor orthogonalise(const Rows& out, const Rows& x, const at::Tensor& overlaps, const Rows& rows);
at::Tensor orthogonalise(const Rows& out, const Rows& x, const Rows& rows);

// out = factor x for single rows, which may be the same.
void assign(const Rows& out, const Rows& x, double factor = 1.0);

// The lengths of rows in double precision: shape (rows of x,), on their device.
at::Tensor lengths(const Rows& x);

// Divides a single row by its length; false, and nothing done, where that is at most `negligible` or NaN.
bool normalise(const Rows& x, double negligible);

// Divides a single row by its length without a reading: where `normalise` does nothing it becomes zeros, or
// NaN. `negligible` is a number on the device of x.
void normalise_blindly(const Rows& x, const at::Tensor& negligible);

// Multiplies a single row by the power of two that brings its largest entry to [1, 2), where no square
// overflows or vanishes, and returns it: 1 for zeros. Does nothing, and returns what is not finite, where an
// entry is not.
double scale_into_range(const Rows& x);

// The distance from 1 to the next number of the dtype.
double rounding_of(const at::TensorOptions& options);

// Small tensors as doubles on the host, one after the other: the one synchronisation of a decision.
std::vector<double> to_host(const std::vector<at::Tensor>& values);

// Sends rows on the host the way of those on a device, too: tests check that way without a device.
void take_device_path(bool on);

// How often to_host was called so far.
int64_t num_reads();

// A row-major matrix as a tensor with the dtype and on the device of `like`.
at::Tensor to_device(const std::vector<double>& values, int64_t columns, const at::Tensor& like);

}  // namespace dynloss
