// Derivatives of the cross-entropy ops, as kernels at the Autograd key: what torch's generated code does for
// its own ops, and the one route on which reverse, double, forward mode, torch.func and torch.compile all
// hold.
//
//   loss  --backward-->  gradient  --backward-->  Hessian·v  --backward-->  third·u·v
//
// A plain backward returns the gradient that the forward pass has already computed. Wherever a derivative of
// that gradient could be asked for (create_graph, torch.func), it is instead recomputed from the saved logits
// by an op that can be differentiated: a saved buffer would count as a constant, silently.
#include <ATen/MemoryOverlap.h>
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#include "arguments.h"
#include "ops.h"

namespace dynloss {

namespace {

using at::Tensor;
using c10::SymInt;
using ops::OptionalTensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Nodes are held by shared_ptr up to torch 2.11 or so, by intrusive_ptr later.
template <typename T>
auto new_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, T>)
    return c10::make_intrusive<T>();
  else
    return std::shared_ptr<T>(new T(), [](T* node) { deleteNode(node); });
}

// Inside a torch.func transform: there every backward may be differentiated again.
bool in_transform() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

Tensor tangent_of(const Tensor& x) { return x._fw_grad(/*level=*/0); }

// The value without its tangent: what the formula of a tangent is evaluated at.
Tensor primal_of(const Tensor& x) { return tangent_of(x).defined() ? x._fw_primal(/*level=*/0) : x; }

void set_tangent(const Tensor& x, const Tensor& tangent) {
  x._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
}

void accumulate(Tensor& sum, const Tensor& term) { sum = sum.defined() ? sum + term : term; }

// Σ a∘b over what each element of the loss depends on: its row, its ensemble member, or everything.
Tensor inner_product(const Tensor& a, const Tensor& b, const Tensor& like, const Tensor& weights) {
  const bool ensemble = is_ensemble(weights);
  const Tensor product = a * b;
  if (like.dim() == 0) return at::sum(product, like.scalar_type());
  if (ensemble && like.dim() == 1) return at::sum(product, {1, 2}, /*keepdim=*/false, like.scalar_type());
  return at::sum(product, {ensemble ? 2 : 1}, /*keepdim=*/false, like.scalar_type());
}

// What all nodes save. The step is saved as the class weights it resolved to: a later step means another Γ.
// These and the divisors nobody else can write to, so that no version need be checked.
struct ResolvedNode : public Node {
  SavedVariable logits_, target_;
  Tensor weights_, normalizer_;
  SymInt ignore_index_;
  double label_smoothing_ = 0;

  void save(const Tensor& logits, const Tensor& target, const Tensor& weights, const Tensor& normalizer,
            const SymInt& ignore_index, double label_smoothing) {
    logits_ = SavedVariable(logits, false);
    target_ = SavedVariable(target, false);
    weights_ = weights;
    normalizer_ = normalizer;
    ignore_index_ = ignore_index;
    label_smoothing_ = label_smoothing;
  }

  struct Values {
    Tensor logits, target, weights, normalizer;
  };
  Values unpack() { return {logits_.unpack(), target_.unpack(), weights_, normalizer_}; }

  Tensor gradient(const Values& x, const Tensor& grad_output) {
    return ops::cross_entropy_gradient(grad_output, x.logits, x.target, x.weights, x.normalizer,
                                       ignore_index_, label_smoothing_);
  }
  Tensor hessian(const Values& x, const Tensor& v, const Tensor& grad_output) {
    return ops::cross_entropy_hessian(v, grad_output, x.logits, x.target, x.weights, x.normalizer,
                                      ignore_index_, label_smoothing_);
  }
  Tensor third(const Values& x, const Tensor& u, const Tensor& v, const Tensor& grad_output) {
    return ops::cross_entropy_third(u, v, grad_output, x.logits, x.target, x.weights, x.normalizer,
                                    ignore_index_, label_smoothing_);
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    logits_.reset_data();
    target_.reset_data();
    weights_.reset();
    normalizer_.reset();
  }
};

// ---- loss

