#include "python_operator.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_is_zerotensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <string>
#include <utility>

#include "row_algebra.h"

namespace py = pybind11;

namespace dynloss {

PythonShards::PythonShards(const py::object& object)
    : dimension_(object.attr("dimension").cast<int64_t>()),
      sum_(object.attr("sum")),
      max_(object.attr("max")),
      normal_(object.attr("normal")),
      signs_(object.attr("signs")) {}

void PythonShards::sum(const at::Tensor& numbers) const {
  const py::gil_scoped_acquire gil;
  sum_(numbers);
}

void PythonShards::max(const at::Tensor& numbers) const {
  const py::gil_scoped_acquire gil;
  max_(numbers);
}

at::Tensor PythonShards::normal(uint64_t seed) const {
  const py::gil_scoped_acquire gil;
  return normal_(seed).cast<at::Tensor>();
}

at::Tensor PythonShards::signs(const at::Generator& generator) const {
  const py::gil_scoped_acquire gil;
  return signs_(generator).cast<at::Tensor>();
}

PythonOperator::PythonOperator(py::function product, int64_t size, const at::Tensor& like,
                               std::optional<py::function> noisy,
                               std::vector<std::shared_ptr<SymmetricOperator>> parts,
                               std::optional<py::function> noise, std::optional<py::object> shards)
    : product_(std::move(product)),
      noisy_(std::move(noisy)),
      parts_(std::move(parts)),
      noise_(std::move(noise)),
      shards_(shards ? std::make_optional<PythonShards>(*shards) : std::nullopt),
      size_(size),
      options_(like.options()),
      grad_mode_(at::GradMode::is_enabled()) {}

at::Tensor PythonOperator::apply(const at::Tensor& v) { return call(product_, v); }

at::Tensor PythonOperator::apply_noisily(const at::Tensor& v) {
  return call(noisy_ ? *noisy_ : product_, v);  // not value_or: it counts a reference without the GIL
}

bool PythonOperator::is_differentiated() const {
  return noisy_.has_value() && std::all_of(parts_.begin(), parts_.end(),
                                           [](const auto& part) { return part->is_differentiated(); });
}

void PythonOperator::check_values() const {
  for (const auto& part : parts_) part->check_values();
}

double PythonOperator::noise() const {
  if (!noise_) return 0.0;
  const py::gil_scoped_acquire gil;
  return (*noise_)().cast<double>();
}

at::Tensor PythonOperator::call(const py::function& product_of, const at::Tensor& v) const {
  const py::gil_scoped_acquire gil;
  const at::AutoGradMode grad_mode(grad_mode_);
  const OnShards whole(nullptr);                    // for what it computes
  const py::object answer = product_of(v.clone());  // its own: what it does to v must not reach the driver
  py::detail::make_caster<at::Tensor> tensor;
  if (!tensor.load(answer, /*convert=*/false)) {
    throw py::type_error("H(v): expected a torch.Tensor, got " +
                         std::string(py::str(py::type::of(answer).attr("__name__"))));
  }
  const at::Tensor product = py::detail::cast_op<at::Tensor&>(tensor).detach();
  if (product.layout() != at::kStrided || product.dim() != 1 || product.size(0) != size_ ||
      product.scalar_type() != v.scalar_type() || product.device() != v.device()) {
    throw py::value_error(c10::str("H(v): expected a dense tensor like v, of shape (", size_, ",), ",
                                   v.scalar_type(), " on ", v.device(), ", got shape ", product.sizes(), ", ",
                                   product.scalar_type(), ", ", product.layout(), " on ", product.device()));
  }
  // In plain memory, where an expanded tensor and torch's symbolic zeros are not.
  const bool plain = product.is_contiguous() && !product._is_zerotensor() && !product.is_neg();
  return plain ? product : at::empty_like(v).copy_(product);
}

}  // namespace dynloss
