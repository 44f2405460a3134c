#include "flat_parameters.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <utility>

namespace dynloss {

FlatParameters::FlatParameters(std::vector<at::Tensor> parameters) : parameters_(std::move(parameters)) {
  TORCH_CHECK_VALUE(!parameters_.empty(), "params: expected at least one, got none");
  for (const at::Tensor& parameter : parameters_) {
    snapshots_.push_back({static_cast<uint32_t>(parameter._version()), parameter.const_data_ptr()});
    offsets_.push_back(size_);
    size_ += parameter.numel();
  }
}

void FlatParameters::check_unchanged() const {
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const bool same = static_cast<uint32_t>(parameters_[i]._version()) == snapshots_[i].version &&
                      parameters_[i].const_data_ptr() == snapshots_[i].data;
    TORCH_CHECK(same, "params[", i,
                "]: expected the values that this operator recorded, got a tensor of shape ",
                parameters_[i].sizes(),
                " that was changed in place, so that products would mix two states: "
                "compute the loss again and build a new operator");
  }
}

std::vector<at::Tensor> FlatParameters::parts(const at::Tensor& v,
                                              const std::vector<size_t>& parameters) const {
  const at::AutoDispatchBelowADInplaceOrView below;
  std::vector<at::Tensor> parts;
  parts.reserve(parameters.size());
  for (const size_t i : parameters) {
    parts.push_back(v.narrow(0, offsets_[i], parameters_[i].numel()).view(parameters_[i].sizes()));
  }
  return parts;
}

at::Tensor FlatParameters::join(std::vector<at::Tensor> parts) const {
  const at::AutoDispatchBelowADInplaceOrView below;  // products are not differentiated again
  for (size_t i = 0; i < parts.size(); ++i) {
    parts[i] = parts[i].defined() ? parts[i].reshape({-1}) : at::zeros({parameters_[i].numel()}, options());
  }
  return at::cat(parts);
}

}  // namespace dynloss
