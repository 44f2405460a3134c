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

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string_view>
#include <tuple>

#include "arguments.h"
#include "cuda/arrival_counters.h"
#include "cuda/cross_entropy.h"

namespace dynloss::cuda {

namespace {

using Optional = std::optional<at::Tensor>;

// ---- tensors as operands

Storage storage_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Storage::float32;
    case at::kDouble:
      return Storage::float64;
    case at::kHalf:
      return Storage::float16;
    default:
      return Storage::bfloat16;
  }
}

Label label_of(at::ScalarType dtype) {
  return dtype == at::kLong ? Label::int64 : dtype == at::kInt ? Label::int32 : Label::uint8;
}

// The stride that walks dimensions [first, dim) of x as one; none if there is none.
std::optional<int64_t> joint_stride(const at::Tensor& x, int64_t first) {
  int64_t stride = 0, next = 0;
  for (int64_t d = x.dim() - 1; d >= first; --d) {
    if (x.size(d) == 1) continue;
    if (stride == 0)
      stride = x.stride(d);
    else if (x.stride(d) != next)
      return std::nullopt;
    next = x.stride(d) * x.size(d);
  }
  return stride;
}

int64_t class_dim(const at::Tensor& logits, bool ensemble) {
  return ensemble ? 2 : logits.dim() == 1 ? 0 : 1;
}

std::optional<Operand> as_operand(const at::Tensor& x, bool ensemble) {
  const int64_t classes = x.size(class_dim(x, ensemble));
  Operand operand;
  operand.data = x.data_ptr();
  operand.class_stride = classes <= 1 ? 1 : x.stride(class_dim(x, ensemble));
  if (operand.class_stride != 1 && classes > max_strided_classes) return std::nullopt;
  if (ensemble) {
    operand.member_stride = x.stride(0);
    operand.row_stride = x.stride(1);
  } else if (x.dim() == 2) {
    operand.row_stride = x.stride(0);
  } else if (x.dim() > 2) {
    const auto inner = joint_stride(x, 2);
    if (!inner) return std::nullopt;
    operand.outer_stride = x.stride(0);
    operand.row_stride = *inner;
  }
  return operand;
}

// The classes last in memory.
at::Tensor rows_copy(const at::Tensor& x, bool ensemble) {
  if (ensemble || x.dim() <= 2) return x.clone(at::MemoryFormat::Contiguous);
  return x.movedim(1, -1).clone(at::MemoryFormat::Contiguous).movedim(-1, 1);
}

// An input that the kernels can walk: x or a copy.
class Input {
 public:
  Input(const at::Tensor& x, bool ensemble) : tensor_(x) {
    auto operand = as_operand(x, ensemble);
    if (!operand) {
      tensor_ = rows_copy(x, ensemble);
      operand = as_operand(tensor_, ensemble);
    }
    operand_ = *operand;
  }
  operator const Operand&() const { return operand_; }

 private:
  at::Tensor tensor_;
  Operand operand_;
};

// A result shaped like the logits, written directly or through a copy.
class Output {
 public:
  Output(const at::Tensor& result, bool ensemble) : result_(result), written_(result) {
    auto operand = as_operand(result, ensemble);
    if (!operand) {
      written_ = rows_copy(result, ensemble);
      operand = as_operand(written_, ensemble);
    }
    operand_ = *operand;
  }
  operator const Operand&() const { return operand_; }
  at::Tensor finish() {
    if (!result_.is_same(written_)) result_.copy_(written_);
    return result_;
  }

 private:
  at::Tensor result_, written_;
  Operand operand_;
};

// grad_output or another tensor of a member's or a row's factors.
struct Factors {
  at::Tensor tensor;
  int64_t member_stride = 0;
  int64_t row_stride = 0;

  Factors(const at::Tensor& x, bool ensemble) : tensor(x) {
    if (x.scalar_type() != at::kFloat && x.scalar_type() != at::kDouble && x.scalar_type() != at::kHalf &&
        x.scalar_type() != at::kBFloat16)
      tensor = tensor.to(at::kFloat);
    const int64_t first = ensemble ? 1 : 0;
    if (ensemble) member_stride = tensor.stride(0);
    if (tensor.dim() <= first) return;
    if (!joint_stride(tensor, first)) {
      tensor = tensor.contiguous();
      if (ensemble) member_stride = tensor.stride(0);
    }
    row_stride = *joint_stride(tensor, first);
  }
  const void* data() const { return tensor.const_data_ptr(); }
  Storage storage() const { return storage_of(tensor.scalar_type()); }
};

