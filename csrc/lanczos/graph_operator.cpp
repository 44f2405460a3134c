#include "graph_operator.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd.h>

#include <utility>

namespace dynloss {

GraphOperator::GraphOperator(std::vector<at::Tensor> gradients, std::vector<at::Tensor> parameters)
    : parameters_(std::move(parameters)) {
  TORCH_CHECK_VALUE(!parameters_.empty() && gradients.size() == parameters_.size(),
                    "expected one gradient per parameter, got ", gradients.size(), " for ",
                    parameters_.size());
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const at::Tensor& parameter = parameters_[i];
    snapshots_.push_back({static_cast<uint32_t>(parameter._version()), parameter.const_data_ptr()});
    offsets_.push_back(size_);
    size_ += parameter.numel();
    if (gradients[i].defined() && gradients[i].requires_grad()) {
      outputs_.push_back(gradients[i]);
      output_parameters_.push_back(i);
    }
  }
}

void GraphOperator::check_unchanged() const {
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const bool same = static_cast<uint32_t>(parameters_[i]._version()) == snapshots_[i].version &&
                      parameters_[i].const_data_ptr() == snapshots_[i].data;
    TORCH_CHECK(
        same, "parameter ", i, " of shape ", parameters_[i].sizes(),
        " was changed in place after the loss of this HessianOperator was computed; its products would "
        "mix two states. Compute the loss again and build a new HessianOperator.");
  }
}

at::Tensor GraphOperator::apply(const at::Tensor& v) {
  check_unchanged();
  if (outputs_.empty()) return at::zeros({size_}, v.options());  // the loss is linear in the parameters
  std::vector<at::Tensor> seeds;
  seeds.reserve(outputs_.size());
  for (const size_t i : output_parameters_) {
    seeds.push_back(v.narrow(0, offsets_[i], parameters_[i].numel()).view(parameters_[i].sizes()));
  }
  auto pieces = torch::autograd::grad(outputs_, parameters_, seeds, /*retain_graph=*/true,
                                      /*create_graph=*/false, /*allow_unused=*/true);
  for (size_t i = 0; i < pieces.size(); ++i) {
    pieces[i] =
        pieces[i].defined() ? pieces[i].reshape({-1}) : at::zeros({parameters_[i].numel()}, v.options());
  }
  return at::cat(pieces);
}

}  // namespace dynloss
