// The launchers of the perceptron kernels: raw pointers on the current device, no torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/oscillation.h"
#include "core/perceptron.h"

namespace dynloss::cuda {

// What all calls have in common; strides in elements, 0 for what members share.
struct Perceptrons {
  bool is_double;
  int64_t members;
  PerceptronShape shape;
  const void* inputs;
  int64_t inputs_member_stride, inputs_row_stride, inputs_column_stride;
  const int64_t* target;
  int64_t target_member_stride, target_row_stride;
  void* parameters;  // (members, P)
  const Clock* clock;
  int64_t clock_member_stride;
  const int64_t* class_order;  // or null
  const double* table;         // or null
  int64_t table_rows;
  int64_t table_member_stride;
  int64_t step;
  void* workspace;  // (members, workspace_size()), or null where that is 0
};

// The loss and its gradient, or without `loss` the product with v.
struct PerceptronDerivative : Perceptrons {
  const void* v;  // (members, P)
  double* loss;   // (members,)
  void* out;      // (members, P)
};

struct PerceptronDescent : Perceptrons {
  void* velocity;  // (members, P), or null
  bool* finite;    // (members,)
  const double* learning_rate;
  const double* momentum;  // null with velocity
  int64_t num_steps;
  int64_t first_record, record_every;
  double* records;  // (S, members, 3)
};

// Elements of the parameters' type that a member needs in memory beside what fits into its block.
cudaError_t workspace_size(const PerceptronDerivative& problem, int64_t* size);
cudaError_t workspace_size(const PerceptronDescent& problem, int64_t* size);

cudaError_t launch(const PerceptronDerivative& problem, cudaStream_t stream);
cudaError_t launch(const PerceptronDescent& problem, cudaStream_t stream);

}  // namespace dynloss::cuda
