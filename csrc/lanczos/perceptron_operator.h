#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/perceptron.h"
#include "eigsh.h"
#include "operator.h"

namespace dynloss {

// The perceptrons of an ensemble at one step: the arguments of their ops (csrc/library.cpp).
struct Perceptrons {
  at::Tensor parameters, inputs, target;
  int64_t hidden, activation, step;
  at::Tensor clock;
  std::optional<at::Tensor> class_order, table;

  Perceptrons member(int64_t index) const;
};

// The Hessian of the loss of one of them: by the op perceptron_hvp, or on CPU by what is behind it.
class PerceptronOperator final : public SymmetricOperator {
 public:
  explicit PerceptronOperator(Perceptrons member);

  int64_t size() const override { return member_.parameters.size(1); }
  at::TensorOptions options() const override { return member_.parameters.options(); }
  at::Tensor apply(const at::Tensor& v) override;
  at::Tensor apply_noisily(const at::Tensor& v) override;
  bool is_differentiated() const override { return true; }

 private:
  Perceptrons member_;
  std::unique_ptr<cpu::PerceptronProduct> product_;  // null where there are no CPU kernels
};

// The largest eigenvalues of the wanted ones of members [begin, end), several at a time; start: (M, m, P),
// where each search begins, or undefined. options.poll is not called: it may need the interpreter.
std::vector<EigshResult> perceptron_eigenvalues(const Perceptrons& ensemble, const std::vector<bool>& wanted,
                                                const EigshOptions& options, const at::Tensor& start,
                                                int64_t begin, int64_t end);

}  // namespace dynloss
