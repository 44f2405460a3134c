// What the perceptron ops are given: as a struct, as the dispatcher passes it, and how one becomes the other.
// Then what every backend asks of them.
#pragma once

#include "arguments.h"
#include "core/perceptron.h"

namespace dynloss {

// M networks, each with its row of the flat parameters, at the weights Γ of one step.
struct PerceptronArguments {
  const at::Tensor& parameters;  // (M, P)
  const at::Tensor& inputs;      // (N, D), or (M, N, D)
  const at::Tensor& target;      // (N,), or (M, N) with inputs of their own
  int64_t hidden;
  int64_t activation;
  int64_t step;
  const at::Tensor& clock;
  const OptionalTensor& class_order;
  const OptionalTensor& table;

  ScheduleArguments schedule() const;
  int64_t members() const { return parameters.size(0); }
  bool own_inputs() const { return inputs.dim() == 3; }
  bool own_target() const { return target.dim() == 2; }
  PerceptronShape shape() const;  // of checked arguments
};

// A function of PerceptronArguments, and perhaps more, as a kernel of the dispatcher.
template <auto function, typename Parameters = const at::Tensor&, typename... More>
auto perceptron_kernel(Parameters parameters, const at::Tensor& inputs, const at::Tensor& target,
                       int64_t hidden, int64_t activation, int64_t step, const at::Tensor& clock,
                       const OptionalTensor& class_order, const OptionalTensor& table, More... more) {
  return function(
      PerceptronArguments{parameters, inputs, target, hidden, activation, step, clock, class_order, table},
      more...);
}

// How an ensemble descends.
struct DescentArguments {
  const OptionalTensor& velocity;   // (M, P), where there is momentum
  const at::Tensor& finite;         // (M,) bool
  const at::Tensor& learning_rate;  // (M,) float64
  const OptionalTensor& momentum;   // (M,) float64
  int64_t num_steps;
  int64_t record_every;
};

template <at::Tensor (*function)(const PerceptronArguments&, const DescentArguments&)>
at::Tensor descent_kernel(at::Tensor& parameters, const at::Tensor& inputs, const at::Tensor& target,
                          int64_t hidden, int64_t activation, int64_t step, const at::Tensor& clock,
                          const OptionalTensor& class_order, const OptionalTensor& table,
                          const OptionalTensor& velocity, at::Tensor& finite, const at::Tensor& learning_rate,
                          const OptionalTensor& momentum, int64_t num_steps, int64_t record_every) {
  return function({parameters, inputs, target, hidden, activation, step, clock, class_order, table},
                  {velocity, finite, learning_rate, momentum, num_steps, record_every});
}

// Which updates are recorded: u in [step, step + num_steps) with u % every == 0.
struct RecordedSteps {
  int64_t first, every, count;

  RecordedSteps(int64_t step, int64_t num_steps, int64_t record_every);
  bool contains(int64_t u) const { return u >= first && (u - first) % every == 0; }
  int64_t row(int64_t u) const { return (u - first) / every; }
};

// Checks: ValueError or TypeError, naming the argument, what was given and what is expected.
void check_perceptron(const PerceptronArguments& x);
void check_perceptron_direction(const PerceptronArguments& x, const at::Tensor& v);
void check_descent(const PerceptronArguments& x, const DescentArguments& descent);

}  // namespace dynloss
