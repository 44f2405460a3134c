// Calls of the library's own ops through the dispatcher, as the autograd kernels make them.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <tuple>

#include "arguments.h"

namespace dynloss::ops {

using at::Tensor;

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using Loss = std::tuple<Tensor, Tensor, Tensor>;  // loss, weights, normalizer
using LossAndGradient = std::tuple<Tensor, Tensor, Tensor, Tensor>;

inline Loss cross_entropy(const ForwardArguments& x) {
  static const auto op = find<ForwardSignature<Loss>>("dynloss::cross_entropy");
  return call_forward(op, x.logits, x);
}

inline LossAndGradient cross_entropy_with_gradient(const ForwardArguments& x, bool finished) {
  static const auto op =
      find<ForwardSignature<LossAndGradient, const Tensor&, bool>>("dynloss::cross_entropy_with_gradient");
  return call_forward(op, x.logits, x, finished);
}

inline Loss cross_entropy_into_logits(Tensor& logits, const ForwardArguments& x) {
  static const auto op = find<ForwardSignature<Loss, Tensor&>>("dynloss::cross_entropy_into_logits");
  return call_forward(op, logits, x);
}

inline void rescale_(Tensor& gradient, const Tensor& grad_output, const Tensor& normalizer) {
  static const auto op = find<void(Tensor&, const Tensor&, const Tensor&)>("dynloss::rescale_");
  op.call(gradient, grad_output, normalizer);
}

inline Tensor cross_entropy_derivative(const DerivativeArguments& x) {
  static const auto op = find<DerivativeSignature>("dynloss::cross_entropy_derivative");
  return call_derivative(op, x);
}

}  // namespace dynloss::ops
