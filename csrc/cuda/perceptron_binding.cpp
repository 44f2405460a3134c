// The perceptron ops on CUDA: arguments are checked, tensors become pointers and strides, and the kernels are
// launched on the current stream. Nothing waits for the device; a target that is no class counts for nothing.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "cuda/perceptron.h"
#include "layout.h"
#include "perceptron_arguments.h"

namespace dynloss::cuda {

namespace {

void describe(Perceptrons& problem, const PerceptronArguments& x, const ScheduleData& schedule) {
  const bool own_schedule = is_ensemble(x.clock);
  problem.is_double = x.parameters.scalar_type() == at::kDouble;
  problem.members = x.members();
  problem.shape = x.shape();
  problem.inputs = x.inputs.const_data_ptr();
  problem.inputs_member_stride = x.own_inputs() ? x.inputs.stride(0) : 0;
  problem.inputs_row_stride = x.inputs.stride(-2);
  problem.inputs_column_stride = x.inputs.stride(-1);
  problem.target = x.target.const_data_ptr<int64_t>();
  problem.target_member_stride = x.own_target() ? x.target.stride(0) : 0;
  problem.target_row_stride = x.target.stride(-1);
  problem.parameters = x.parameters.data_ptr();
  problem.clock = schedule.clock();
  problem.clock_member_stride = own_schedule ? 1 : 0;
  problem.class_order = schedule.class_order();
  problem.table = schedule.table();
  problem.table_rows = schedule.table_rows();
  problem.table_member_stride = own_schedule ? schedule.table_rows() * problem.shape.classes : 0;
  problem.step = x.step;
}

// Launches with the workspace that the problem needs; the allocator keeps it for the stream.
template <typename Problem>
void run(Problem& problem, const at::Tensor& like) {
  int64_t size = 0;
  C10_CUDA_CHECK(workspace_size(problem, &size));
  const at::Tensor workspace = at::empty({size * problem.members}, like.options());
  problem.workspace = workspace.data_ptr();
  C10_CUDA_CHECK(launch(problem, c10::cuda::getCurrentCUDAStream()));
}

std::tuple<at::Tensor, at::Tensor> perceptron_gradient(const PerceptronArguments& x) {
  check_perceptron(x);
  const c10::cuda::CUDAGuard guard(x.parameters.device());
  const ScheduleData schedule(x.schedule(), x.shape().classes);
  const at::Tensor loss = at::empty({x.members()}, x.parameters.options().dtype(at::kDouble));
  const at::Tensor gradient = at::empty_like(x.parameters);
  PerceptronDerivative problem{};
  describe(problem, x, schedule);
  problem.loss = loss.mutable_data_ptr<double>();
  problem.out = gradient.mutable_data_ptr();
  run(problem, x.parameters);
  return {loss, gradient};
}

at::Tensor perceptron_hvp(const PerceptronArguments& x, const at::Tensor& v) {
  check_perceptron(x);
  check_perceptron_direction(x, v);
  const c10::cuda::CUDAGuard guard(x.parameters.device());
  const ScheduleData schedule(x.schedule(), x.shape().classes);
  const at::Tensor product = at::empty_like(x.parameters), direction = v.contiguous();
  PerceptronDerivative problem{};
  describe(problem, x, schedule);
  problem.v = direction.const_data_ptr();
  problem.out = product.mutable_data_ptr();
  run(problem, x.parameters);
  return product;
}

at::Tensor perceptron_train_(const PerceptronArguments& x, const DescentArguments& descent) {
  check_perceptron(x);
  check_descent(x, descent);
  const c10::cuda::CUDAGuard guard(x.parameters.device());
  const ScheduleData schedule(x.schedule(), x.shape().classes);
  const RecordedSteps recorded(x.step, descent.num_steps, descent.record_every);
  const at::Tensor records =
      at::full({recorded.count, x.members(), 3}, std::numeric_limits<double>::quiet_NaN(),
               x.parameters.options().dtype(at::kDouble));
  const at::Tensor rates = descent.learning_rate.contiguous();
  const at::Tensor momenta = descent.momentum ? descent.momentum->contiguous() : at::Tensor();
  PerceptronDescent problem{};
  describe(problem, x, schedule);
  problem.velocity = descent.velocity ? descent.velocity->data_ptr() : nullptr;
  problem.finite = static_cast<bool*>(descent.finite.data_ptr());
  problem.learning_rate = rates.const_data_ptr<double>();
  problem.momentum = descent.momentum ? momenta.const_data_ptr<double>() : nullptr;
  problem.num_steps = descent.num_steps;
  problem.first_record = recorded.first;
  problem.record_every = recorded.every;
  problem.records = records.mutable_data_ptr<double>();
  run(problem, x.parameters);
  return records;
}

}  // namespace

TORCH_LIBRARY_IMPL(dynloss, CUDA, library) {
  library.impl("perceptron_gradient", &perceptron_kernel<&perceptron_gradient>);
  library.impl("perceptron_hvp", &perceptron_kernel<&perceptron_hvp, const at::Tensor&, const at::Tensor&>);
  library.impl("perceptron_train_", &descent_kernel<&perceptron_train_>);
}

}  // namespace dynloss::cuda
