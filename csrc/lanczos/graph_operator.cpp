#include "graph_operator.h"

#include <ATen/ops/zeros.h>
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

GraphOperator::GraphOperator(std::vector<at::Tensor> gradients, std::vector<at::Tensor> parameters)
    : parameters_(std::move(parameters)) {
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (gradients[i].defined() && gradients[i].requires_grad()) {
      outputs_.push_back(gradients[i]);
      output_parameters_.push_back(i);
    }
  }
}

at::Tensor GraphOperator::apply(const at::Tensor& v) {
  parameters_.check_unchanged();
  if (outputs_.empty()) return at::zeros({size()}, options());  // the loss is linear in the parameters
  return parameters_.join(
      pull_back(outputs_, parameters_.tensors(), parameters_.parts(v, output_parameters_)));
}

GaussNewtonOperator::GaussNewtonOperator(at::Tensor outputs, at::Tensor output_gradient, at::Tensor dummy,
                                         std::vector<at::Tensor> pullback, std::vector<at::Tensor> parameters)
    : parameters_(std::move(parameters)),
      outputs_(std::move(outputs)),
      output_gradient_(std::move(output_gradient)),
      dummy_(std::move(dummy)) {
  for (size_t i = 0; i < pullback.size(); ++i) {
    if (pullback[i].defined() && pullback[i].requires_grad()) {
      pullback_.push_back(pullback[i]);
      pullback_parameters_.push_back(i);
    }
  }
}

at::Tensor GaussNewtonOperator::apply(const at::Tensor& v) {
  parameters_.check_unchanged();
  const at::Tensor zero = at::zeros({size()}, options());
  // The loss is linear in the outputs, or these do not depend on the parameters but by steps.
  if (!output_gradient_.requires_grad() || pullback_.empty()) return zero;
  const at::Tensor forward =
      pull_back(pullback_, {dummy_}, parameters_.parts(v, pullback_parameters_)).front();  // J v
  if (!forward.defined()) return zero;
  const at::Tensor curved = pull_back({output_gradient_}, {outputs_}, {forward}).front();  // ∇²ℓ J v
  if (!curved.defined()) return zero;
  return parameters_.join(pull_back({outputs_}, parameters_.tensors(), {curved}));
}

}  // namespace dynloss
