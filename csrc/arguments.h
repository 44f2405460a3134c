// What the ops are given. Each list of arguments is written down in this file and nowhere else: as a struct,
// as the dispatcher passes it, and how one becomes the other. Then what every backend asks of them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <optional>

namespace dynloss {

using OptionalTensor = std::optional<at::Tensor>;

enum Reduction : int64_t { reduction_none = 0, reduction_mean = 1, reduction_sum = 2 };

// An ensemble is told by a leading dimension of its clock, or of its weights.
inline bool is_ensemble(const at::Tensor& clock_or_weights) { return clock_or_weights.dim() == 2; }

// ---- what describes Γ

struct ScheduleArguments {
  const at::Tensor& clock;
  const OptionalTensor& step_tensor;
  const OptionalTensor& class_order;
  const OptionalTensor& table;
};

// ---- the forward ops

struct ForwardArguments {
  const at::Tensor& logits;
  const at::Tensor& target;
  const c10::SymInt& step;
  const OptionalTensor& step_tensor;
  const at::Tensor& clock;
  const OptionalTensor& class_order;
  const OptionalTensor& table;
  const OptionalTensor& weight;
  int64_t reduction;
  bool by_weights;
  const c10::SymInt& ignore_index;
  double label_smoothing;

  bool ensemble() const { return is_ensemble(clock); }
  ScheduleArguments schedule() const { return {clock, step_tensor, class_order, table}; }
};

template <typename Result, typename Logits = const at::Tensor&, typename... More>
using ForwardSignature = Result(Logits, const at::Tensor&, c10::SymInt, const OptionalTensor&,
                                const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                                const OptionalTensor&, int64_t, bool, c10::SymInt, double, More...);

// A function of ForwardArguments, and perhaps more, as a kernel of the dispatcher.
template <auto function, typename Logits = const at::Tensor&, typename... More>
auto forward_kernel(Logits logits, const at::Tensor& target, c10::SymInt step,
                    const OptionalTensor& step_tensor, const at::Tensor& clock,
                    const OptionalTensor& class_order, const OptionalTensor& table,
                    const OptionalTensor& weight, int64_t reduction, bool by_weights,
                    c10::SymInt ignore_index, double label_smoothing, More... more) {
  return function(ForwardArguments{logits, target, step, step_tensor, clock, class_order, table, weight,
                                   reduction, by_weights, ignore_index, label_smoothing},
                  more...);
}

template <typename Op, typename Logits, typename... More>
auto call_forward(const Op& op, Logits& logits, const ForwardArguments& x, More... more) {
  return op.call(logits, x.target, x.step, x.step_tensor, x.clock, x.class_order, x.table, x.weight,
                 x.reduction, x.by_weights, x.ignore_index, x.label_smoothing, more...);
}

// ---- the derivative op

// Of Σ grad_output · loss in the logits: the gradient; along one direction (v) Hessian·v; along two (u, v)
// third·u·v.
struct DerivativeArguments {
  at::TensorList directions;
  const at::Tensor& grad_output;
  const at::Tensor& logits;
  const at::Tensor& target;
  const at::Tensor& weights;
  const at::Tensor& normalizer;
  const c10::SymInt& ignore_index;
  double label_smoothing;

  bool ensemble() const { return is_ensemble(weights); }
};

using DerivativeSignature = at::Tensor(const OptionalTensor&, const OptionalTensor&, const at::Tensor&,
                                       const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                       const at::Tensor&, c10::SymInt, double);

// The dispatcher passes the directions as u and v: autograd's is_grads_batched knows no lists.
template <at::Tensor (*function)(const DerivativeArguments&)>
at::Tensor derivative_kernel(const OptionalTensor& u, const OptionalTensor& v, const at::Tensor& grad_output,
                             const at::Tensor& logits, const at::Tensor& target, const at::Tensor& weights,
                             const at::Tensor& normalizer, c10::SymInt ignore_index, double label_smoothing) {
  TORCH_CHECK_VALUE(v || !u, "v: expected a tensor where u is one, got None");
  c10::SmallVector<at::Tensor, 2> directions;
  if (u) directions.push_back(*u);
  if (v) directions.push_back(*v);
  return function(
      {directions, grad_output, logits, target, weights, normalizer, ignore_index, label_smoothing});
}

template <typename Op>
at::Tensor call_derivative(const Op& op, const DerivativeArguments& x) {
  const size_t count = x.directions.size();
  const OptionalTensor v = count > 0 ? OptionalTensor(x.directions[count - 1]) : std::nullopt;
  const OptionalTensor u = count > 1 ? OptionalTensor(x.directions[0]) : std::nullopt;
  return op.call(u, v, x.grad_output, x.logits, x.target, x.weights, x.normalizer, x.ignore_index,
                 x.label_smoothing);
}

// ---- shapes and dtypes that follow from them

// Which dimension of logits holds the classes.
inline int64_t class_dim(int64_t logits_dim, bool ensemble) { return ensemble ? 2 : logits_dim == 1 ? 0 : 1; }

// Where logits has the dimension for it (checked).
c10::SymInt num_classes(const at::Tensor& logits, bool ensemble);

// () or (E,).
c10::SymDimVector reduced_sizes(const at::Tensor& clock_or_weights);

// The shape of an unreduced loss: target's, or (E, N).
c10::SymDimVector sample_sizes(const at::Tensor& logits, const at::Tensor& target, bool ensemble);

// float32 at least for reduced losses of half types; unreduced losses keep the type of the logits.
at::ScalarType loss_dtype(const at::Tensor& logits, int64_t reduction);

// ---- checks: ValueError or TypeError, naming the argument, what was given and what is expected

void check_forward(const ForwardArguments& x);
void check_derivative(const DerivativeArguments& x);
void check_schedule(const ScheduleArguments& schedule, const c10::SymInt& classes, const at::Device& device);
void check_weights_arguments(const at::Tensor& steps, const ScheduleArguments& schedule,
                             const c10::SymInt& classes);
// On CPU, int64 and contiguous; raises IndexError.
void check_labels(const at::Tensor& labels, int64_t classes, int64_t ignore_index);

}  // namespace dynloss
