// The perceptron ops without data: shapes are concrete, as the number of classes follows from them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "perceptron_arguments.h"

namespace dynloss {

namespace {

std::tuple<at::Tensor, at::Tensor> perceptron_gradient(const PerceptronArguments& x) {
  check_perceptron(x);
  return {at::empty({x.members()}, x.parameters.options().dtype(at::kDouble)), at::empty_like(x.parameters)};
}

at::Tensor perceptron_hvp(const PerceptronArguments& x, const at::Tensor& v) {
  check_perceptron(x);
  check_perceptron_direction(x, v);
  return at::empty_like(x.parameters);
}

at::Tensor perceptron_train_(const PerceptronArguments& x, const DescentArguments& descent) {
  check_perceptron(x);
  check_descent(x, descent);
  const RecordedSteps recorded(x.step, descent.num_steps, descent.record_every);
  return at::empty({recorded.count, x.members(), 3}, x.parameters.options().dtype(at::kDouble));
}

}  // namespace

TORCH_LIBRARY_IMPL(dynloss, Meta, library) {
  library.impl("perceptron_gradient", &perceptron_kernel<&perceptron_gradient>);
  library.impl("perceptron_hvp", &perceptron_kernel<&perceptron_hvp, const at::Tensor&, const at::Tensor&>);
  library.impl("perceptron_train_", &descent_kernel<&perceptron_train_>);
}

}  // namespace dynloss
