#include "ritz_basis.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmv.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace dynloss {
namespace {

// Nothing here is ever differentiated; skipping the autograd layers halves the cost of the small calls.
using BelowAutograd = at::AutoDispatchBelowADInplaceOrView;

}  // namespace

std::vector<double> to_host(const at::Tensor& values) {
  const BelowAutograd below;
  const bool direct = values.is_cpu() && values.scalar_type() == at::kDouble && values.is_contiguous();
  const at::Tensor host = direct ? values : values.to(at::kCPU, at::kDouble).contiguous();
  const double* begin = host.const_data_ptr<double>();
  return {begin, begin + host.numel()};
}

RitzBasis::RitzBasis(int64_t capacity, int64_t length, const at::TensorOptions& options)
    : capacity_(capacity),
      length_(length),
      epsilon_(options.dtype() == at::kFloat ? std::numeric_limits<float>::epsilon()
                                             : std::numeric_limits<double>::epsilon()),
      rows_(at::empty({capacity, 2, length}, options)) {}

double RitzBasis::propose(const at::Tensor& x, double norm) {
  const BelowAutograd below;
  at::Tensor slot = candidate();
  if (size_ > 0) {
    const at::Tensor v = vectors();
    const at::Tensor transposed = v.t();
    at::addmv_out(slot, x, transposed, v.mv(x), 1, -1);
    slot.addmv_(transposed, v.mv(slot), 1, -1);
  } else {
    slot.copy_(x);
  }
  const double remainder = to_host(at::linalg_vector_norm(slot)).front();
  // Below this what is left of x is rounding. (Also false for a norm that is not finite.)
  if (!(remainder > 100.0 * epsilon_ * norm)) return 0.0;
  slot.div_(remainder);
  return remainder;
}

double RitzBasis::distance(const at::Tensor& x) const {
  const BelowAutograd below;
  const at::Tensor v = vectors();
  return to_host(at::linalg_vector_norm(at::addmv(x, v.t(), v.mv(x), 1, -1))).front();
}

bool RitzBasis::accept(const at::Tensor& product) {
  const BelowAutograd below;
  const int64_t m = size_;
  const at::Tensor newest = pair(m);
  newest.select(0, 1).copy_(product);
  // Entry (i, a, b) is the inner product of {v_i, H v_i}[a] with {v, H v}[b].
  const std::vector<double> inner =
      to_host(at::mm(rows_.narrow(0, 0, m + 1).view({2 * (m + 1), length_}), newest.t()));
  const auto vector_product = [&](int64_t i) { return inner[4 * i + 1]; };
  const auto product_vector = [&](int64_t i) { return inner[4 * i + 2]; };
  // A NaN or an infinity in the product survives every inner product with it: 0 · inf is NaN.
  for (int64_t i = 0; i <= m; ++i) {
    if (!std::isfinite(vector_product(i)) || !std::isfinite(product_vector(i))) return false;
  }
  std::vector<double> grown((m + 1) * (m + 1));
  for (int64_t i = 0; i < m; ++i) {
    std::copy_n(&projection_[i * m], m, &grown[i * (m + 1)]);
    grown[i * (m + 1) + m] = vector_product(i);
    grown[m * (m + 1) + i] = product_vector(i);
    asymmetry_ = std::max(asymmetry_, std::abs(vector_product(i) - product_vector(i)));
  }
  grown[m * (m + 1) + m] = vector_product(m);
  product_norm_ = std::sqrt(inner[4 * m + 3]);
  projection_ = std::move(grown);
  ++size_;
  return true;
}

void RitzBasis::restart(const std::vector<double>& coefficients, const std::vector<double>& values) {
  const BelowAutograd below;
  const auto keep = static_cast<int64_t>(values.size());
  const at::Tensor old = rows_.narrow(0, 0, size_).view({size_, 2 * length_});
  rows_.narrow(0, 0, keep).view({keep, 2 * length_}).copy_(at::mm(upload(coefficients, size_), old));
  size_ = keep;
  projection_.assign(keep * keep, 0.0);
  for (int64_t i = 0; i < keep; ++i) projection_[i * keep + i] = values[i];
}

at::Tensor RitzBasis::combine(const std::vector<double>& coefficients) const {
  const BelowAutograd below;
  return at::mm(upload(coefficients, size_), vectors());
}

at::Tensor RitzBasis::residuals(const std::vector<double>& coefficients,
                                const std::vector<double>& values) const {
  const BelowAutograd below;
  std::vector<double> paired(2 * coefficients.size());  // of v_j and of H v_j
  for (size_t i = 0; i < coefficients.size(); ++i) {
    paired[2 * i] = -values[i / size_] * coefficients[i];
    paired[2 * i + 1] = coefficients[i];
  }
  return at::mm(upload(paired, 2 * size_), rows_.narrow(0, 0, size_).view({2 * size_, length_}));
}

at::Tensor RitzBasis::upload(const std::vector<double>& coefficients, int64_t columns) const {
  const auto rows = static_cast<int64_t>(coefficients.size()) / columns;
  const at::Tensor host = at::from_blob(const_cast<double*>(coefficients.data()), {rows, columns},
                                        at::TensorOptions(at::kDouble));
  // The blob lives only as long as the caller's vector, which outlives the GEMM on the CPU alone.
  return rows_.is_cpu() ? host.to(rows_.scalar_type()) : host.to(rows_.options());
}

}  // namespace dynloss