// grad_output · gradient without in-place writes, for graphs that will be used again or are only being
// traced.
Tensor rescaled(const Tensor& gradient, const Tensor& grad_output, const Tensor& normalizer) {
  const Tensor divisor = normalizer.select(-1, 0), divided_by = normalizer.select(-1, 1);
  // A mean over nothing has divided by 0 and keeps its gradient of 0.
  Tensor factor = grad_output * at::where(divisor == 0, at::ones_like(divisor), divided_by / divisor);
  if (factor.dim() == 1) factor = factor.unsqueeze(-1).unsqueeze(-1);
  // In the type of the arithmetic: a half would round the factor, or hold it as inf.
  const auto arithmetic = gradient.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return (gradient * factor.to(arithmetic)).to(gradient.scalar_type());
}

// On the CPU a look tells whether there is anything to do, for less than the call of an op.
bool needs_no_rescaling(const Tensor& grad_output, const Tensor& normalizer) {
  if (!grad_output.is_cpu() || grad_output.dim() != 0) return false;
  const double* divisors = normalizer.const_data_ptr<double>();
  const bool one = grad_output.scalar_type() == at::kDouble  ? *grad_output.const_data_ptr<double>() == 1.0
                   : grad_output.scalar_type() == at::kFloat ? *grad_output.const_data_ptr<float>() == 1.0f
                                                             : false;
  return one && divisors[0] == divisors[1];
}

struct CrossEntropyBackward : public ResolvedNode {
  std::string name() const override { return "DynamicCrossEntropyBackward"; }

  SavedVariable gradient_;
  bool has_gradient_ = false;

  variable_list apply(variable_list&& grads) override {
    const Tensor& grad_output = grads[0];
    if (!grad_output.defined() || !task_should_compute_output(0)) return {Tensor()};
    std::lock_guard<std::mutex> lock(mutex_);
    const bool constant = !at::GradMode::is_enabled() && !tangent_of(grad_output).defined();
    if (!has_gradient_ || !constant) return {gradient(unpack(), grad_output)};

    Tensor saved = gradient_.unpack();
    const Tensor normalizer = normalizer_;
    const bool keep = torch::autograd::get_current_graph_task_keep_graph();
    if (!keep) gradient_.reset_data();
    // Saved-tensor hooks may have shown the buffer to somebody.
    if (keep || saved.use_count() > 1 || at::areAnyTensorSubclassLike({saved, grad_output}))
      return {rescaled(saved, grad_output, normalizer)};
    // Nobody else will ask for the buffer: hand it over, so that a leaf can keep it as its .grad.
    if (!needs_no_rescaling(grad_output, normalizer)) ops::rescale_(saved, grad_output, normalizer);
    return {std::move(saved)};
  }

  void release_variables() override {
    ResolvedNode::release_variables();
    std::lock_guard<std::mutex> lock(mutex_);
    gradient_.reset_data();
  }
};

// Whether the forward pass computes the gradient along with the loss. Not where it may be differentiated, or
// traced: a compiled backward that does not read the logits would take its result for a constant. And not for
// float16, which cannot hold the gradient of a mean before the loss scale has been applied.
bool computes_gradient(const Tensor& logits, int64_t reduction) {
  return reduction != reduction_none && !in_transform() && !tangent_of(logits).defined() &&
         !at::isTensorSubclassLike(logits) && logits.scalar_type() != at::kHalf;
}

void check_strided(const Tensor& logits) {
  TORCH_CHECK_VALUE(logits.layout() == at::kStrided, "logits: expected a strided (dense) tensor, got ",
                    logits.layout());
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(DYNLOSS_FORWARD_PARAMETERS) {
  check_strided(logits);
  const bool requires_grad = torch::autograd::compute_requires_grad(logits);
  const Tensor tangent = tangent_of(logits);
  Tensor loss, gradient, weights, normalizer;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (requires_grad && computes_gradient(logits, reduction))
      std::tie(loss, gradient, weights, normalizer) =
          ops::cross_entropy_with_gradient(DYNLOSS_FORWARD_ARGUMENTS, /*finished=*/false);
    else
      std::tie(loss, weights, normalizer) = ops::cross_entropy(DYNLOSS_FORWARD_ARGUMENTS);
  }
  if (requires_grad) {
    auto node = new_node<CrossEntropyBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(logits));
    node->save(logits, target, weights, normalizer, ignore_index, label_smoothing);
    node->has_gradient_ = gradient.defined();
    if (gradient.defined()) node->gradient_ = SavedVariable(gradient, false);
    torch::autograd::set_history(loss, node);
  }
  if (tangent.defined()) {
    const Tensor slope = ops::cross_entropy_gradient(at::ones_like(loss.detach()), primal_of(logits), target,
                                                     weights, normalizer, ignore_index, label_smoothing);
    set_tangent(loss, inner_product(slope, tangent, loss, weights));
  }
  return {loss, weights, normalizer};
}

