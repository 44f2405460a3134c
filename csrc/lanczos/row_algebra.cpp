#include "row_algebra.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmv.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>

#include <algorithm>
#include <cmath>

// Compiled once per instruction set, of which the loader takes the widest that the processor has.
#if defined(__x86_64__) && defined(__GLIBC__)
#define PER_INSTRUCTION_SET __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PER_INSTRUCTION_SET
#endif

namespace dynloss {
namespace {

using BelowAutograd = at::AutoDispatchBelowADInplaceOrView;

// Numbers in a block of rows that plain loops are quicker for: what fits into the second cache.
constexpr int64_t kSmall = 1 << 16;

// A quarter of the sum at a time: one addition would wait for the last.
#define DEFINE_LOOPS(T)                                                                 \
  PER_INSTRUCTION_SET T dot(const T* a, const T* b, int64_t length) {                   \
    const int64_t q = length / 4;                                                       \
    T s0 = 0, s1 = 0, s2 = 0, s3 = 0;                                                   \
    _Pragma("omp simd reduction(+ : s0, s1, s2, s3)") for (int64_t i = 0; i < q; ++i) { \
      s0 += a[i] * b[i];                                                                \
      s1 += a[i + q] * b[i + q];                                                        \
      s2 += a[i + 2 * q] * b[i + 2 * q];                                                \
      s3 += a[i + 3 * q] * b[i + 3 * q];                                                \
    }                                                                                   \
    for (int64_t i = 4 * q; i < length; ++i) s0 += a[i] * b[i];                         \
    return (s0 + s1) + (s2 + s3);                                                       \
  }                                                                                     \
  PER_INSTRUCTION_SET void add_scaled(T* out, T factor, const T* x, int64_t length) {   \
    _Pragma("omp simd") for (int64_t i = 0; i < length; ++i) out[i] += factor * x[i];   \
  }
DEFINE_LOOPS(float)
DEFINE_LOOPS(double)
#undef DEFINE_LOOPS

}  // namespace

bool Rows::small() const { return matrix_.is_cpu() && count_ * length() <= kSmall; }

at::Tensor Rows::tensor() const {
  const BelowAutograd below;
  if (matrix_.dim() == 1) return matrix_.unsqueeze(0);
  return matrix_.slice(0, first_, first_ + (count_ - 1) * step_ + 1, step_);
}

at::Tensor Rows::vector() const {
  const BelowAutograd below;
  return matrix_.dim() == 1 ? matrix_ : matrix_.select(0, first_);
}

at::Tensor inner_products(const Rows& a, const Rows& b) {
  const BelowAutograd below;
  const bool single = b.count() == 1;
  if (!a.small()) return single ? at::mv(a.tensor(), b.vector()) : at::mm(a.tensor(), b.tensor().t());
  const at::Tensor out = single ? at::empty({a.count()}, a.matrix().options())
                                : at::empty({a.count(), b.count()}, a.matrix().options());
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "inner_products", [&] {
    auto* entry = out.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < a.count(); ++i) {
      for (int64_t j = 0; j < b.count(); ++j) {
        *entry++ = dot(a.row<scalar_t>(i), b.row<scalar_t>(j), a.length());
      }
    }
  });
  return out;
}

at::Tensor combinations(const Rows& coefficients, const Rows& rows) {
  const BelowAutograd below;
  if (!rows.small()) return at::mm(coefficients.tensor(), rows.tensor());
  const int64_t length = rows.length();
  const at::Tensor out = at::empty({coefficients.count(), length}, rows.matrix().options());
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "combinations", [&] {
    auto* to = out.mutable_data_ptr<scalar_t>();
    std::fill_n(to, out.numel(), scalar_t(0));
    for (int64_t i = 0; i < coefficients.count(); ++i, to += length) {
      const auto* weights = coefficients.row<scalar_t>(i);
      for (int64_t j = 0; j < rows.count(); ++j) add_scaled(to, weights[j], rows.row<scalar_t>(j), length);
    }
  });
  return out;
}

void subtract_combination(const Rows& out, const Rows& x, const at::Tensor& coefficients, const Rows& rows) {
  const BelowAutograd below;
  if (!rows.small()) {
    at::Tensor to = out.vector();
    at::addmv_out(to, x.vector(), rows.tensor().t(), coefficients, 1, -1);
    return;
  }
  copy(out, x);
  AT_DISPATCH_FLOATING_TYPES(coefficients.scalar_type(), "subtract_combination", [&] {
    const auto* weights = coefficients.const_data_ptr<scalar_t>();
    const int64_t step = coefficients.stride(0);
    for (int64_t j = 0; j < rows.count(); ++j) {
      add_scaled(out.row<scalar_t>(0), -weights[j * step], rows.row<scalar_t>(j), rows.length());
    }
  });
}

void copy(const Rows& out, const Rows& x) {
  if (!out.small()) {
    out.vector().copy_(x.vector());
    return;
  }
  AT_DISPATCH_FLOATING_TYPES(x.matrix().scalar_type(), "copy", [&] {
    const auto* from = x.row<scalar_t>(0);
    auto* to = out.row<scalar_t>(0);
    if (from != to) std::copy_n(from, x.length(), to);
  });
}

void scale(const Rows& x, double factor) {
  const BelowAutograd below;
  if (!x.small()) {
    x.vector().mul_(factor);
    return;
  }
  AT_DISPATCH_FLOATING_TYPES(x.matrix().scalar_type(), "scale", [&] {
    auto* entries = x.row<scalar_t>(0);
    for (int64_t i = 0; i < x.length(); ++i) entries[i] *= static_cast<scalar_t>(factor);
  });
}

std::vector<double> norms(const Rows& x) {
  const BelowAutograd below;
  if (!x.small()) return to_host(at::linalg_vector_norm(x.tensor(), 2, -1));
  std::vector<double> out;
  AT_DISPATCH_FLOATING_TYPES(x.matrix().scalar_type(), "norms", [&] {
    for (int64_t i = 0; i < x.count(); ++i) {
      const auto* row = x.row<scalar_t>(i);
      out.push_back(std::sqrt(static_cast<double>(dot(row, row, x.length()))));
    }
  });
  return out;
}

std::vector<double> to_host(const at::Tensor& values) {
  const BelowAutograd below;
  const bool direct = values.is_cpu() && values.scalar_type() == at::kDouble && values.is_contiguous();
  const at::Tensor host = direct ? values : values.to(at::kCPU, at::kDouble).contiguous();
  const double* begin = host.const_data_ptr<double>();
  return {begin, begin + host.numel()};
}

at::Tensor to_device(const std::vector<double>& values, int64_t columns, const at::Tensor& like) {
  const BelowAutograd below;
  const auto rows = static_cast<int64_t>(values.size()) / columns;
  const at::Tensor host = at::empty({rows, columns}, at::TensorOptions(at::kDouble));
  std::copy(values.begin(), values.end(), host.mutable_data_ptr<double>());
  return like.is_cpu() && like.scalar_type() == at::kDouble ? host : host.to(like.options());
}

}  // namespace dynloss
