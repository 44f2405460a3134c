// Tensors as the CPU kernels walk them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/kernel.h"

namespace dynloss::cpu {

// How logits lie in memory: `planes` where the rows of a block are neighbours, else each row is contiguous.
struct Layout {
  bool planes;
  int64_t blocks;
  int64_t rows;
  int64_t classes;
};

// The operands of one call in a common layout, that of the logits. Those that do not fit are copied; a result
// that does not is written to a copy, which finish() copies back.
class Operands {
 public:
  Operands(const at::Tensor& logits, bool ensemble);

  Operand input(const at::Tensor& x);
  Operand output(const at::Tensor& out);
  void finish();

  Operand logits;
  Layout layout;

 private:
  std::optional<Operand> view(const at::Tensor& x) const;
  at::Tensor rearranged(const at::Tensor& x) const;

  bool ensemble_, planes_;
  std::vector<at::Tensor> copies_;
  at::Tensor destination_;
};

// Without the detour through the dispatcher, which takes as long as a small loss.
at::Tensor new_tensor(at::IntArrayRef sizes, at::ScalarType dtype);

// Shaped like the logits, and with their strides where these leave no gaps.
at::Tensor new_gradient(const at::Tensor& logits);

}  // namespace dynloss::cpu
