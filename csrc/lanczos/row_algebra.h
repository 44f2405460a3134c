#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace dynloss {

// Linear algebra of a few long rows, each contiguous, in double or single precision on any device; nothing is
// recorded for autograd. What is small and on the host is done by plain loops: after a product the caches are
// cold, and a call of BLAS through ATen takes several times as long as its work.

// a bᵀ: shape (rows of a, rows of b), or (rows of a,) for a single vector b.
at::Tensor inner_products(const at::Tensor& a, const at::Tensor& b);

// coefficients · rows: shape (rows of coefficients, length).
at::Tensor combinations(const at::Tensor& coefficients, const at::Tensor& rows);

// out = x - coefficients · rows for one vector of coefficients. x may be out.
void subtract_combination(at::Tensor out, const at::Tensor& x, const at::Tensor& coefficients,
                          const at::Tensor& rows);

// x *= factor
void scale(at::Tensor x, double factor);

// The lengths of the rows of x, or that of a single vector, on the host.
std::vector<double> norms(const at::Tensor& x);

// A small tensor as doubles on the host: the one synchronisation of a decision.
std::vector<double> to_host(const at::Tensor& values);

// A row-major matrix as a tensor with the dtype and on the device of `like`. May share the memory of
// `values`.
at::Tensor to_device(const std::vector<double>& values, int64_t columns, const at::Tensor& like);

}  // namespace dynloss