// ---- loss whose gradient takes the place of the logits

struct IntoLogitsBackward : public Node {
  std::string name() const override { return "DynamicCrossEntropyIntoLogitsBackward"; }

  SavedVariable gradient_;
  Tensor normalizer_;

  variable_list apply(variable_list&& grads) override {
    const Tensor& grad_output = grads[0];
    if (!grad_output.defined() || !task_should_compute_output(0)) return {Tensor()};
    TORCH_CHECK(
        !at::GradMode::is_enabled(),
        "inplace_gradient: the logits have been overwritten, so the gradient cannot be differentiated "
        "(create_graph=True); use inplace_gradient=False");
    std::lock_guard<std::mutex> lock(mutex_);
    Tensor gradient = gradient_.unpack();
    const Tensor normalizer = normalizer_;
    if (torch::autograd::get_current_graph_task_keep_graph())
      return {rescaled(gradient, grad_output, normalizer)};
    if (!needs_no_rescaling(grad_output, normalizer)) ops::rescale_(gradient, grad_output, normalizer);
    return {gradient};
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    gradient_.reset_data();
    normalizer_.reset();
  }
};

std::tuple<Tensor, Tensor, Tensor> cross_entropy_into_logits(Tensor& logits, DYNLOSS_AFTER_LOGITS) {
  check_strided(logits);
  const bool requires_grad = torch::autograd::compute_requires_grad(logits);
  TORCH_CHECK(!in_transform() && !tangent_of(logits).defined() && !at::isTensorSubclassLike(logits),
              "inplace_gradient: works in eager mode and first-order reverse mode only, not under "
              "torch.func, forward "
              "mode or torch.compile");
  const Tensor owner = logits.is_view() ? Tensor(logits._base()) : logits;
  TORCH_CHECK(!(owner.is_leaf() && owner.requires_grad()),
              "inplace_gradient: logits is a leaf that requires grad, or a view of one, and would be "
              "overwritten; expected the output of a model");
  at::assert_no_internal_overlap(logits);
  TORCH_CHECK_VALUE(reduction != reduction_none,
                    "inplace_gradient: expected reduction 'mean' or 'sum', got 'none'");
  Tensor overwritten = logits.detach(), loss, weights, normalizer;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(loss, weights, normalizer) =
        ops::cross_entropy_into_logits(overwritten, target, step, step_tensor, clock, class_order, table,
                                       reduction, by_weights, ignore_index, label_smoothing);
  }
  // Whoever saved the logits for a backward of their own must hear of it.
  torch::autograd::impl::bump_version(logits);
  if (requires_grad) {
    auto node = new_node<IntoLogitsBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(logits));
    node->gradient_ = SavedVariable(overwritten, false);
    node->normalizer_ = normalizer;
    torch::autograd::set_history(loss, node);
  }
  return {loss, weights, normalizer};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_with_gradient(DYNLOSS_FORWARD_PARAMETERS,
                                                                       bool finished) {
  check_strided(logits);
  const bool differentiated =
      tangent_of(logits).defined() || (in_transform() && torch::autograd::compute_requires_grad(logits));
  TORCH_CHECK(!differentiated,
              "loss_and_gradient: its results are constants to autograd, and cannot be differentiated by a "
              "torch.func "
              "transform or in forward mode; use dynamic_cross_entropy there");
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::cross_entropy_with_gradient(DYNLOSS_FORWARD_ARGUMENTS, finished);
}

// ---- gradient

