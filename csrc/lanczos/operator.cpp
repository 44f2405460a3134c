#include "operator.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>

namespace dynloss {

at::Tensor random_normal(const SymmetricOperator& op, const at::Generator& generator) {
  if (op.shards())
    return op.shards()->normal(at::check_generator<at::CPUGeneratorImpl>(generator)->random64());
  return at::randn({op.size()}, generator, op.options().device(at::kCPU)).to(op.options());
}

at::Tensor random_signs(const SymmetricOperator& op, const at::Generator& generator) {
  if (op.shards()) return op.shards()->signs(generator);
  // One byte each until they are on the device.
  const at::Tensor signs = at::randint(2, {op.size()}, generator, at::kChar).mul_(2).sub_(1);
  return signs.to(op.options().device()).to(op.options());
}

}  // namespace dynloss
