#include "graph_operator.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd.h>

#include <utility>

namespace dynloss {
namespace {

// A backward pass through a graph that is kept.
std::vector<at::Tensor> pull_back(const std::vector<at::Tensor>& outputs,
                                  const std::vector<at::Tensor>& inputs,
                                  const std::vector<at::Tensor>& seeds) {
  return torch::autograd::grad(outputs, inputs, seeds, /*retain_graph=*/true, /*create_graph=*/false,
                               /*allow_unused=*/true);
}

}  // namespace

FlatParameters::FlatParameters(std::vector<at::Tensor> parameters) : parameters_(std::move(parameters)) {
  TORCH_CHECK_VALUE(!parameters_.empty(), "params: expected at least one, got none");
  for (const at::Tensor& parameter : parameters_) {
    snapshots_.push_back({static_cast<uint32_t>(parameter._version()), parameter.const_data_ptr()});
    offsets_.push_back(size_);
    size_ += parameter.numel();
  }
}

void FlatParameters::check_unchanged() const {
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const bool same = static_cast<uint32_t>(parameters_[i]._version()) == snapshots_[i].version &&
                      parameters_[i].const_data_ptr() == snapshots_[i].data;
    TORCH_CHECK(same, "params[", i,
                "]: expected the values that this operator recorded, got a tensor of shape ",
                parameters_[i].sizes(),
                " that was changed in place, so that products would mix two states: "
                "compute the loss again and build a new operator");
  }
}

std::vector<at::Tensor> FlatParameters::parts(const at::Tensor& v,
                                              const std::vector<size_t>& parameters) const {
  const at::AutoDispatchBelowADInplaceOrView below;
  std::vector<at::Tensor> parts;
  parts.reserve(parameters.size());
  for (const size_t i : parameters) {
    at::Tensor part = v.narrow(0, offsets_[i], parameters_[i].numel());
    // Pairs of real numbers become complex ones only where they begin at an even place.
    if (part.numel() % 2 == 0 && part.storage_offset() % 2 != 0) part = part.clone();
    parts.push_back(part.view(parameters_[i].sizes()));
  }
  return parts;
}

at::Tensor FlatParameters::join(std::vector<at::Tensor> parts) const {
  const at::AutoDispatchBelowADInplaceOrView below;  // products are not differentiated again
  for (size_t i = 0; i < parts.size(); ++i) {
    parts[i] = parts[i].defined() ? parts[i].reshape({-1}) : at::zeros({parameters_[i].numel()}, options());
  }
  return at::cat(parts);
}

Recorded::Recorded(const std::vector<std::optional<at::Tensor>>& of_each) {
  for (size_t i = 0; i < of_each.size(); ++i) {
    if (!of_each[i] || !of_each[i]->requires_grad()) continue;
    tensors.push_back(*of_each[i]);
    parameters.push_back(i);
  }
}

GraphOperator::GraphOperator(const std::vector<std::optional<at::Tensor>>& gradients,
                             std::vector<at::Tensor> parameters)
    : ParameterOperator(std::move(parameters)), gradients_(gradients) {}

at::Tensor GraphOperator::apply(const at::Tensor& v) {
  parameters_.check_unchanged();
  if (gradients_.tensors.empty())
    return at::zeros({size()}, options());  // the loss is linear in the parameters
  return parameters_.join(
      pull_back(gradients_.tensors, parameters_.tensors(), parameters_.parts(v, gradients_.parameters)));
}

GaussNewtonOperator::GaussNewtonOperator(const at::Tensor& outputs, const at::Tensor& output_gradient,
                                         const at::Tensor& dummy,
                                         const std::vector<std::optional<at::Tensor>>& pullback,
                                         std::vector<at::Tensor> parameters)
    : ParameterOperator(std::move(parameters)),
      outputs_(outputs),
      output_gradient_(output_gradient),
      dummy_(dummy),
      pullback_(pullback) {}

at::Tensor GaussNewtonOperator::apply(const at::Tensor& v) {
  parameters_.check_unchanged();
  const at::Tensor zero = at::zeros({size()}, options());
  // The loss is linear in the outputs, or these do not depend on the parameters but by steps.
  if (!output_gradient_.requires_grad() || pullback_.tensors.empty()) return zero;
  const at::Tensor forward =
      pull_back(pullback_.tensors, {dummy_}, parameters_.parts(v, pullback_.parameters)).front();  // J v
  if (!forward.defined()) return zero;
  const at::Tensor curved = pull_back({output_gradient_}, {outputs_}, {forward}).front();  // ∇²ℓ J v
  if (!curved.defined()) return zero;
  return parameters_.join(pull_back({outputs_}, parameters_.tensors(), {curved}));
}

}  // namespace dynloss
