#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "operator.h"

namespace dynloss {

// Parameters seen as one flat vector, at the values they had when this was made.
class FlatParameters {
 public:
  // labels: what to call each in an error.
  FlatParameters(std::vector<at::Tensor> parameters, std::vector<std::string> labels);

  const std::vector<at::Tensor>& tensors() const { return parameters_; }
  int64_t size() const { return size_; }
  at::TensorOptions options() const { return parameters_.front().options(); }

  // Throws where a parameter was changed in place, or given other storage or strides, since then, as far as
  // their version counters know. Costs nothing.
  void check_unchanged() const;
  // The same by their values, which fused optimizers change behind the counters' back. Waits for the device.
  void check_values() const;

  // The parts of a flat vector that belong to the given parameters, in their shapes.
  std::vector<at::Tensor> parts(const at::Tensor& v, const std::vector<size_t>& parameters) const;

  // One flat vector from a tensor per parameter; undefined ones count as zeros.
  at::Tensor join(std::vector<at::Tensor> parts) const;

 private:
  struct Snapshot {
    uint32_t version;
    const void* data;
    std::vector<int64_t> sizes, strides;
  };

  std::vector<at::Tensor> parameters_;
  std::vector<std::string> labels_;
  std::vector<Snapshot> snapshots_;
  at::Tensor values_;  // their fingerprints
  std::vector<int64_t> offsets_;
  int64_t size_ = 0;
};

// What has a graph of its own among some tensors, one for each parameter, and which parameters that belongs
// to.
struct Recorded {
  explicit Recorded(const std::vector<std::optional<at::Tensor>>& of_each);

  std::vector<at::Tensor> tensors;
  std::vector<size_t> parameters;
};

// A matrix behind recorded graphs of a function of parameters.
class ParameterOperator : public SymmetricOperator {
 public:
  explicit ParameterOperator(FlatParameters parameters) : parameters_(std::move(parameters)) {}

  int64_t size() const override { return parameters_.size(); }
  at::TensorOptions options() const override { return parameters_.options(); }
  at::Tensor apply_noisily(const at::Tensor& v) override;
  bool is_differentiated() const override { return true; }
  void check_values() const override { parameters_.check_values(); }

 protected:
  // Tensors whose graphs a product goes through.
  virtual std::vector<at::Tensor> roots() const = 0;

  FlatParameters parameters_;
};

// The Hessian behind a recorded first backward pass: H v is one more backward pass through the graph of the
// gradients (Pearlmutter 1994), which is kept, so that no forward pass and no Python runs per product.
class GraphOperator final : public ParameterOperator {
 public:
  // gradients[i] is d loss / d parameters[i], computed with create_graph, or none where the loss does not
  // depend on parameters[i].
  GraphOperator(const std::vector<std::optional<at::Tensor>>& gradients, FlatParameters parameters);

  at::Tensor apply(const at::Tensor& v) override;

 protected:
  std::vector<at::Tensor> roots() const override { return gradients_.tensors; }

 private:
  Recorded gradients_;
};

// The generalised Gauss-Newton matrix Jᵀ ∇²ℓ J of loss = ℓ(z(parameters)) with J = dz/dparameters
// (Schraudolph 2002), exactly: three backward passes through recorded graphs. The product J v is the
// derivative of the linear map u -> Jᵀ u, recorded once for a dummy u.
class GaussNewtonOperator final : public ParameterOperator {
 public:
  // outputs: z; output_gradient: dloss/dz recorded with create_graph; dummy: like z, requires grad;
  // pullback[i]: (dz/dparameters[i])ᵀ dummy recorded with create_graph, or none.
  GaussNewtonOperator(const at::Tensor& outputs, const at::Tensor& output_gradient, const at::Tensor& dummy,
                      const std::vector<std::optional<at::Tensor>>& pullback, FlatParameters parameters);

  at::Tensor apply(const at::Tensor& v) override;

 protected:
  std::vector<at::Tensor> roots() const override;

 private:
  at::Tensor outputs_, output_gradient_, dummy_;
  Recorded pullback_;
};

}  // namespace dynloss
