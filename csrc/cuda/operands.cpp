#include "cuda/operands.h"

#include <algorithm>

namespace dynloss::cuda {

namespace {

Label label_of(at::ScalarType dtype) {
  return dtype == at::kLong ? Label::int64 : dtype == at::kInt ? Label::int32 : Label::uint8;
}

std::optional<Operand> as_operand(const at::Tensor& x, bool ensemble) {
  const int64_t dim = class_dim(x.dim(), ensemble), classes = x.size(dim);
  Operand operand;
  operand.data = x.data_ptr();
  operand.class_stride = classes <= 1 ? 1 : x.stride(dim);
  if (operand.class_stride != 1 && classes > max_strided_classes) return std::nullopt;
  if (ensemble) {
    operand.member_stride = x.stride(0);
    operand.row_stride = x.stride(1);
  } else if (x.dim() == 2) {
    operand.row_stride = x.stride(0);
  } else if (x.dim() > 2) {
    const auto inner = joint_stride(x, 2, dim, 0);
    if (!inner) return std::nullopt;
    operand.outer_stride = x.stride(0);
    operand.row_stride = *inner;
  }
  return operand;
}

}  // namespace

Rows::Rows(const at::Tensor& x, bool ensemble) : tensor_(x), walked_(x) {
  auto operand = as_operand(x, ensemble);
  if (!operand) {
    walked_ = rows_copy(x, ensemble);
    operand = as_operand(walked_, ensemble);
  }
  operand_ = *operand;
}

at::Tensor Rows::finish() const {
  if (!tensor_.is_same(walked_)) tensor_.copy_(walked_);
  return tensor_;
}

Factors::Factors(const at::Tensor& x, bool ensemble) : tensor(x) {
  if (x.scalar_type() != at::kFloat && x.scalar_type() != at::kDouble && x.scalar_type() != at::kHalf &&
      x.scalar_type() != at::kBFloat16)
    tensor = tensor.to(at::kFloat);
  const int64_t first = ensemble ? 1 : 0;
  if (tensor.dim() > first && !joint_stride(tensor, first, -1, 0)) tensor = tensor.contiguous();
  if (ensemble) member_stride = tensor.stride(0);
  if (tensor.dim() > first) row_stride = *joint_stride(tensor, first, -1, 0);
}

void describe(Problem& problem, const at::Tensor& logits, const Rows& rows, const at::Tensor& target,
              bool ensemble, int64_t ignore_index, double label_smoothing) {
  problem.storage = storage_of(logits.scalar_type());
  problem.label = label_of(target.scalar_type());
  problem.members = ensemble ? logits.size(0) : 1;
  problem.classes = logits.size(class_dim(logits.dim(), ensemble));
  const int64_t own_targets = ensemble && target.dim() == 2 ? problem.members : 1;
  problem.rows = ensemble ? logits.size(1) : target.numel();
  problem.inner_rows = problem.rows;
  if (!ensemble && logits.dim() > 2)
    problem.inner_rows = std::max<int64_t>(problem.rows / std::max<int64_t>(logits.size(0), 1), 1);
  problem.logits = rows.operand();
  problem.target = target.const_data_ptr();
  problem.target_member_stride = own_targets > 1 ? problem.rows : 0;
  problem.ignore_index = ignore_index;
  problem.label_smoothing = label_smoothing;
}

}  // namespace dynloss::cuda
