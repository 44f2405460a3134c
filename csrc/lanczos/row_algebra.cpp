#include "row_algebra.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmv.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>

#include <algorithm>
#include <cmath>

namespace dynloss {
namespace {

using BelowAutograd = at::AutoDispatchBelowADInplaceOrView;

// Numbers in a block of rows that plain loops are quicker for: what fits into the second cache.
constexpr int64_t kSmall = 1 << 16;

bool small(const at::Tensor& rows) { return rows.is_cpu() && rows.numel() <= kSmall; }

template <typename T>
struct Rows {
  explicit Rows(const at::Tensor& x)
      : data(x.const_data_ptr<T>()),
        stride(x.dim() == 2 ? x.stride(0) : 0),
        count(x.dim() == 2 ? x.size(0) : 1),
        length(x.size(-1)) {}

  const T* operator[](int64_t i) const { return data + i * stride; }

  const T* data;
  int64_t stride, count, length;
};

// In several sums at once, which the compiler turns into vectors.
template <typename T>
T dot(const T* a, const T* b, int64_t length) {
  constexpr int64_t kLanes = 16;
  T sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  T sum = 0;
  for (; i < length; ++i) sum += a[i] * b[i];
  for (const T part : sums) sum += part;
  return sum;
}

template <typename T>
void add_scaled(T* out, T factor, const T* x, int64_t length) {
  for (int64_t i = 0; i < length; ++i) out[i] += factor * x[i];
}

}  // namespace

at::Tensor inner_products(const at::Tensor& a, const at::Tensor& b) {
  const BelowAutograd below;
  if (!small(a)) return b.dim() == 1 ? at::mv(a, b) : at::mm(a, b.t());
  const at::Tensor out =
      b.dim() == 1 ? at::empty({a.size(0)}, a.options()) : at::empty({a.size(0), b.size(0)}, a.options());
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "inner_products", [&] {
    const Rows<scalar_t> left(a), right(b);
    auto* entry = out.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < left.count; ++i) {
      for (int64_t j = 0; j < right.count; ++j) *entry++ = dot(left[i], right[j], left.length);
    }
  });
  return out;
}

at::Tensor combinations(const at::Tensor& coefficients, const at::Tensor& rows) {
  const BelowAutograd below;
  if (!small(rows)) return at::mm(coefficients, rows);
  const at::Tensor out = at::empty({coefficients.size(0), rows.size(1)}, rows.options());
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "combinations", [&] {
    const Rows<scalar_t> weights(coefficients), terms(rows);
    auto* to = out.mutable_data_ptr<scalar_t>();
    std::fill_n(to, out.numel(), scalar_t(0));
    for (int64_t i = 0; i < weights.count; ++i, to += terms.length) {
      for (int64_t j = 0; j < terms.count; ++j) add_scaled(to, weights[i][j], terms[j], terms.length);
    }
  });
  return out;
}

void subtract_combination(at::Tensor out, const at::Tensor& x, const at::Tensor& coefficients,
                          const at::Tensor& rows) {
  const BelowAutograd below;
  if (!small(rows)) {
    at::addmv_out(out, x, rows.t(), coefficients, 1, -1);
    return;
  }
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "subtract_combination", [&] {
    const Rows<scalar_t> terms(rows);
    const auto* weights = coefficients.const_data_ptr<scalar_t>();
    const int64_t step = coefficients.stride(0);
    auto* to = out.mutable_data_ptr<scalar_t>();
    const auto* from = x.const_data_ptr<scalar_t>();
    if (from != to) std::copy_n(from, terms.length, to);
    for (int64_t j = 0; j < terms.count; ++j) {
      add_scaled(to, -weights[j * step], terms[j], terms.length);
    }
  });
}

void scale(at::Tensor x, double factor) {
  const BelowAutograd below;
  if (!small(x)) {
    x.mul_(factor);
    return;
  }
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "scale", [&] {
    auto* entries = x.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < x.numel(); ++i) entries[i] *= static_cast<scalar_t>(factor);
  });
}

std::vector<double> norms(const at::Tensor& x) {
  const BelowAutograd below;
  if (!small(x)) return to_host(at::linalg_vector_norm(x, 2, -1));
  std::vector<double> out;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norms", [&] {
    const Rows<scalar_t> rows(x);
    for (int64_t i = 0; i < rows.count; ++i) {
      out.push_back(std::sqrt(static_cast<double>(dot(rows[i], rows[i], rows.length))));
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
  const at::Tensor host =
      at::from_blob(const_cast<double*>(values.data()), {rows, columns}, at::TensorOptions(at::kDouble));
  return host.to(like.options());
}

}  // namespace dynloss