struct GradientBackward : public ResolvedNode {
  std::string name() const override { return "DynamicCrossEntropyGradientBackward"; }

  SavedVariable grad_output_;

  variable_list apply(variable_list&& grads) override {
    variable_list result(2);
    const Tensor& u = grads[0];
    if (!u.defined()) return result;
    std::lock_guard<std::mutex> lock(mutex_);
    const Values x = unpack();
    const Tensor grad_output = grad_output_.unpack();
    if (task_should_compute_output(0))
      result[0] = inner_product(u, gradient(x, at::ones_like(grad_output)), grad_output, x.weights);
    if (task_should_compute_output(1)) result[1] = hessian(x, u, grad_output);
    return result;
  }

  void release_variables() override {
    ResolvedNode::release_variables();
    std::lock_guard<std::mutex> lock(mutex_);
    grad_output_.reset_data();
  }
};

Tensor cross_entropy_gradient(DYNLOSS_RESOLVED_PARAMETERS) {
  Tensor result;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result = ops::cross_entropy_gradient(DYNLOSS_RESOLVED_ARGUMENTS);
  }
  if (torch::autograd::compute_requires_grad(grad_output, logits)) {
    auto node = new_node<GradientBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(grad_output, logits));
    node->save(logits, target, weights, normalizer, ignore_index, label_smoothing);
    node->grad_output_ = SavedVariable(grad_output, false);
    torch::autograd::set_history(result, node);
  }
  Tensor tangent;
  if (const Tensor t = tangent_of(grad_output); t.defined())
    accumulate(tangent, ops::cross_entropy_gradient(t, primal_of(logits), target, weights, normalizer,
                                                    ignore_index, label_smoothing));
  if (const Tensor t = tangent_of(logits); t.defined())
    accumulate(tangent, ops::cross_entropy_hessian(t, primal_of(grad_output), primal_of(logits), target,
                                                   weights, normalizer, ignore_index, label_smoothing));
  if (tangent.defined()) set_tangent(result, tangent);
  return result;
}

// ---- Hessian·v

struct HessianBackward : public ResolvedNode {
  std::string name() const override { return "DynamicCrossEntropyHessianBackward"; }

  SavedVariable v_, grad_output_;

  variable_list apply(variable_list&& grads) override {
    variable_list result(3);
    const Tensor& u = grads[0];
    if (!u.defined()) return result;
    std::lock_guard<std::mutex> lock(mutex_);
    const Values x = unpack();
    const Tensor v = v_.unpack(), grad_output = grad_output_.unpack();
    if (task_should_compute_output(0)) result[0] = hessian(x, u, grad_output);
    if (task_should_compute_output(1))
      result[1] = inner_product(u, hessian(x, v, at::ones_like(grad_output)), grad_output, x.weights);
    if (task_should_compute_output(2)) result[2] = third(x, u, v, grad_output);
    return result;
  }

  void release_variables() override {
    ResolvedNode::release_variables();
    std::lock_guard<std::mutex> lock(mutex_);
    v_.reset_data();
    grad_output_.reset_data();
  }
};

Tensor cross_entropy_hessian(const Tensor& v, DYNLOSS_RESOLVED_PARAMETERS) {
  Tensor result;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result = ops::cross_entropy_hessian(v, DYNLOSS_RESOLVED_ARGUMENTS);
  }
  if (torch::autograd::compute_requires_grad(v, grad_output, logits)) {
    auto node = new_node<HessianBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(v, grad_output, logits));
    node->save(logits, target, weights, normalizer, ignore_index, label_smoothing);
    node->v_ = SavedVariable(v, false);
    node->grad_output_ = SavedVariable(grad_output, false);
    torch::autograd::set_history(result, node);
  }
  const Tensor v0 = primal_of(v), grad0 = primal_of(grad_output), z0 = primal_of(logits);
  Tensor tangent;
  if (const Tensor t = tangent_of(v); t.defined())
    accumulate(tangent, ops::cross_entropy_hessian(t, grad0, z0, target, weights, normalizer, ignore_index,
                                                   label_smoothing));
  if (const Tensor t = tangent_of(grad_output); t.defined())
    accumulate(tangent, ops::cross_entropy_hessian(v0, t, z0, target, weights, normalizer, ignore_index,
                                                   label_smoothing));
  if (const Tensor t = tangent_of(logits); t.defined())
    accumulate(tangent, ops::cross_entropy_third(t, v0, grad0, z0, target, weights, normalizer, ignore_index,
                                                 label_smoothing));
  if (tangent.defined()) set_tangent(result, tangent);
  return result;
}