void check_targets_if_asked(const at::Tensor& target, int64_t classes, int64_t ignore_index) {
  static const bool asked = [] {
    const char* value = std::getenv("DYNLOSS_CHECK");
    return value != nullptr && std::string_view(value) == "1";
  }();
  if (asked) check_labels(target.to(at::kCPU, at::kLong), classes, ignore_index);
}

// The fields of Problem, but for `out`.
void describe(Problem& problem, const at::Tensor& logits, const Operand& operand, const at::Tensor& target,
              bool ensemble, int64_t ignore_index, double label_smoothing) {
  problem.storage = storage_of(logits.scalar_type());
  problem.label = label_of(target.scalar_type());
  problem.members = ensemble ? logits.size(0) : 1;
  problem.classes = logits.size(class_dim(logits, ensemble));
  const int64_t own_targets = ensemble && target.dim() == 2 ? problem.members : 1;
  problem.rows = ensemble ? logits.size(1) : target.numel();
  problem.inner_rows = problem.rows;
  if (!ensemble && logits.dim() > 2)
    problem.inner_rows = std::max<int64_t>(problem.rows / std::max<int64_t>(logits.size(0), 1), 1);
  problem.logits = operand;
  problem.target = target.const_data_ptr();
  problem.target_member_stride = own_targets > 1 ? problem.rows : 0;
  problem.ignore_index = ignore_index;
  problem.label_smoothing = label_smoothing;
}

