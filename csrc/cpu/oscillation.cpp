#include "cpu/oscillation.h"

#include <torch/library.h>

#include "cpu/operands.h"

namespace dynloss::cpu {

void check_class_order(const ScheduleData& schedule, int64_t classes) {
  const int64_t* order = schedule.class_order();
  for (int64_t i = 0; order != nullptr && i < classes; ++i)
    TORCH_CHECK_INDEX(order[i] >= 0 && order[i] < classes, "class_order: expected classes from 0 to ",
                      classes - 1, ", got ", order[i], " at position ", i);
}

void write_weights(const Schedule& schedule, int64_t step, const double* weight, double* out) {
  const ClassWeights weights = weights_at(schedule, step);
  for (int64_t c = 0; c < schedule.num_classes; ++c) out[c] = weights[c];
  for (int64_t c = 0; weight != nullptr && c < schedule.num_classes; ++c) out[c] *= weight[c];
}

namespace {

at::Tensor oscillation_weights(const at::Tensor& steps, const at::Tensor& clock,
                               const OptionalTensor& class_order, const OptionalTensor& table,
                               int64_t classes) {
  const ScheduleArguments arguments{clock, std::nullopt, class_order, table};
  check_weights_arguments(steps, arguments, classes);
  const ScheduleData schedule(arguments, classes);
  check_class_order(schedule, classes);
  at::DimVector sizes = {steps.size(0)};
  if (is_ensemble(clock)) sizes.push_back(clock.size(0));
  sizes.push_back(classes);
  const at::Tensor weights = new_tensor(sizes, at::kDouble), step_list = steps.contiguous();
  const int64_t members = is_ensemble(clock) ? clock.size(0) : 1;
  double* out = weights.mutable_data_ptr<double>();
  for (int64_t s = 0; s < steps.size(0); ++s)
    for (int64_t e = 0; e < members; ++e, out += classes)
      write_weights(schedule.of_member(e), step_list.const_data_ptr<int64_t>()[s], nullptr, out);
  return weights;
}

}  // namespace

TORCH_LIBRARY_IMPL(dynloss, CPU, library) { library.impl("oscillation_weights", &oscillation_weights); }

}  // namespace dynloss::cpu
