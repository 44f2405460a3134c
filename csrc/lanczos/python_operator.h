#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "operator.h"

namespace dynloss {

// A Python callable v -> H v. It runs with the GIL held and under the grad mode of the code that made the
// operator; what it raises passes through unchanged.
class PythonOperator final : public SymmetricOperator {
 public:
  // like: a tensor with the dtype and on the device of the vectors. noisy: apply_noisily, of an operator that
  // is differentiated as far as its parts are: operators that the product is composed of. noise: () ->
  // noise().
  PythonOperator(pybind11::function product, int64_t size, const at::Tensor& like,
                 std::optional<pybind11::function> noisy,
                 std::vector<std::shared_ptr<SymmetricOperator>> parts,
                 std::optional<pybind11::function> noise);

  int64_t size() const override { return size_; }
  at::TensorOptions options() const override { return options_; }
  at::Tensor apply(const at::Tensor& v) override;
  at::Tensor apply_noisily(const at::Tensor& v) override;
  bool is_differentiated() const override;
  void check_values() const override;
  double noise() const override;

 private:
  at::Tensor call(const pybind11::function& product, const at::Tensor& v) const;

  pybind11::function product_;
  std::optional<pybind11::function> noisy_;
  std::vector<std::shared_ptr<SymmetricOperator>> parts_;
  std::optional<pybind11::function> noise_;
  int64_t size_;
  at::TensorOptions options_;
  bool grad_mode_;
};

}  // namespace dynloss
