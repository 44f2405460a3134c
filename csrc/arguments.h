// What every backend asks of an op's arguments, and the sizes it reads from them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>

namespace dynloss {

enum Reduction : int64_t { reduction_none = 0, reduction_mean = 1, reduction_sum = 2 };

struct ScheduleArguments {
  const at::Tensor& clock;
  const std::optional<at::Tensor>& step_tensor;
  const std::optional<at::Tensor>& class_order;
  const std::optional<at::Tensor>& table;
};

// An ensemble is told by a leading dimension of its clock, or of its weights.
inline bool is_ensemble(const at::Tensor& clock_or_weights) { return clock_or_weights.dim() == 2; }

// Number of classes, where logits has the dimension for it (checked).
c10::SymInt num_classes(const at::Tensor& logits, bool ensemble);

// () or (E,).
c10::SymDimVector reduced_sizes(const at::Tensor& clock_or_weights);

// The shape of an unreduced loss: target's, or (E, N).
c10::SymDimVector sample_sizes(const at::Tensor& logits, const at::Tensor& target, bool ensemble);

// float32 at least for reduced losses of half types; unreduced losses keep the type of the logits.
at::ScalarType loss_dtype(const at::Tensor& logits, int64_t reduction);

// Raise ValueError or TypeError, naming the argument, what was given and what is expected.
void check_logits_and_target(const at::Tensor& logits, const at::Tensor& target, const c10::SymInt& members,
                             bool ensemble);
void check_schedule(const ScheduleArguments& schedule, const c10::SymInt& classes, const at::Device& device);
void check_options(int64_t reduction, double label_smoothing);
void check_derivative(const at::Tensor& grad_output, const at::Tensor& logits, const at::Tensor& target,
                      const at::Tensor& weights, const at::Tensor& normalizer);
// On CPU, int64 and contiguous; raises IndexError.
void check_labels(const at::Tensor& labels, int64_t classes, int64_t ignore_index);
void check_direction(const char* name, const at::Tensor& direction, const at::Tensor& logits);

}  // namespace dynloss
