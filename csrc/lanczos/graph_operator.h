#pragma once

#include <cstdint>
#include <vector>

#include "flat_parameters.h"
#include "operator.h"

namespace dynloss {

// The Hessian behind a recorded first backward pass: H v is one more backward pass through the graph of the
// gradients (Pearlmutter 1994), which is kept, so that no forward pass and no Python runs per product.
class GraphOperator final : public SymmetricOperator {
 public:
  // gradients[i] is d loss / d parameters[i], computed with create_graph; undefined where the loss does not
  // depend on parameters[i].
  GraphOperator(std::vector<at::Tensor> gradients, std::vector<at::Tensor> parameters);

  int64_t size() const override { return parameters_.size(); }
  at::TensorOptions options() const override { return parameters_.options(); }
  at::Tensor apply(const at::Tensor& v) override;
  bool symmetric_by_construction() const override { return true; }

 private:
  FlatParameters parameters_;
  std::vector<at::Tensor> outputs_;        // the gradients that depend on the parameters
  std::vector<size_t> output_parameters_;  // and which parameters they belong to
};

// The generalised Gauss-Newton matrix Jᵀ ∇²ℓ J of loss = ℓ(z(parameters)) with J = dz/dparameters
// (Schraudolph 2002), exactly: three backward passes through recorded graphs. The product J v is the
// derivative of the linear map u -> Jᵀ u, recorded once for a dummy u.
class GaussNewtonOperator final : public SymmetricOperator {
 public:
  // outputs: z; output_gradient: dloss/dz recorded with create_graph; dummy: like z, requires grad;
  // pullback[i]: (dz/dparameters[i])ᵀ dummy recorded with create_graph, or undefined.
  GaussNewtonOperator(at::Tensor outputs, at::Tensor output_gradient, at::Tensor dummy,
                      std::vector<at::Tensor> pullback, std::vector<at::Tensor> parameters);

  int64_t size() const override { return parameters_.size(); }
  at::TensorOptions options() const override { return parameters_.options(); }
  at::Tensor apply(const at::Tensor& v) override;
  bool symmetric_by_construction() const override { return true; }

 private:
  FlatParameters parameters_;
  at::Tensor outputs_;
  at::Tensor output_gradient_;
  at::Tensor dummy_;
  std::vector<at::Tensor> pullback_;
  std::vector<size_t> pullback_parameters_;
};

}  // namespace dynloss
