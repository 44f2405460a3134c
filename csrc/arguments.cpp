#include "arguments.h"

#include <c10/core/SymInt.h>

namespace dynloss {

namespace {

bool is_supported(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16;
}

bool is_label(at::ScalarType dtype) { return dtype == at::kLong || dtype == at::kInt || dtype == at::kByte; }

void check_logits_and_target(const at::Tensor& logits, const at::Tensor& target, const c10::SymInt& members,
                             bool ensemble) {
  TORCH_CHECK_TYPE(is_supported(logits.scalar_type()),
                   "logits: expected float32, float64, float16 or bfloat16, got ", logits.scalar_type());
  TORCH_CHECK_TYPE(is_label(target.scalar_type()),
                   "target: expected class indices of dtype int64, int32 or uint8, got ",
                   target.scalar_type());
  TORCH_CHECK_VALUE(logits.device() == target.device(), "target: expected device ", logits.device(),
                    ", that of the logits, got ", target.device());
  if (ensemble) {
    TORCH_CHECK_VALUE(logits.dim() == 3, "logits: expected shape (E, N, C) with an ensemble of ", members,
                      " oscillations, got ", logits.sym_sizes());
    TORCH_CHECK_VALUE(logits.sym_size(0) == members, "logits: expected a first dimension of ", members,
                      ", one per oscillation of the ensemble, got shape ", logits.sym_sizes());
    const bool shared = target.dim() == 1 && target.sym_size(0) == logits.sym_size(1);
    const bool own =
        target.dim() == 2 && target.sym_size(0) == members && target.sym_size(1) == logits.sym_size(1);
    TORCH_CHECK_VALUE(shared || own, "target: expected shape (", logits.sym_size(1), ",) or (", members, ", ",
                      logits.sym_size(1), ") for logits ", logits.sym_sizes(), ", got ", target.sym_sizes());
    return;
  }
  TORCH_CHECK_VALUE(logits.dim() >= 1, "logits: expected shape (C,), (N, C) or (N, C, d1, ...), got ()");
  bool fits = target.dim() == logits.dim() - 1;
  for (int64_t d = 0; fits && d < target.dim(); ++d)
    fits = target.sym_size(d) == logits.sym_size(d == 0 ? 0 : d + 1);
  TORCH_CHECK_VALUE(fits, "target: expected the shape of logits ", logits.sym_sizes(),
                    " without its class dimension, got ", target.sym_sizes(),
                    target.sym_sizes().equals(logits.sym_sizes())
                        ? c10::str(" of ", target.scalar_type(),
                                   "; class probabilities, as one-hot rows, are floating-point")
                        : std::string());
}

void check_direction(const char* name, const at::Tensor& direction, const at::Tensor& logits) {
  TORCH_CHECK_VALUE(direction.sym_sizes().equals(logits.sym_sizes()), name,
                    ": expected the shape of logits, ", logits.sym_sizes(), ", got ", direction.sym_sizes());
  TORCH_CHECK_TYPE(direction.scalar_type() == logits.scalar_type(), name, ": expected the dtype of logits, ",
                   logits.scalar_type(), ", got ", direction.scalar_type());
  TORCH_CHECK_VALUE(direction.device() == logits.device(), name, ": expected device ", logits.device(),
                    ", got ", direction.device());
}

}  // namespace

c10::SymInt num_classes(const at::Tensor& logits, bool ensemble) {
  return logits.sym_size(class_dim(logits.dim(), ensemble));
}

c10::SymDimVector reduced_sizes(const at::Tensor& clock_or_weights) {
  c10::SymDimVector sizes;
  if (is_ensemble(clock_or_weights)) sizes.push_back(clock_or_weights.sym_size(0));
  return sizes;
}

c10::SymDimVector sample_sizes(const at::Tensor& logits, const at::Tensor& target, bool ensemble) {
  if (!ensemble) return c10::SymDimVector(target.sym_sizes());
  return {logits.sym_size(0), logits.sym_size(1)};
}

at::ScalarType loss_dtype(const at::Tensor& logits, int64_t reduction) {
  const at::ScalarType dtype = logits.scalar_type();
  return reduction == reduction_none || dtype == at::kDouble ? dtype : at::kFloat;
}

void check_schedule(const ScheduleArguments& schedule, const c10::SymInt& classes, const at::Device& device) {
  const at::Tensor& clock = schedule.clock;
  TORCH_CHECK_TYPE(clock.scalar_type() == at::kDouble, "clock: expected float64, got ", clock.scalar_type());
  TORCH_CHECK_VALUE((clock.dim() == 1 || clock.dim() == 2) && clock.sym_size(-1) == 6,
                    "clock: expected shape (6,) or (E, 6), got ", clock.sym_sizes());
  TORCH_CHECK_VALUE(clock.device() == device, "clock: expected device ", device, ", got ", clock.device());
  if (schedule.class_order) {
    TORCH_CHECK_VALUE(schedule.class_order->scalar_type() == at::kLong && schedule.class_order->dim() == 1 &&
                          schedule.class_order->sym_size(0) == classes &&
                          schedule.class_order->device() == device,
                      "class_order: expected int64 of shape (", classes, ",) on ", device, ", got ",
                      schedule.class_order->sym_sizes());
  }
  if (schedule.table) {
    const at::Tensor& table = *schedule.table;
    const bool fits = table.scalar_type() == at::kDouble && table.dim() == clock.dim() + 1 &&
                      table.sym_size(-1) == classes && table.sym_size(-2) > 0 &&
                      (clock.dim() == 1 || table.sym_size(0) == clock.sym_size(0));
    TORCH_CHECK_VALUE(fits && table.device() == device, "oscillation: expected a table of float64 (S, ",
                      classes, ") or (E, S, ", classes, ") on ", device, ", got ", table.scalar_type(), " ",
                      table.sym_sizes(), " on ", table.device());
  }
  if (schedule.step_tensor) {
    const at::Tensor& step = *schedule.step_tensor;
    TORCH_CHECK_TYPE(step.scalar_type() == at::kLong, "step: expected an int64 tensor, got ",
                     step.scalar_type());
    TORCH_CHECK_VALUE(step.device() == device, "step: expected a tensor on ", device, ", got ",
                      step.device());
    const bool per_member = step.dim() == 1 && clock.dim() == 2 && step.sym_size(0) == clock.sym_size(0);
    TORCH_CHECK_VALUE(step.dim() == 0 || per_member, "step: expected shape ()",
                      clock.dim() == 2 ? " or one step per member of the ensemble" : "", ", got ",
                      step.sym_sizes());
  }
}

namespace {

void check_weight(const at::Tensor& weight, const c10::SymInt& classes, const at::Tensor& clock,
                  const at::Device& device) {
  TORCH_CHECK_TYPE(is_supported(weight.scalar_type()),
                   "weight: expected float32, float64, float16 or bfloat16, got ", weight.scalar_type());
  TORCH_CHECK_VALUE(weight.device() == device, "weight: expected device ", device,
                    ", that of the logits, got ", weight.device());
  const bool ensemble = is_ensemble(clock);
  const bool own = ensemble && weight.dim() == 2 && weight.sym_size(0) == clock.sym_size(0);
  TORCH_CHECK_VALUE((weight.dim() == 1 || own) && weight.sym_size(-1) == classes, "weight: expected shape (",
                    classes, ",)", ensemble ? " or a row per member of the ensemble" : "", ", got ",
                    weight.sym_sizes());
}

}  // namespace

void check_forward(const ForwardArguments& x) {
  TORCH_CHECK_VALUE(x.reduction >= reduction_none && x.reduction <= reduction_sum,
                    "reduction: expected 0 (none), 1 (mean) or 2 (sum), got ", x.reduction);
  TORCH_CHECK_VALUE(x.label_smoothing >= 0 && x.label_smoothing <= 1,
                    "label_smoothing: expected a number in [0, 1], got ", x.label_smoothing);
  const bool ensemble = x.ensemble();
  check_logits_and_target(x.logits, x.target, ensemble ? x.clock.sym_size(0) : c10::SymInt(1), ensemble);
  const c10::SymInt classes = num_classes(x.logits, ensemble);
  check_schedule(x.schedule(), classes, x.logits.device());
  if (x.weight) check_weight(*x.weight, classes, x.clock, x.logits.device());
}

void check_derivative(const DerivativeArguments& x) {
  const auto& [directions, grad_output, logits, target, weights, normalizer, ignore_index, smoothing] = x;
  const bool ensemble = x.ensemble();
  const c10::SymInt members = ensemble ? weights.sym_size(0) : c10::SymInt(1);
  check_logits_and_target(logits, target, members, ensemble);
  const c10::SymInt classes = num_classes(logits, ensemble);
  TORCH_CHECK_VALUE(weights.scalar_type() == at::kDouble && weights.sym_size(-1) == classes &&
                        weights.device() == logits.device(),
                    "weights: expected float64 with ", classes, " classes on ", logits.device(), ", got ",
                    weights.sym_sizes());
  TORCH_CHECK_VALUE(normalizer.scalar_type() == at::kDouble && normalizer.dim() == weights.dim() &&
                        normalizer.sym_size(-1) == 2 && normalizer.device() == logits.device(),
                    "normalizer: expected float64 with two columns on ", logits.device(), ", got ",
                    normalizer.sym_sizes());
  const auto reduced = reduced_sizes(weights);
  const auto samples = sample_sizes(logits, target, ensemble);
  const auto sizes = grad_output.sym_sizes();
  TORCH_CHECK_VALUE(sizes.equals(reduced) || sizes.equals(samples),
                    "grad_output: expected the shape of the loss, ", c10::SymIntArrayRef(reduced), " or ",
                    c10::SymIntArrayRef(samples), ", got ", sizes);
  TORCH_CHECK_TYPE(grad_output.is_floating_point(), "grad_output: expected a floating-point tensor, got ",
                   grad_output.scalar_type());
  TORCH_CHECK_VALUE(grad_output.device() == logits.device(), "grad_output: expected device ", logits.device(),
                    ", got ", grad_output.device());
  for (const at::Tensor& direction : directions)
    check_direction(directions.size() == 2 && &direction == &directions[0] ? "u" : "v", direction, logits);
}

void check_weights_arguments(const at::Tensor& steps, const ScheduleArguments& schedule,
                             const c10::SymInt& classes) {
  TORCH_CHECK_VALUE(steps.dim() == 1 && steps.scalar_type() == at::kLong,
                    "steps: expected int64 of shape (S,), got ", steps.scalar_type(), " of shape ",
                    steps.sym_sizes());
  check_schedule(schedule, classes, steps.device());
}

void check_labels(const at::Tensor& labels, int64_t classes, int64_t ignore_index) {
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const int64_t count = labels.numel();
  bool bad = false;
  for (int64_t i = 0; i < count; ++i)
    bad |= static_cast<uint64_t>(label[i]) >= static_cast<uint64_t>(classes) && label[i] != ignore_index;
  if (!bad) return;
  for (int64_t i = 0; i < count; ++i)
    TORCH_CHECK_INDEX((label[i] >= 0 && label[i] < classes) || label[i] == ignore_index,
                      "target: expected class indices from 0 to ", classes - 1, ", got ", label[i],
                      " at position ", i);
}

}  // namespace dynloss
