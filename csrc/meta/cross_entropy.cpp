// Shapes and dtypes without data: what FakeTensor, torch.compile and torch.export run.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "arguments.h"
#include "ops.h"

namespace dynloss {

namespace {

at::Tensor empty_on(const at::Tensor& like, c10::SymIntArrayRef sizes, at::ScalarType dtype) {
  return at::empty_symint(sizes, like.options().dtype(dtype));
}

c10::SymDimVector appended(c10::SymDimVector sizes, const c10::SymInt& last) {
  sizes.push_back(last);
  return sizes;
}

at::Tensor oscillation_weights(const at::Tensor& steps, const at::Tensor& clock, const OptionalTensor&,
                               const OptionalTensor&, c10::SymInt classes) {
  c10::SymDimVector sizes(steps.sym_sizes());
  if (is_ensemble(clock)) sizes.push_back(clock.sym_size(0));
  return empty_on(steps, appended(sizes, classes), at::kDouble);
}

ops::Loss cross_entropy(const ForwardArguments& x) {
  check_forward(x);
  const auto reduced = reduced_sizes(x.clock);
  const auto loss_sizes =
      x.reduction == reduction_none ? sample_sizes(x.logits, x.target, x.ensemble()) : reduced;
  return {empty_on(x.logits, loss_sizes, loss_dtype(x.logits, x.reduction)),
          empty_on(x.logits, appended(reduced, num_classes(x.logits, x.ensemble())), at::kDouble),
          empty_on(x.logits, appended(reduced, 2), at::kDouble)};
}

ops::LossAndGradient cross_entropy_with_gradient(const ForwardArguments& x, bool) {
  auto [loss, weights, normalizer] = cross_entropy(x);
  return {loss, at::empty_like(x.logits), weights, normalizer};
}

void rescale_(at::Tensor&, const at::Tensor&, const at::Tensor&) {}

at::Tensor cross_entropy_derivative(const DerivativeArguments& x) {
  check_derivative(x);
  return at::empty_like(x.logits);
}

}  // namespace

TORCH_LIBRARY_IMPL(dynloss, Meta, library) {
  library.impl("oscillation_weights", &oscillation_weights);
  library.impl("cross_entropy", &forward_kernel<&cross_entropy>);
  library.impl("cross_entropy_into_logits", &forward_kernel<&cross_entropy, at::Tensor&>);
  library.impl("cross_entropy_with_gradient",
               &forward_kernel<&cross_entropy_with_gradient, const at::Tensor&, bool>);
  library.impl("rescale_", &rescale_);
  library.impl("cross_entropy_derivative", &derivative_kernel<&cross_entropy_derivative>);
}

}  // namespace dynloss
