// What both backends read from the arguments: how elements are stored, how they lie in memory, and where
// results go.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "arguments.h"
#include "core/oscillation.h"
#include "core/storage.h"

namespace dynloss {

// Of a dtype that has been checked.
Storage storage_of(at::ScalarType dtype);

// The stride that walks dimensions [first, dim) of x as one, class_dim left out; none if there is none,
// `single` where there is but one step.
std::optional<int64_t> joint_stride(const at::Tensor& x, int64_t first, int64_t class_dim, int64_t single);

// A copy with the classes last in memory, in the shape of x.
at::Tensor rows_copy(const at::Tensor& x, bool ensemble);

// Where the gradient goes.
enum class Gradient { none, fresh, into_logits };

// The shape of the loss of concrete arguments, and of what comes with it.
struct ResultSizes {
  explicit ResultSizes(const ForwardArguments& x);
  at::DimVector loss, weights, normalizer;
};

// The tensors that describe Γ, contiguous, and the pointers into them.
class ScheduleData {
 public:
  ScheduleData(const ScheduleArguments& x, int64_t classes);

  const Clock* clock() const { return reinterpret_cast<const Clock*>(clock_.const_data_ptr<double>()); }
  const int64_t* class_order() const { return order_ ? order_->const_data_ptr<int64_t>() : nullptr; }
  const double* table() const { return table_ ? table_->const_data_ptr<double>() : nullptr; }
  int64_t table_rows() const { return table_ ? table_->size(-2) : 0; }
  // Added to the step of a member; null if there is none.
  const int64_t* steps() const { return steps_ ? steps_->const_data_ptr<int64_t>() : nullptr; }
  int64_t step_stride() const { return steps_ && steps_->dim() == 1 ? 1 : 0; }

  Schedule of_member(int64_t member) const;

 private:
  at::Tensor clock_;
  OptionalTensor steps_, order_, table_;
  int64_t classes_;
};

}  // namespace dynloss
