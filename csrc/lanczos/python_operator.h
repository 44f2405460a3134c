#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "operator.h"

namespace dynloss {

// Shards by what a Python object says of them: dynloss_ext/_shards.py.
class PythonShards final : public Shards {
 public:
  explicit PythonShards(const pybind11::object& object);

  int64_t dimension() const override { return dimension_; }
  void sum(const at::Tensor& numbers) const override;
  void max(const at::Tensor& numbers) const override;
  at::Tensor normal(uint64_t seed) const override;
  at::Tensor signs(const at::Generator& generator) const override;

 private:
  int64_t dimension_;
  pybind11::object sum_, max_, normal_, signs_;
};

// A Python callable v -> H v. It runs with the GIL held and under the grad mode of the code that made the
// operator; what it raises passes through unchanged.
class PythonOperator final : public SymmetricOperator {
 public:
  // like: a tensor with the dtype and on the device of the vectors. noisy: apply_noisily, of an operator that
  // is differentiated as far as its parts are: operators that the product is composed of. noise: () ->
  // noise(). shards: what tells the operator's vectors from whole ones.
  PythonOperator(pybind11::function product, int64_t size, const at::Tensor& like,
                 std::optional<pybind11::function> noisy,
                 std::vector<std::shared_ptr<SymmetricOperator>> parts,
                 std::optional<pybind11::function> noise, std::optional<pybind11::object> shards);

  int64_t size() const override { return size_; }
  at::TensorOptions options() const override { return options_; }
  at::Tensor apply(const at::Tensor& v) override;
  at::Tensor apply_noisily(const at::Tensor& v) override;
  bool is_differentiated() const override;
  void check_values() const override;
  double noise() const override;
  const Shards* shards() const override { return shards_ ? &*shards_ : nullptr; }

 private:
  at::Tensor call(const pybind11::function& product, const at::Tensor& v) const;

  pybind11::function product_;
  std::optional<pybind11::function> noisy_;
  std::vector<std::shared_ptr<SymmetricOperator>> parts_;
  std::optional<pybind11::function> noise_;
  std::optional<PythonShards> shards_;
  int64_t size_;
  at::TensorOptions options_;
  bool grad_mode_;
};

}  // namespace dynloss
