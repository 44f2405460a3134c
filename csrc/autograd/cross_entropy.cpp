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
#include <vector>

#include "arguments.h"
#include "ops.h"

namespace dynloss {

namespace {

using at::Tensor;
using c10::SymInt;
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

  Tensor derivative(const Values& x, at::TensorList directions, const Tensor& grad_output) {
    return ops::cross_entropy_derivative({directions, grad_output, x.logits, x.target, x.weights,
                                          x.normalizer, ignore_index_, label_smoothing_});
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
    if (!has_gradient_ || !constant) return {derivative(unpack(), {}, grad_output)};

    Tensor saved = gradient_.unpack();
    const Tensor normalizer = normalizer_;
    const bool keep = torch::autograd::get_current_graph_task_keep_graph();
    if (!keep) gradient_.reset_data();
    // Saved-tensor hooks may have shown the buffer to somebody, and may make one anew of memory that they
    // keep.
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

// As in torch, the weights of classes are no function of anything.
void check_constant(const OptionalTensor& weight) {
  TORCH_CHECK_VALUE(
      !weight || !(torch::autograd::compute_requires_grad(*weight) || tangent_of(*weight).defined()),
      "weight: expected a constant, got a tensor that requires grad or has a tangent; the loss is not "
      "differentiable in it");
}

ops::Loss cross_entropy(const ForwardArguments& x) {
  check_strided(x.logits);
  check_constant(x.weight);
  const bool requires_grad = torch::autograd::compute_requires_grad(x.logits);
  const Tensor tangent = tangent_of(x.logits);
  Tensor loss, gradient, weights, normalizer;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (requires_grad && computes_gradient(x.logits, x.reduction))
      std::tie(loss, gradient, weights, normalizer) = ops::cross_entropy_with_gradient(x, /*finished=*/false);
    else
      std::tie(loss, weights, normalizer) = ops::cross_entropy(x);
  }
  if (requires_grad) {
    auto node = new_node<CrossEntropyBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(x.logits));
    node->save(x.logits, x.target, weights, normalizer, x.ignore_index, x.label_smoothing);
    node->has_gradient_ = gradient.defined();
    if (gradient.defined()) node->gradient_ = SavedVariable(gradient, false);
    torch::autograd::set_history(loss, node);
  }
  if (tangent.defined()) {
    const Tensor slope = ops::cross_entropy_derivative({{},
                                                        at::ones_like(loss.detach()),
                                                        primal_of(x.logits),
                                                        x.target,
                                                        weights,
                                                        normalizer,
                                                        x.ignore_index,
                                                        x.label_smoothing});
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
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "inplace_gradient: expected False where the gradient is differentiated again "
                "(create_graph=True), got True: the logits have been overwritten");
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

ops::Loss cross_entropy_into_logits(const ForwardArguments& x) {
  const Tensor& logits = x.logits;
  check_strided(logits);
  check_constant(x.weight);
  const bool requires_grad = torch::autograd::compute_requires_grad(logits);
  TORCH_CHECK(
      !in_transform() && !tangent_of(logits).defined() && !at::isTensorSubclassLike(logits),
      "inplace_gradient: expected False under torch.func, in forward mode and under torch.compile, got "
      "True");
  const Tensor owner = logits.is_view() ? Tensor(logits._base()) : logits;
  TORCH_CHECK(
      !(owner.is_leaf() && owner.requires_grad()),
      "inplace_gradient: expected the output of a model to overwrite, got logits that are a leaf that "
      "requires grad, or a view of one");
  at::assert_no_internal_overlap(logits);
  TORCH_CHECK_VALUE(x.reduction != reduction_none,
                    "inplace_gradient: expected reduction 'mean' or 'sum', got 'none'");
  Tensor overwritten = logits.detach(), loss, weights, normalizer;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(loss, weights, normalizer) = ops::cross_entropy_into_logits(overwritten, x);
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

ops::LossAndGradient cross_entropy_with_gradient(const ForwardArguments& x, bool finished) {
  check_strided(x.logits);
  check_constant(x.weight);
  const bool differentiated =
      tangent_of(x.logits).defined() || (in_transform() && torch::autograd::compute_requires_grad(x.logits));
  TORCH_CHECK(
      !differentiated,
      "loss_and_gradient: expected no transform of torch.func and no forward mode that differentiate its "
      "results, which are constants, got one: use dynamic_cross_entropy there");
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::cross_entropy_with_gradient(x, finished);
}

// ---- the derivatives: of order 1 + the number of directions, symmetric in these and in what it is
// multiplied with

constexpr const char* no_fourth_derivative =
    "dynamic_cross_entropy: derivatives are implemented up to the third order in the logits; a fourth was "
    "asked for";

// Along one direction more. It comes first.
std::vector<Tensor> with_direction(const Tensor& first, const std::vector<Tensor>& directions) {
  TORCH_CHECK_NOT_IMPLEMENTED(directions.size() < 2, no_fourth_derivative);
  std::vector<Tensor> result = {first};
  result.insert(result.end(), directions.begin(), directions.end());
  return result;
}

std::vector<Tensor> replaced(std::vector<Tensor> directions, size_t i, const Tensor& by) {
  directions[i] = by;
  return directions;
}

// Its inputs, in order: the directions, grad_output, logits.
struct DerivativeBackward : public ResolvedNode {
  std::string name() const override { return "DynamicCrossEntropyDerivativeBackward"; }

  std::vector<SavedVariable> directions_;
  SavedVariable grad_output_;

  variable_list apply(variable_list&& grads) override {
    const size_t count = directions_.size();
    variable_list result(count + 2);
    const Tensor& w = grads[0];
    if (!w.defined()) return result;
    std::lock_guard<std::mutex> lock(mutex_);
    const Values x = unpack();
    const Tensor grad_output = grad_output_.unpack();
    std::vector<Tensor> directions;
    for (const SavedVariable& saved : directions_) directions.push_back(saved.unpack());
    for (size_t i = 0; i < count; ++i)
      if (task_should_compute_output(i)) result[i] = derivative(x, replaced(directions, i, w), grad_output);
    if (task_should_compute_output(count))
      result[count] =
          inner_product(w, derivative(x, directions, at::ones_like(grad_output)), grad_output, x.weights);
    if (task_should_compute_output(count + 1))
      result[count + 1] = derivative(x, with_direction(w, directions), grad_output);
    return result;
  }

  void release_variables() override {
    ResolvedNode::release_variables();
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& saved : directions_) saved.reset_data();
    grad_output_.reset_data();
  }
};

// By the same rules as in the backward pass, each input's tangent in its place.
Tensor derivative_tangent(const DerivativeArguments& x) {
  std::vector<Tensor> directions;
  for (const Tensor& direction : x.directions) directions.push_back(primal_of(direction));
  const Tensor grad_output = primal_of(x.grad_output), logits = primal_of(x.logits);
  Tensor sum;
  const auto add = [&](at::TensorList along, const Tensor& scale) {
    accumulate(sum, ops::cross_entropy_derivative({along, scale, logits, x.target, x.weights, x.normalizer,
                                                   x.ignore_index, x.label_smoothing}));
  };
  for (size_t i = 0; i < directions.size(); ++i)
    if (const Tensor t = tangent_of(x.directions[i]); t.defined())
      add(replaced(directions, i, t), grad_output);
  if (const Tensor t = tangent_of(x.grad_output); t.defined()) add(directions, t);
  if (const Tensor t = tangent_of(x.logits); t.defined()) add(with_direction(t, directions), grad_output);
  return sum;
}

Tensor cross_entropy_derivative(const DerivativeArguments& x) {
  Tensor result;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result = ops::cross_entropy_derivative(x);
  }
  if (torch::autograd::compute_requires_grad(x.directions, x.grad_output, x.logits)) {
    auto node = new_node<DerivativeBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(x.directions, x.grad_output, x.logits));
    node->save(x.logits, x.target, x.weights, x.normalizer, x.ignore_index, x.label_smoothing);
    for (const Tensor& direction : x.directions) node->directions_.emplace_back(direction, false);
    node->grad_output_ = SavedVariable(x.grad_output, false);
    torch::autograd::set_history(result, node);
  }
  if (const Tensor tangent = derivative_tangent(x); tangent.defined()) set_tangent(result, tangent);
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(dynloss, Autograd, library) {
  library.impl("cross_entropy", &forward_kernel<&cross_entropy>);
  library.impl("cross_entropy_with_gradient",
               &forward_kernel<&cross_entropy_with_gradient, const Tensor&, bool>);
  library.impl("cross_entropy_into_logits", &forward_kernel<&cross_entropy_into_logits, Tensor&>);
  library.impl("cross_entropy_derivative", &derivative_kernel<&cross_entropy_derivative>);
  library.impl("oscillation_weights", torch::autograd::autogradNotImplementedFallback());
  library.impl("rescale_", torch::autograd::autogradNotImplementedFallback());
  library.impl("place", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace dynloss