template <typename T>
const T* data_of(const Optional& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

Optional contiguous(const Optional& x) { return x ? Optional(x->contiguous()) : x; }

const Clock* clocks_of(const at::Tensor& clock) {
  return reinterpret_cast<const Clock*>(clock.const_data_ptr<double>());
}

// ---- the ops

at::Tensor oscillation_weights(const at::Tensor& steps, const at::Tensor& clock, const Optional& class_order,
                               const Optional& table, int64_t classes) {
  TORCH_CHECK_VALUE(steps.dim() == 1 && steps.scalar_type() == at::kLong,
                    "steps: expected int64 of shape (S,), got ", steps.scalar_type(), " of shape ",
                    steps.sizes());
  check_schedule({clock, std::nullopt, class_order, table}, classes, steps.device());
  const c10::cuda::CUDAGuard guard(steps.device());
  at::DimVector sizes = {steps.size(0)};
  if (is_ensemble(clock)) sizes.push_back(clock.size(0));
  sizes.push_back(classes);
  const at::Tensor out = at::empty(sizes, steps.options().dtype(at::kDouble));
  const at::Tensor step_list = steps.contiguous(), clocks = clock.contiguous();
  const Optional order = contiguous(class_order), tables = contiguous(table);
  Weights problem;
  problem.steps = step_list.const_data_ptr<int64_t>();
  problem.num_steps = steps.size(0);
  problem.members = is_ensemble(clock) ? clock.size(0) : 1;
  problem.classes = classes;
  problem.clock = clocks_of(clocks);
  problem.class_order = data_of<int64_t>(order);
  problem.table = data_of<double>(tables);
  problem.table_rows = table ? table->size(-2) : 0;
  problem.out = out.mutable_data_ptr<double>();
  C10_CUDA_CHECK(launch_weights(problem, c10::cuda::getCurrentCUDAStream()));
  return out;
}

struct Results {
  at::Tensor loss, gradient, weights, normalizer;
};

// Where the gradient goes.
enum class Gradient { none, fresh, into_logits };

Results run_forward(Gradient gradient, Division division, const at::Tensor& logits, const at::Tensor& target,
                    int64_t step, const Optional& step_tensor, const at::Tensor& clock,
                    const Optional& class_order, const Optional& table, int64_t reduction, bool by_weights,
                    int64_t ignore_index, double label_smoothing) {
  const bool ensemble = is_ensemble(clock);
  const int64_t members = ensemble ? clock.size(0) : 1;
  check_options(reduction, label_smoothing);
  check_logits_and_target(logits, target, members, ensemble);
  const int64_t classes = logits.size(class_dim(logits, ensemble));
  check_schedule({clock, step_tensor, class_order, table}, classes, logits.device());
  const c10::cuda::CUDAGuard guard(logits.device());
  check_targets_if_asked(target, classes, ignore_index);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();

  const Input input(logits, ensemble);
  const at::Tensor labels = target.contiguous(), clocks = clock.contiguous();
  const Optional order = contiguous(class_order), tables = contiguous(table);
  Forward problem;
  describe(problem, logits, input, labels, ensemble, ignore_index, label_smoothing);
  std::optional<Output> output;
  if (gradient != Gradient::none)
    problem.out = output.emplace(gradient == Gradient::fresh ? at::empty_like(logits) : logits, ensemble);
  problem.clock = clocks_of(clocks);
  problem.class_order = data_of<int64_t>(order);
  problem.table = data_of<double>(tables);
  problem.table_rows = table ? table->size(-2) : 0;
  problem.step = step;
  problem.step_tensor = data_of<int64_t>(step_tensor);
  problem.step_member_stride = step_tensor && step_tensor->dim() == 1 ? step_tensor->stride(0) : 0;
  problem.mean = reduction == reduction_mean;
  problem.by_weights = by_weights;
  problem.division = division;

  Results results;
  const auto doubles = clock.options();
  results.weights = ensemble ? at::empty({members, classes}, doubles) : at::empty({classes}, doubles);
  results.normalizer = ensemble ? at::empty({members, 2}, doubles) : at::empty({2}, doubles);
  problem.weights = results.weights.mutable_data_ptr<double>();
  problem.normalizer = results.normalizer.mutable_data_ptr<double>();
  const auto options = logits.options().dtype(loss_dtype(logits, reduction));
  at::Tensor partials;
  problem.row_loss = problem.loss = nullptr;
  problem.partials = problem.counts = nullptr;
  problem.arrivals = nullptr;
  if (reduction == reduction_none) {
    const auto sizes = ensemble ? at::DimVector{members, logits.size(1)} : at::DimVector(target.sizes());
    results.loss = at::empty(sizes, options);
    problem.row_loss = results.loss.mutable_data_ptr();
  } else {
    results.loss = ensemble ? at::empty({members}, options) : at::empty({}, options);
    problem.loss = results.loss.mutable_data_ptr();
    ForwardPlan plan{};
    C10_CUDA_CHECK(plan_forward(problem, &plan));
    if (plan.blocks > 1) {
      partials = at::empty({members * (plan.blocks * 2 + plan.count_blocks)}, doubles);
      problem.partials = partials.mutable_data_ptr<double>();
      if (plan.count_blocks > 0) problem.counts = problem.partials + members * plan.blocks * 2;
      C10_CUDA_CHECK(arrival_counters(members, stream, &problem.arrivals));
    }
  }
  C10_CUDA_CHECK(launch_forward(problem, stream));
  if (output) results.gradient = output->finish();
  return results;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy(
    const at::Tensor& logits, const at::Tensor& target, int64_t step, const Optional& step_tensor,
    const at::Tensor& clock, const Optional& class_order, const Optional& table, int64_t reduction,
    bool by_weights, int64_t ignore_index, double label_smoothing) {
  Results results = run_forward(Gradient::none, Division::exact, logits, target, step, step_tensor, clock,
                                class_order, table, reduction, by_weights, ignore_index, label_smoothing);
  return {results.loss, results.weights, results.normalizer};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> cross_entropy_with_gradient(
    const at::Tensor& logits, const at::Tensor& target, int64_t step, const Optional& step_tensor,
    const at::Tensor& clock, const Optional& class_order, const Optional& table, int64_t reduction,
    bool by_weights, int64_t ignore_index, double label_smoothing, bool finished) {
  const Division division = finished ? Division::exact : Division::estimated;
  Results results = run_forward(Gradient::fresh, division, logits, target, step, step_tensor, clock,
                                class_order, table, reduction, by_weights, ignore_index, label_smoothing);
  return {results.loss, results.gradient, results.weights, results.normalizer};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_into_logits(
    at::Tensor& logits, const at::Tensor& target, int64_t step, const Optional& step_tensor,
    const at::Tensor& clock, const Optional& class_order, const Optional& table, int64_t reduction,
    bool by_weights, int64_t ignore_index, double label_smoothing) {
  const bool half = logits.scalar_type() == at::kHalf;
  const Division division = half ? Division::postponed : Division::estimated;
  Results results = run_forward(Gradient::into_logits, division, logits, target, step, step_tensor, clock,
                                class_order, table, reduction, by_weights, ignore_index, label_smoothing);
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

at::Tensor run_derivative(int order, const at::Tensor* u, const at::Tensor* v, const at::Tensor& grad_output,
                          const at::Tensor& logits, const at::Tensor& target, const at::Tensor& weights,
                          const at::Tensor& normalizer, int64_t ignore_index, double label_smoothing) {
  check_derivative(grad_output, logits, target, weights, normalizer);
  if (u != nullptr) check_direction("u", *u, logits);
  if (v != nullptr) check_direction("v", *v, logits);
  const bool ensemble = is_ensemble(weights);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Input input(logits, ensemble);
  const at::Tensor labels = target.contiguous(), gamma = weights.contiguous(),
                   divisors = normalizer.contiguous();
  const Factors factors(grad_output, ensemble);
  std::optional<Input> u_input, v_input;
  Output output(at::empty_like(logits), ensemble);
  Derivative problem;
  describe(problem, logits, input, labels, ensemble, ignore_index, label_smoothing);
  check_targets_if_asked(target, problem.classes, ignore_index);
  problem.out = output;
  problem.order = order;
  if (u != nullptr) problem.u = u_input.emplace(*u, ensemble);
  if (v != nullptr) problem.v = v_input.emplace(*v, ensemble);
  problem.weights = gamma.const_data_ptr<double>();
  problem.normalizer = divisors.const_data_ptr<double>();
  problem.grad_output = factors.data();
  problem.grad_storage = factors.storage();
  problem.grad_member_stride = factors.member_stride;
  problem.grad_row_stride = factors.row_stride;
  C10_CUDA_CHECK(launch_derivative(problem, c10::cuda::getCurrentCUDAStream()));
  return output.finish();
}

at::Tensor cross_entropy_gradient(const at::Tensor& grad_output, const at::Tensor& logits,
                                  const at::Tensor& target, const at::Tensor& weights,
                                  const at::Tensor& normalizer, int64_t ignore_index,
                                  double label_smoothing) {
  return run_derivative(1, nullptr, nullptr, grad_output, logits, target, weights, normalizer, ignore_index,
                        label_smoothing);
}

at::Tensor cross_entropy_hessian(const at::Tensor& v, const at::Tensor& grad_output, const at::Tensor& logits,
                                 const at::Tensor& target, const at::Tensor& weights,
                                 const at::Tensor& normalizer, int64_t ignore_index, double label_smoothing) {
  return run_derivative(2, nullptr, &v, grad_output, logits, target, weights, normalizer, ignore_index,
                        label_smoothing);
}

at::Tensor cross_entropy_third(const at::Tensor& u, const at::Tensor& v, const at::Tensor& grad_output,
                               const at::Tensor& logits, const at::Tensor& target, const at::Tensor& weights,
                               const at::Tensor& normalizer, int64_t ignore_index, double label_smoothing) {
  return run_derivative(3, &u, &v, grad_output, logits, target, weights, normalizer, ignore_index,
                        label_smoothing);
}

}  // namespace

TORCH_LIBRARY_IMPL(dynloss, CUDA, library) {
  library.impl("oscillation_weights", &oscillation_weights);
  library.impl("cross_entropy", &cross_entropy);
  library.impl("cross_entropy_with_gradient", &cross_entropy_with_gradient);
  library.impl("cross_entropy_into_logits", &cross_entropy_into_logits);
  library.impl("rescale_", &rescale_);
  library.impl("cross_entropy_gradient", &cross_entropy_gradient);
  library.impl("cross_entropy_hessian", &cross_entropy_hessian);
  library.impl("cross_entropy_third", &cross_entropy_third);
}

}  // namespace dynloss::cuda
