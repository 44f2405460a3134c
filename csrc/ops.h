// Calls of the library's own ops through the dispatcher, as the autograd and autocast kernels make them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>

namespace dynloss::ops {

using at::Tensor;
using c10::SymInt;
using OptionalTensor = std::optional<Tensor>;

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

#define DYNLOSS_AFTER_LOGITS                                                                              \
  const Tensor &target, SymInt step, const OptionalTensor &step_tensor, const Tensor &clock,              \
      const OptionalTensor &class_order, const OptionalTensor &table, int64_t reduction, bool by_weights, \
      SymInt ignore_index, double label_smoothing
#define DYNLOSS_FORWARD_PARAMETERS const Tensor &logits, DYNLOSS_AFTER_LOGITS
#define DYNLOSS_FORWARD_ARGUMENTS                                                                    \
  logits, target, step, step_tensor, clock, class_order, table, reduction, by_weights, ignore_index, \
      label_smoothing

#define DYNLOSS_RESOLVED_PARAMETERS                                                             \
  const Tensor &grad_output, const Tensor &logits, const Tensor &target, const Tensor &weights, \
      const Tensor &normalizer, SymInt ignore_index, double label_smoothing
#define DYNLOSS_RESOLVED_ARGUMENTS \
  grad_output, logits, target, weights, normalizer, ignore_index, label_smoothing

inline std::tuple<Tensor, Tensor, Tensor> cross_entropy(DYNLOSS_FORWARD_PARAMETERS) {
  static const auto op =
      find<std::tuple<Tensor, Tensor, Tensor>(DYNLOSS_FORWARD_PARAMETERS)>("dynloss::cross_entropy");
  return op.call(DYNLOSS_FORWARD_ARGUMENTS);
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_with_gradient(DYNLOSS_FORWARD_PARAMETERS,
                                                                              bool finished) {
  static const auto op = find<std::tuple<Tensor, Tensor, Tensor, Tensor>(DYNLOSS_FORWARD_PARAMETERS, bool)>(
      "dynloss::cross_entropy_with_gradient");
  return op.call(DYNLOSS_FORWARD_ARGUMENTS, finished);
}

inline std::tuple<Tensor, Tensor, Tensor> cross_entropy_into_logits(Tensor& logits, DYNLOSS_AFTER_LOGITS) {
  static const auto op = find<std::tuple<Tensor, Tensor, Tensor>(Tensor&, DYNLOSS_AFTER_LOGITS)>(
      "dynloss::cross_entropy_into_logits");
  return op.call(DYNLOSS_FORWARD_ARGUMENTS);
}

inline void rescale_(Tensor& gradient, const Tensor& grad_output, const Tensor& normalizer) {
  static const auto op = find<void(Tensor&, const Tensor&, const Tensor&)>("dynloss::rescale_");
  op.call(gradient, grad_output, normalizer);
}

inline Tensor cross_entropy_gradient(DYNLOSS_RESOLVED_PARAMETERS) {
  static const auto op = find<Tensor(DYNLOSS_RESOLVED_PARAMETERS)>("dynloss::cross_entropy_gradient");
  return op.call(DYNLOSS_RESOLVED_ARGUMENTS);
}

inline Tensor cross_entropy_hessian(const Tensor& v, DYNLOSS_RESOLVED_PARAMETERS) {
  static const auto op =
      find<Tensor(const Tensor&, DYNLOSS_RESOLVED_PARAMETERS)>("dynloss::cross_entropy_hessian");
  return op.call(v, DYNLOSS_RESOLVED_ARGUMENTS);
}

inline Tensor cross_entropy_third(const Tensor& u, const Tensor& v, DYNLOSS_RESOLVED_PARAMETERS) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, DYNLOSS_RESOLVED_PARAMETERS)>("dynloss::cross_entropy_third");
  return op.call(u, v, DYNLOSS_RESOLVED_ARGUMENTS);
}

}  // namespace dynloss::ops
