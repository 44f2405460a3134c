// Tensors as the CUDA kernels walk them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "cuda/cross_entropy.h"
#include "layout.h"

namespace dynloss::cuda {

// A tensor shaped like the logits, to be read or written: itself, or a copy where the kernels cannot walk it.
class Rows {
 public:
  Rows(const at::Tensor& x, bool ensemble);

  const Operand& operand() const { return operand_; }
  // The tensor, with what was written to its copy.
  at::Tensor finish() const;

 private:
  at::Tensor tensor_, walked_;
  Operand operand_;
};

// grad_output, whose elements belong to members or to rows.
struct Factors {
  at::Tensor tensor;
  int64_t member_stride = 0;
  int64_t row_stride = 0;

  Factors(const at::Tensor& x, bool ensemble);
  const void* data() const { return tensor.const_data_ptr(); }
  Storage storage() const { return storage_of(tensor.scalar_type()); }
};

// The fields of Problem, but for `out`; target is contiguous.
void describe(Problem& problem, const at::Tensor& logits, const Rows& rows, const at::Tensor& target,
              bool ensemble, int64_t ignore_index, double label_smoothing);

}  // namespace dynloss::cuda
