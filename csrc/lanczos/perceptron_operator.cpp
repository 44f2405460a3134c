#include "perceptron_operator.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/randint.h>

#include <utility>

#include "row_algebra.h"

namespace dynloss {

namespace {

using OptionalTensor = std::optional<at::Tensor>;
using ProductSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t,
                                    int64_t, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                                    const at::Tensor&);

at::Tensor row(const at::Tensor& x, int64_t dim_of_all, int64_t index) {
  return x.dim() == dim_of_all ? x.select(0, index) : x;
}

// No fake tensor, nor one that a transform or a subclass wraps.
bool is_plain_cpu(const at::Tensor& x) {
  return x.key_set().has(at::DispatchKey::CPU) && x.has_storage() &&
         !x.key_set().has(at::DispatchKey::Python);
}

// Each number times 1 + ε or 1 - ε.
at::Tensor rounded_at_random(const at::Tensor& x, const at::Generator& generator) {
  const at::Tensor signs = at::randint(2, x.sizes(), generator, at::kChar).mul_(2).sub_(1);
  return x.addcmul(x, signs.to(x.options()), rounding_of(x.options()));
}

}  // namespace

Perceptrons Perceptrons::member(int64_t index) const {
  OptionalTensor own_table = table;
  if (own_table) own_table = row(*own_table, 3, index);
  return {parameters.narrow(0, index, 1),
          row(inputs, 3, index),
          row(target, 2, index),
          hidden,
          activation,
          step,
          row(clock, 2, index),
          class_order,
          own_table};
}

PerceptronOperator::PerceptronOperator(Perceptrons member) : member_(std::move(member)) {
  const auto& [parameters, inputs, target, hidden, activation, step, clock, class_order, table] = member_;
  if (is_plain_cpu(parameters) && is_plain_cpu(inputs) && is_plain_cpu(target))
    product_ = cpu::PerceptronProduct::of(
        {parameters, inputs, target, hidden, activation, step, clock, class_order, table});
}

at::Tensor PerceptronOperator::apply(const at::Tensor& v) {
  if (product_ && is_plain_cpu(v)) return product_->multiply(v.contiguous());
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("dynloss::perceptron_hvp", "").typed<ProductSignature>();
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto& [parameters, inputs, target, hidden, activation, step, clock, class_order, table] = member_;
  return op
      .call(parameters, inputs, target, hidden, activation, step, clock, class_order, table, v.unsqueeze(0))
      .squeeze(0);
}

at::Tensor PerceptronOperator::apply_noisily(const at::Tensor& v) {
  const at::Generator generator = at::detail::createCPUGenerator(0);
  return rounded_at_random(apply(rounded_at_random(v, generator)), generator);
}

std::vector<EigshResult> perceptron_eigenvalues(const Perceptrons& ensemble, const std::vector<bool>& wanted,
                                                const EigshOptions& options, const at::Tensor& start,
                                                int64_t begin, int64_t end) {
  std::vector<EigshResult> results(end - begin);
  const auto solve = [&](int64_t first, int64_t last) {
    const at::AutoDispatchBelowADInplaceOrView below;
    for (int64_t m = first; m < last; ++m) {
      if (!wanted[m]) continue;
      PerceptronOperator op(ensemble.member(m));
      results[m - begin] = eigsh(op, options, start.defined() ? start.select(0, m) : at::Tensor());
    }
  };
  if (ensemble.parameters.is_cpu())
    at::parallel_for(begin, end, 1, solve);
  else
    solve(begin, end);  // the device's own threads are enough
  return results;
}

}  // namespace dynloss
