// Shapes and dtypes without data: what FakeTensor, torch.compile and torch.export run.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>
#include <utility>

#include "arguments.h"

namespace dynloss {

namespace {

using Optional = std::optional<at::Tensor>;

at::Tensor empty_on(const at::Tensor& like, c10::SymIntArrayRef sizes, at::ScalarType dtype) {
  return at::empty_symint(sizes, like.options().dtype(dtype));
}

c10::SymDimVector appended(c10::SymDimVector sizes, const c10::SymInt& last) {
  sizes.push_back(last);
  return sizes;
}

at::Tensor oscillation_weights(const at::Tensor& steps, const at::Tensor& clock, const Optional&,
                               const Optional&, c10::SymInt classes) {
  c10::SymDimVector sizes(steps.sym_sizes());
  if (is_ensemble(clock)) sizes.push_back(clock.sym_size(0));
  return empty_on(steps, appended(sizes, classes), at::kDouble);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy(
    const at::Tensor& logits, const at::Tensor& target, c10::SymInt, const Optional& step_tensor,
    const at::Tensor& clock, const Optional& class_order, const Optional& table, int64_t reduction, bool,
    c10::SymInt, double label_smoothing) {
  const bool ensemble = is_ensemble(clock);
  check_options(reduction, label_smoothing);
  check_logits_and_target(logits, target, ensemble ? clock.sym_size(0) : c10::SymInt(1), ensemble);
  const c10::SymInt classes = num_classes(logits, ensemble);
  check_schedule({clock, step_tensor, class_order, table}, classes, logits.device());
  const auto reduced = reduced_sizes(clock);
  const auto loss_sizes = reduction == reduction_none ? sample_sizes(logits, target, ensemble) : reduced;
  return {empty_on(logits, loss_sizes, loss_dtype(logits, reduction)),
          empty_on(logits, appended(reduced, classes), at::kDouble),
          empty_on(logits, appended(reduced, 2), at::kDouble)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_into_logits(
    at::Tensor& logits, const at::Tensor& target, c10::SymInt step, const Optional& step_tensor,
    const at::Tensor& clock, const Optional& class_order, const Optional& table, int64_t reduction,
    bool by_weights, c10::SymInt ignore_index, double label_smoothing) {
  return cross_entropy(logits, target, std::move(step), step_tensor, clock, class_order, table, reduction,
                       by_weights, std::move(ignore_index), label_smoothing);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> cross_entropy_with_gradient(
    const at::Tensor& logits, const at::Tensor& target, c10::SymInt step, const Optional& step_tensor,
    const at::Tensor& clock, const Optional& class_order, const Optional& table, int64_t reduction,
    bool by_weights, c10::SymInt ignore_index, double label_smoothing, bool) {
  auto [loss, weights, normalizer] =
      cross_entropy(logits, target, step, step_tensor, clock, class_order, table, reduction, by_weights,
                    ignore_index, label_smoothing);
  return {loss, at::empty_like(logits), weights, normalizer};
}

void rescale_(at::Tensor&, const at::Tensor&, const at::Tensor&) {}

at::Tensor cross_entropy_gradient(const at::Tensor& grad_output, const at::Tensor& logits,
                                  const at::Tensor& target, const at::Tensor& weights,
                                  const at::Tensor& normalizer, c10::SymInt, double) {
  check_derivative(grad_output, logits, target, weights, normalizer);
  return at::empty_like(logits);
}

at::Tensor cross_entropy_hessian(const at::Tensor& v, const at::Tensor& grad_output, const at::Tensor& logits,
                                 const at::Tensor& target, const at::Tensor& weights,
                                 const at::Tensor& normalizer, c10::SymInt, double) {
  check_derivative(grad_output, logits, target, weights, normalizer);
  check_direction("v", v, logits);
  return at::empty_like(logits);
}

at::Tensor cross_entropy_third(const at::Tensor& u, const at::Tensor& v, const at::Tensor& grad_output,
                               const at::Tensor& logits, const at::Tensor& target, const at::Tensor& weights,
                               const at::Tensor& normalizer, c10::SymInt, double) {
  check_derivative(grad_output, logits, target, weights, normalizer);
  check_direction("u", u, logits);
  check_direction("v", v, logits);
  return at::empty_like(logits);
}

}  // namespace

TORCH_LIBRARY_IMPL(dynloss, Meta, library) {
  library.impl("oscillation_weights", &oscillation_weights);
  library.impl("cross_entropy", &cross_entropy);
  library.impl("cross_entropy_into_logits", &cross_entropy_into_logits);
  library.impl("cross_entropy_with_gradient", &cross_entropy_with_gradient);
  library.impl("rescale_", &rescale_);
  library.impl("cross_entropy_gradient", &cross_entropy_gradient);
  library.impl("cross_entropy_hessian", &cross_entropy_hessian);
  library.impl("cross_entropy_third", &cross_entropy_third);
}

}  // namespace dynloss
