#include "perceptron_arguments.h"

#include <limits>

namespace dynloss {

namespace {

// C of P = D H + H + H C + C, or 0 if there is none.
int64_t classes_of(int64_t parameters, int64_t inputs, int64_t hidden) {
  const int64_t second = parameters - inputs * hidden - hidden;
  return second > 0 && second % (hidden + 1) == 0 ? second / (hidden + 1) : 0;
}

void check_per_member(const char* name, const at::Tensor& x, at::ScalarType dtype,
                      const PerceptronArguments& arguments) {
  TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) == arguments.members() && x.scalar_type() == dtype &&
                        x.device() == arguments.parameters.device(),
                    name, ": expected ", dtype, " of shape (", arguments.members(), ",) on ",
                    arguments.parameters.device(), ", got ", x.scalar_type(), " of shape ", x.sizes(), " on ",
                    x.device());
}

}  // namespace

ScheduleArguments PerceptronArguments::schedule() const {
  static const OptionalTensor none;
  return {clock, none, class_order, table};
}

PerceptronShape PerceptronArguments::shape() const {
  const int64_t features = inputs.size(-1);
  return {inputs.size(-2), features, hidden, classes_of(parameters.size(1), features, hidden),
          static_cast<Activation>(activation)};
}

RecordedSteps::RecordedSteps(int64_t step, int64_t num_steps, int64_t record_every)
    : first((step + record_every - 1) / record_every * record_every),
      every(record_every),
      count(first < step + num_steps ? (step + num_steps - 1 - first) / record_every + 1 : 0) {}

void check_perceptron(const PerceptronArguments& x) {
  const at::Tensor& parameters = x.parameters;
  const at::ScalarType dtype = parameters.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble,
                   "parameters: expected float32 or float64, got ", dtype);
  TORCH_CHECK_VALUE(parameters.dim() == 2 && parameters.is_contiguous(),
                    "parameters: expected a contiguous tensor of shape (M, P), got shape ",
                    parameters.sizes());
  TORCH_CHECK_VALUE(x.hidden >= 1, "hidden: expected at least 1, got ", x.hidden);
  TORCH_CHECK_VALUE(x.activation == 0 || x.activation == 1, "activation: expected 0 (relu) or 1 (tanh), got ",
                    x.activation);
  TORCH_CHECK_VALUE(x.step >= 0, "step: expected 0 or more, got ", x.step);
  TORCH_CHECK_TYPE(x.inputs.scalar_type() == dtype, "inputs: expected ", dtype,
                   ", as the parameters are, got ", x.inputs.scalar_type());
  const int64_t members = x.members();
  const bool inputs_fit = x.inputs.dim() == 2 || (x.own_inputs() && x.inputs.size(0) == members);
  TORCH_CHECK_VALUE(inputs_fit && x.inputs.size(-1) >= 1 && x.inputs.size(-2) >= 1,
                    "inputs: expected shape (N, D) or (", members, ", N, D), no dimension 0, got ",
                    x.inputs.sizes());
  TORCH_CHECK_VALUE(x.inputs.device() == parameters.device(), "inputs: expected device ", parameters.device(),
                    ", got ", x.inputs.device());
  TORCH_CHECK_TYPE(x.target.scalar_type() == at::kLong, "target: expected int64, got ",
                   x.target.scalar_type());
  const bool target_fits = x.target.dim() == 1 || (x.own_target() && x.target.size(0) == members);
  TORCH_CHECK_VALUE(target_fits && x.target.size(-1) == x.inputs.size(-2), "target: expected shape (",
                    x.inputs.size(-2), ",) or (", members, ", ", x.inputs.size(-2), "), got ",
                    x.target.sizes());
  TORCH_CHECK_VALUE(x.target.device() == parameters.device(), "target: expected device ", parameters.device(),
                    ", got ", x.target.device());
  const int64_t classes = classes_of(parameters.size(1), x.inputs.size(-1), x.hidden);
  TORCH_CHECK_VALUE(classes >= 1, "parameters: expected P = D H + H + H C + C numbers a member with D = ",
                    x.inputs.size(-1), " and H = ", x.hidden, ", got ", parameters.size(1));
  check_schedule(x.schedule(), classes, parameters.device());
  TORCH_CHECK_VALUE(!is_ensemble(x.clock) || x.clock.size(0) == members, "clock: expected shape (6,) or (",
                    members, ", 6), got ", x.clock.sizes());
}

void check_perceptron_direction(const PerceptronArguments& x, const at::Tensor& v) {
  TORCH_CHECK_VALUE(v.sizes() == x.parameters.sizes() && v.scalar_type() == x.parameters.scalar_type() &&
                        v.device() == x.parameters.device(),
                    "v: expected a tensor like the parameters, ", x.parameters.scalar_type(), " of shape ",
                    x.parameters.sizes(), " on ", x.parameters.device(), ", got ", v.scalar_type(),
                    " of shape ", v.sizes(), " on ", v.device());
}

void check_descent(const PerceptronArguments& x, const DescentArguments& descent) {
  check_per_member("finite", descent.finite, at::kBool, x);
  check_per_member("learning_rate", descent.learning_rate, at::kDouble, x);
  TORCH_CHECK_VALUE(descent.finite.is_contiguous(), "finite: expected a contiguous tensor, got strides ",
                    descent.finite.strides());
  TORCH_CHECK_VALUE(descent.velocity.has_value() == descent.momentum.has_value(),
                    "velocity: expected one with momentum and none without");
  if (descent.momentum) {
    const at::Tensor& velocity = *descent.velocity;
    check_per_member("momentum", *descent.momentum, at::kDouble, x);
    TORCH_CHECK_VALUE(velocity.sizes() == x.parameters.sizes() && velocity.is_contiguous() &&
                          velocity.scalar_type() == x.parameters.scalar_type() &&
                          velocity.device() == x.parameters.device(),
                      "velocity: expected a contiguous tensor like the parameters, ",
                      x.parameters.scalar_type(), " of shape ", x.parameters.sizes(), ", got ",
                      velocity.scalar_type(), " of shape ", velocity.sizes());
  }
  TORCH_CHECK_VALUE(
      descent.num_steps >= 1 && descent.num_steps <= std::numeric_limits<int64_t>::max() / 2 - x.step,
      "num_steps: expected at least 1, got ", descent.num_steps);
  TORCH_CHECK_VALUE(descent.record_every >= 1, "record_every: expected at least 1, got ",
                    descent.record_every);
}

}  // namespace dynloss