// ---- third·u·v, symmetric in u, v and what it is multiplied with

constexpr const char* no_fourth_derivative =
    "dynamic_cross_entropy: derivatives are implemented up to the third order in the logits; a fourth was "
    "asked for";

struct ThirdBackward : public ResolvedNode {
  std::string name() const override { return "DynamicCrossEntropyThirdBackward"; }

  SavedVariable u_, v_, grad_output_;

  variable_list apply(variable_list&& grads) override {
    variable_list result(4);
    const Tensor& w = grads[0];
    if (!w.defined()) return result;
    TORCH_CHECK_NOT_IMPLEMENTED(!task_should_compute_output(3), no_fourth_derivative);
    std::lock_guard<std::mutex> lock(mutex_);
    const Values x = unpack();
    const Tensor u = u_.unpack(), v = v_.unpack(), grad_output = grad_output_.unpack();
    if (task_should_compute_output(0)) result[0] = third(x, w, v, grad_output);
    if (task_should_compute_output(1)) result[1] = third(x, u, w, grad_output);
    if (task_should_compute_output(2))
      result[2] = inner_product(w, third(x, u, v, at::ones_like(grad_output)), grad_output, x.weights);
    return result;
  }

  void release_variables() override {
    ResolvedNode::release_variables();
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&u_, &v_, &grad_output_}) saved->reset_data();
  }
};

Tensor cross_entropy_third(const Tensor& u, const Tensor& v, DYNLOSS_RESOLVED_PARAMETERS) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tangent_of(logits).defined(), no_fourth_derivative);
  Tensor result;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result = ops::cross_entropy_third(u, v, DYNLOSS_RESOLVED_ARGUMENTS);
  }
  if (torch::autograd::compute_requires_grad(u, v, grad_output, logits)) {
    auto node = new_node<ThirdBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(u, v, grad_output, logits));
    node->save(logits, target, weights, normalizer, ignore_index, label_smoothing);
    node->u_ = SavedVariable(u, false);
    node->v_ = SavedVariable(v, false);
    node->grad_output_ = SavedVariable(grad_output, false);
    torch::autograd::set_history(result, node);
  }
  const Tensor u0 = primal_of(u), v0 = primal_of(v), grad0 = primal_of(grad_output);
  Tensor tangent;
  if (const Tensor t = tangent_of(u); t.defined())
    accumulate(tangent, ops::cross_entropy_third(t, v0, grad0, logits, target, weights, normalizer,
                                                 ignore_index, label_smoothing));
  if (const Tensor t = tangent_of(v); t.defined())
    accumulate(tangent, ops::cross_entropy_third(u0, t, grad0, logits, target, weights, normalizer,
                                                 ignore_index, label_smoothing));
  if (const Tensor t = tangent_of(grad_output); t.defined())
    accumulate(tangent, ops::cross_entropy_third(u0, v0, t, logits, target, weights, normalizer, ignore_index,
                                                 label_smoothing));
  if (tangent.defined()) set_tangent(result, tangent);
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(dynloss, Autograd, library) {
  library.impl("cross_entropy", &cross_entropy);
  library.impl("cross_entropy_with_gradient", &cross_entropy_with_gradient);
  library.impl("cross_entropy_into_logits", &cross_entropy_into_logits);
  library.impl("cross_entropy_gradient", &cross_entropy_gradient);
  library.impl("cross_entropy_hessian", &cross_entropy_hessian);
  library.impl("cross_entropy_third", &cross_entropy_third);
  library.impl("oscillation_weights", torch::autograd::autogradNotImplementedFallback());
  library.impl("rescale_", torch::autograd::autogradNotImplementedFallback());
  library.impl("place", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace dynloss
