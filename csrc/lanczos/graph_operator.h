#pragma once

#include <cstdint>
#include <vector>

#include "operator.h"

namespace dynloss {

// The Hessian behind a recorded first backward pass: H v is one more backward pass through the graph of the
// gradients (Pearlmutter 1994), which is kept, so that no forward pass and no Python runs per product.
class GraphOperator final : public SymmetricOperator {
 public:
  // gradients[i] is d loss / d parameters[i], computed with create_graph; undefined where the loss does not
  // depend on parameters[i].
  GraphOperator(std::vector<at::Tensor> gradients, std::vector<at::Tensor> parameters);

  int64_t size() const override { return size_; }
  at::TensorOptions options() const override { return parameters_.front().options(); }
  at::Tensor apply(const at::Tensor& v) override;

 private:
  // What a parameter was when its gradient was recorded.
  struct Snapshot {
    uint32_t version;
    const void* data;
  };

  void check_unchanged() const;

  std::vector<at::Tensor> parameters_;
  std::vector<Snapshot> snapshots_;
  std::vector<int64_t> offsets_;           // of each parameter in the flat vector
  std::vector<at::Tensor> outputs_;        // the gradients that depend on the parameters
  std::vector<size_t> output_parameters_;  // and which parameters they belong to
  int64_t size_ = 0;
};

}  // namespace dynloss
