// The launchers of the cross-entropy kernels: raw pointers on the current device, no torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/oscillation.h"
#include "core/storage.h"

namespace dynloss::cuda {

enum class Label { int64, int32, uint8 };

// A tensor seen as members of rows of classes, strides in elements. Row r of a member begins at
// (r / inner_rows) · outer_stride + (r % inner_rows) · row_stride.
struct Operand {
  void* data = nullptr;
  int64_t member_stride = 0;
  int64_t outer_stride = 0;
  int64_t row_stride = 0;
  int64_t class_stride = 1;  // other than 1 for at most max_strided_classes
};
constexpr int64_t max_strided_classes = 32;

// What all calls have in common.
struct Problem {
  Storage storage;
  Label label;
  int64_t members;
  int64_t rows;  // of a member
  int64_t inner_rows;
  int64_t classes;
  Operand logits;
  Operand out;         // without data: not wanted; a gradient may take the place of the logits
  const void* target;  // contiguous
  int64_t target_member_stride;
  int64_t ignore_index;
  double label_smoothing;
};

// What happens to the gradient of a mean in the pass that computes it.
enum class Division {
  exact,      // it is divided by what the loss is divided by
  estimated,  // by the number of rows where that is not known in time: rescale mends it
  postponed,  // by nothing: float16 cannot hold it until rescale has applied grad_output, too
};

// The loss, and if `out` is given its gradient.
struct Forward : Problem {
  const Clock* clock;          // per member
  const int64_t* class_order;  // or null
  const double* table;         // per member, or null
  int64_t table_rows;
  int64_t step;
  const int64_t* step_tensor;  // or null; read on the device
  int64_t step_member_stride;
  const void* weight;  // (classes,), multiplies Γ, or null
  Storage weight_storage;
  int64_t weight_member_stride;
  bool mean;
  bool by_weights;
  Division division;
  void* row_loss;      // (members, rows) in the storage type: an unreduced loss; else null
  void* loss;          // (members,) float, or double for float64 storage; else null
  double* weights;     // (members, classes): Γ, times weight
  double* normalizer;  // (members, 2)
  double* partials;    // (members, blocks, 2), if plan_forward() tells of several blocks; else null
  unsigned* arrivals;  // (members,), zero before and after the launch; null where partials is
  double* counts;      // (members, count_blocks), if it tells of any; else null
};

// How a forward launch will be cut up, per member.
struct ForwardPlan {
  int64_t blocks;
  int64_t count_blocks;  // of a launch before it that counts the labels
};

// A derivative of Σ grad_output · loss in the logits.
struct Derivative : Problem {
  int order;  // 1 gradient, 2 Hessian·v, 3 third·u·v
  Operand u, v;
  const double* weights;     // (members, classes) or (classes,)
  const double* normalizer;  // (members, 2)
  const void* grad_output;
  Storage grad_storage;
  int64_t grad_member_stride;
  int64_t grad_row_stride;
};

struct Weights {
  const int64_t* steps;  // (num_steps,)
  int64_t num_steps;
  int64_t members;
  int64_t classes;
  const Clock* clock;
  const int64_t* class_order;
  const double* table;
  int64_t table_rows;
  double* out;  // (num_steps, members, classes)
};

// gradient of (members, size), each member contiguous
struct Rescale {
  Storage storage;
  void* gradient;
  int64_t members;
  int64_t size;
  int64_t member_stride;
  const void* grad_output;
  Storage grad_storage;
  int64_t grad_member_stride;
  const double* normalizer;  // (members, 2)
};

// For a problem that is complete but for partials, arrivals and counts.
cudaError_t plan_forward(const Forward& problem, ForwardPlan* plan);

cudaError_t launch_forward(const Forward& problem, cudaStream_t stream);
cudaError_t launch_derivative(const Derivative& problem, cudaStream_t stream);
cudaError_t launch_weights(const Weights& problem, cudaStream_t stream);
cudaError_t launch_rescale(const Rescale& problem, cudaStream_t stream);

}  // namespace dynloss::cuda
