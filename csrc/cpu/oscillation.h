// Γ(step) on CPU, as the loss evaluates it.
#pragma once

#include <cstdint>

#include "layout.h"

namespace dynloss::cpu {

// Raises IndexError.
void check_class_order(const ScheduleData& schedule, int64_t classes);

// Γ (C,) of a member at a step, times `weight` (C,) where that is not null.
void write_weights(const Schedule& schedule, int64_t step, const double* weight, double* out);

}  // namespace dynloss::cpu
