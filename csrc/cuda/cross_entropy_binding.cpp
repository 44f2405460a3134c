// The cross-entropy ops on CUDA: arguments are checked, tensors become pointers and strides, and the kernels
// are launched on the current stream. Nothing waits for the device, unless DYNLOSS_CHECK=1 asks for targets
// to be checked.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdlib>
#include <optional>
#include <string_view>
#include <vector>

#include "arguments.h"
#include "cuda/arrival_counters.h"
#include "cuda/cross_entropy.h"
#include "cuda/operands.h"
#include "layout.h"
#include "ops.h"

namespace dynloss::cuda {

namespace {

// ---- the ops

void check_targets_if_asked(const at::Tensor& target, int64_t classes, int64_t ignore_index) {
  static const bool asked = [] {
    const char* value = std::getenv("DYNLOSS_CHECK");
    return value != nullptr && std::string_view(value) == "1";
  }();
  if (asked) check_labels(target.to(at::kCPU, at::kLong), classes, ignore_index);
}

at::Tensor oscillation_weights(const at::Tensor& steps, const at::Tensor& clock,
                               const OptionalTensor& class_order, const OptionalTensor& table,
                               int64_t classes) {
  const ScheduleArguments arguments{clock, std::nullopt, class_order, table};
  check_weights_arguments(steps, arguments, classes);
  const c10::cuda::CUDAGuard guard(steps.device());
  const ScheduleData schedule(arguments, classes);
  at::DimVector sizes = {steps.size(0)};
  if (is_ensemble(clock)) sizes.push_back(clock.size(0));
  sizes.push_back(classes);
  const at::Tensor out = at::empty(sizes, steps.options().dtype(at::kDouble)), step_list = steps.contiguous();
  Weights problem;
  problem.steps = step_list.const_data_ptr<int64_t>();
  problem.num_steps = steps.size(0);
  problem.members = is_ensemble(clock) ? clock.size(0) : 1;
  problem.classes = classes;
  problem.clock = schedule.clock();
  problem.class_order = schedule.class_order();
  problem.table = schedule.table();
  problem.table_rows = schedule.table_rows();
  problem.out = out.mutable_data_ptr<double>();
  C10_CUDA_CHECK(launch_weights(problem, c10::cuda::getCurrentCUDAStream()));
  return out;
}

struct Results {
  at::Tensor loss, gradient, weights, normalizer;
};

// Points the problem to fresh tensors.
Results new_results(const ForwardArguments& x, Forward& problem) {
  const ResultSizes sizes(x);
  const auto doubles = x.clock.options();
  Results results;
  results.weights = at::empty(sizes.weights, doubles);
  results.normalizer = at::empty(sizes.normalizer, doubles);
  results.loss = at::empty(sizes.loss, x.logits.options().dtype(loss_dtype(x.logits, x.reduction)));
  problem.weights = results.weights.mutable_data_ptr<double>();
  problem.normalizer = results.normalizer.mutable_data_ptr<double>();
  const bool reduced = x.reduction != reduction_none;
  problem.loss = reduced ? results.loss.mutable_data_ptr() : nullptr;
  problem.row_loss = reduced ? nullptr : results.loss.mutable_data_ptr();
  return results;
}

// What the blocks of a launch share, if there are several; to be kept until it has been launched.
at::Tensor workspace(Forward& problem, const at::TensorOptions& doubles, cudaStream_t stream) {
  problem.partials = problem.counts = nullptr;
  problem.arrivals = nullptr;
  if (problem.loss == nullptr) return {};
  ForwardPlan plan{};
  C10_CUDA_CHECK(plan_forward(problem, &plan));
  if (plan.blocks == 1) return {};
  const int64_t sums = problem.members * plan.blocks * 2, counts = problem.members * plan.count_blocks;
  const at::Tensor memory = at::empty({sums + counts}, doubles);
  problem.partials = memory.mutable_data_ptr<double>();
  if (counts > 0) problem.counts = problem.partials + sums;
  C10_CUDA_CHECK(arrival_counters(problem.members, stream, &problem.arrivals));
  return memory;
}

Results forward(const ForwardArguments& x, Gradient gradient, Division division) {
  check_forward(x);
  const bool ensemble = x.ensemble();
  const int64_t classes = x.logits.size(class_dim(x.logits.dim(), ensemble));
  const int64_t ignore_index = x.ignore_index.expect_int();
  const c10::cuda::CUDAGuard guard(x.logits.device());
  check_targets_if_asked(x.target, classes, ignore_index);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();

  const Rows input(x.logits, ensemble);
  const at::Tensor labels = x.target.contiguous();
  const ScheduleData schedule(x.schedule(), classes);
  const at::Tensor weight = x.weight ? x.weight->contiguous() : at::Tensor();
  Forward problem;
  describe(problem, x.logits, input, labels, ensemble, ignore_index, x.label_smoothing);
  std::optional<Rows> output;
  if (gradient != Gradient::none) {
    const at::Tensor to = gradient == Gradient::fresh ? at::empty_like(x.logits) : x.logits;
    problem.out = output.emplace(to, ensemble).operand();
  }
  problem.clock = schedule.clock();
  problem.class_order = schedule.class_order();
  problem.table = schedule.table();
  problem.table_rows = schedule.table_rows();
  problem.step = x.step.expect_int();
  problem.step_tensor = schedule.steps();
  problem.step_member_stride = schedule.step_stride();
  problem.weight = x.weight ? weight.const_data_ptr() : nullptr;
  problem.weight_storage = x.weight ? storage_of(weight.scalar_type()) : Storage::float64;
  problem.weight_member_stride = x.weight && weight.dim() == 2 ? classes : 0;
  problem.mean = x.reduction == reduction_mean;
  problem.by_weights = x.by_weights;
  problem.division = division;
  Results results = new_results(x, problem);
  const at::Tensor shared = workspace(problem, x.clock.options(), stream);
  C10_CUDA_CHECK(launch_forward(problem, stream));
  if (output) results.gradient = output->finish();
  return results;
}

ops::Loss cross_entropy(const ForwardArguments& x) {
  const Results results = forward(x, Gradient::none, Division::exact);
  return {results.loss, results.weights, results.normalizer};
}

ops::LossAndGradient cross_entropy_with_gradient(const ForwardArguments& x, bool finished) {
  const Results results = forward(x, Gradient::fresh, finished ? Division::exact : Division::estimated);
  return {results.loss, results.gradient, results.weights, results.normalizer};
}

ops::Loss cross_entropy_into_logits(const ForwardArguments& x) {
  const bool half = x.logits.scalar_type() == at::kHalf;
  const Results results = forward(x, Gradient::into_logits, half ? Division::postponed : Division::estimated);
  return {results.loss, results.weights, results.normalizer};
}

void rescale_(at::Tensor& gradient, const at::Tensor& grad_output, const at::Tensor& normalizer) {
  if (gradient.numel() == 0) return;
  const bool ensemble = normalizer.dim() == 2;
  const c10::cuda::CUDAGuard guard(gradient.device());
  const at::Tensor divisors = normalizer.contiguous();
  const Factors factors(grad_output, ensemble);
  if (!(ensemble ? gradient.select(0, 0) : gradient).is_non_overlapping_and_dense()) {
    const at::Tensor divisor = divisors.select(-1, 0);
    // A mean over nothing has a gradient of 0, whatever it is divided by.
    const at::Tensor safe = at::where(divisor == 0, at::ones_like(divisor), divisor);
    const at::Tensor factor = grad_output.to(at::kDouble) * divisors.select(-1, 1) / safe;
    // With a dimension, so that a half takes part as float32: it could not hold the factor.
    gradient.mul_(factor.to(gradient.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)
                      .reshape(ensemble ? at::DimVector{-1, 1, 1} : at::DimVector{1}));
    return;
  }
  Rescale problem;
  problem.storage = storage_of(gradient.scalar_type());
  problem.gradient = gradient.mutable_data_ptr();
  problem.members = ensemble ? gradient.size(0) : 1;
  problem.size = gradient.numel() / problem.members;
  problem.member_stride = ensemble ? gradient.stride(0) : 0;
  problem.grad_output = factors.data();
  problem.grad_storage = factors.storage();
  problem.grad_member_stride = factors.member_stride;
  problem.normalizer = divisors.const_data_ptr<double>();
  C10_CUDA_CHECK(launch_rescale(problem, c10::cuda::getCurrentCUDAStream()));
}

at::Tensor cross_entropy_derivative(const DerivativeArguments& x) {
  check_derivative(x);
  const bool ensemble = x.ensemble();
  const size_t along = x.directions.size();
  const int64_t ignore_index = x.ignore_index.expect_int();
  const c10::cuda::CUDAGuard guard(x.logits.device());
  const Rows input(x.logits, ensemble);
  const at::Tensor labels = x.target.contiguous(), gamma = x.weights.contiguous(),
                   divisors = x.normalizer.contiguous();
  const Factors factors(x.grad_output, ensemble);
  const Rows output(at::empty_like(x.logits), ensemble);
  std::vector<Rows> directions;
  for (const at::Tensor& direction : x.directions) directions.emplace_back(direction, ensemble);
  Derivative problem;
  describe(problem, x.logits, input, labels, ensemble, ignore_index, x.label_smoothing);
  check_targets_if_asked(x.target, problem.classes, ignore_index);
  problem.out = output.operand();
  problem.order = 1 + static_cast<int>(along);
  if (along >= 1) problem.v = directions[along - 1].operand();
  if (along == 2) problem.u = directions[0].operand();
  problem.weights = gamma.const_data_ptr<double>();
  problem.normalizer = divisors.const_data_ptr<double>();
  problem.grad_output = factors.data();
  problem.grad_storage = factors.storage();
  problem.grad_member_stride = factors.member_stride;
  problem.grad_row_stride = factors.row_stride;
  C10_CUDA_CHECK(launch_derivative(problem, c10::cuda::getCurrentCUDAStream()));
  return output.finish();
}

}  // namespace

TORCH_LIBRARY_IMPL(dynloss, CUDA, library) {
  library.impl("oscillation_weights", &oscillation_weights);
  library.impl("cross_entropy", &forward_kernel<&cross_entropy>);
  library.impl("cross_entropy_with_gradient",
               &forward_kernel<&cross_entropy_with_gradient, const at::Tensor&, bool>);
  library.impl("cross_entropy_into_logits", &forward_kernel<&cross_entropy_into_logits, at::Tensor&>);
  library.impl("rescale_", &rescale_);
  library.impl("cross_entropy_derivative", &derivative_kernel<&cross_entropy_derivative>);
}

}  // namespace dynloss::cuda
