#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace dynloss {

// Parameters seen as one flat vector, at the values they had when this was made.
class FlatParameters {
 public:
  explicit FlatParameters(std::vector<at::Tensor> parameters);

  const std::vector<at::Tensor>& tensors() const { return parameters_; }
  int64_t size() const { return size_; }
  at::TensorOptions options() const { return parameters_.front().options(); }

  // Throws where a parameter was changed in place, or given other storage, since then.
  void check_unchanged() const;

  // The parts of a flat vector that belong to the given parameters, in their shapes.
  std::vector<at::Tensor> parts(const at::Tensor& v, const std::vector<size_t>& parameters) const;

  // One flat vector from a tensor per parameter; undefined ones count as zeros.
  at::Tensor join(std::vector<at::Tensor> parts) const;

 private:
  struct Snapshot {
    uint32_t version;
    const void* data;
  };

  std::vector<at::Tensor> parameters_;
  std::vector<Snapshot> snapshots_;
  std::vector<int64_t> offsets_;
  int64_t size_ = 0;
};

}  // namespace dynloss
