#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "operator.h"

namespace dynloss {

// A Python callable v -> H v. It runs with the GIL held and under the grad mode of the code that made the
// operator; what it raises passes through unchanged.
class PythonOperator final : public SymmetricOperator {
 public:
  // like: a tensor with the dtype and on the device of the vectors.
  PythonOperator(pybind11::function product, int64_t size, const at::Tensor& like, bool symmetric);

  int64_t size() const override { return size_; }
  at::TensorOptions options() const override { return options_; }
  at::Tensor apply(const at::Tensor& v) override;
  bool symmetric_by_construction() const override { return symmetric_; }

 private:
  pybind11::function product_;
  int64_t size_;
  at::TensorOptions options_;
  bool grad_mode_;
  bool symmetric_;
};

}  // namespace dynloss
