#include "graph_operator.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>

#include <algorithm>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>

#include "fingerprint.h"
#include "row_algebra.h"

namespace dynloss {
namespace {

using torch::autograd::Node;
using torch::autograd::variable_list;

// A backward pass through a graph that is kept.
std::vector<at::Tensor> pull_back(const std::vector<at::Tensor>& outputs,
                                  const std::vector<at::Tensor>& inputs,
                                  const std::vector<at::Tensor>& seeds) {
  return torch::autograd::grad(outputs, inputs, seeds, /*retain_graph=*/true, /*create_graph=*/false,
                               /*allow_unused=*/true);
}

constexpr const char* kChanged =
    ": expected the values that this operator recorded, got others: a tensor was changed in place, so that "
    "products would mix two states: compute the loss again and build a new operator";

// What leaves a node of a graph, each number times 1 + ε or 1 - ε: Monte Carlo arithmetic (Parker 1997).
class RandomRoundingHook final : public torch::autograd::FunctionPostHook {
 public:
  RandomRoundingHook(bool cancels, const at::Generator& generator)
      : cancels_(cancels), generator_(generator) {}

  variable_list operator()(const variable_list& outputs, const variable_list& inputs) override {
    variable_list rounded = outputs;
    for (at::Tensor& x : rounded) {
      if (!x.defined() || !x.is_floating_point() || x.layout() != at::kStrided) continue;
      at::Tensor size = x.abs();
      for (const at::Tensor& input : inputs) {
        if (cancels_ && input.defined() && input.sizes() == x.sizes())
          size = size.maximum(input.abs().to(size));
      }
      const at::Tensor signs = at::randint(2, x.sizes(), generator_, at::kChar).mul_(2).sub_(1);
      x = x.addcmul(size, signs.to(x.options()), rounding_of(x.options()));
    }
    return rounded;
  }

 private:
  bool cancels_;
  at::Generator generator_;
};

// As long as it lives, and no longer than the roots, the nodes of their graphs round at random.
class RandomRounding {
 public:
  explicit RandomRounding(const std::vector<at::Tensor>& roots) {
    const at::Generator generator = at::detail::createCPUGenerator(0);
    std::vector<Node*> waiting;
    for (const at::Tensor& root : roots) waiting.push_back(root.grad_fn().get());
    std::unordered_set<Node*> seen;
    while (!waiting.empty()) {
      Node* node = waiting.back();
      waiting.pop_back();
      if (node == nullptr || !seen.insert(node).second) continue;
      // u_i - p_i Σ u_j, where nothing may be left of u_i.
      const bool cancels = node->name().find("SoftmaxBackward0") != std::string::npos;
      const auto key = node->add_post_hook(std::make_unique<RandomRoundingHook>(cancels, generator));
      hooks_.emplace_back(node, key);
      for (const auto& edge : node->next_edges()) waiting.push_back(edge.function.get());
    }
  }
  ~RandomRounding() {
    for (const auto& [node, key] : hooks_) node->del_post_hook(key);
  }
  RandomRounding(const RandomRounding&) = delete;

 private:
  std::vector<std::pair<Node*, uintptr_t>> hooks_;
};

}  // namespace

FlatParameters::FlatParameters(std::vector<at::Tensor> parameters, std::vector<std::string> labels)
    : parameters_(std::move(parameters)), labels_(std::move(labels)) {
  TORCH_CHECK_VALUE(!parameters_.empty(), "params: expected at least one, got none");
  for (const at::Tensor& parameter : parameters_) {
    snapshots_.push_back({static_cast<uint32_t>(parameter._version()), parameter.const_data_ptr(),
                          parameter.sizes().vec(), parameter.strides().vec()});
    offsets_.push_back(size_);
    size_ += parameter.numel();
  }
  values_ = fingerprints(parameters_);
}

void FlatParameters::check_unchanged() const {
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const at::Tensor& now = parameters_[i];
    const Snapshot& then = snapshots_[i];
    const bool same = static_cast<uint32_t>(now._version()) == then.version &&
                      now.const_data_ptr() == then.data && now.sizes() == then.sizes &&
                      now.strides() == then.strides;
    TORCH_CHECK(same, labels_[i], kChanged);
  }
}

void FlatParameters::check_values() const {
  check_unchanged();
  const at::Tensor now = fingerprints(parameters_);
  if (at::equal(now, values_)) return;
  const at::Tensor changed = now.ne(values_).cpu();
  const auto* begin = changed.const_data_ptr<bool>();
  const auto first = std::find(begin, begin + changed.numel(), true) - begin;
  TORCH_CHECK(false, labels_[first], kChanged);
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

at::Tensor ParameterOperator::apply_noisily(const at::Tensor& v) {
  const RandomRounding rounding(roots());
  return apply(v);
}

GraphOperator::GraphOperator(const std::vector<std::optional<at::Tensor>>& gradients,
                             FlatParameters parameters)
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
                                         FlatParameters parameters)
    : ParameterOperator(std::move(parameters)),
      outputs_(outputs),
      output_gradient_(output_gradient),
      dummy_(dummy),
      pullback_(pullback) {}

std::vector<at::Tensor> GaussNewtonOperator::roots() const {
  std::vector<at::Tensor> roots = pullback_.tensors;
  roots.insert(roots.end(), {outputs_, output_gradient_});
  return roots;
}

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
