#include "layout.h"

namespace dynloss {

Storage storage_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Storage::float32;
    case at::kDouble:
      return Storage::float64;
    case at::kHalf:
      return Storage::float16;
    default:
      return Storage::bfloat16;
  }
}

std::optional<int64_t> joint_stride(const at::Tensor& x, int64_t first, int64_t class_dim, int64_t single) {
  std::optional<int64_t> stride;
  int64_t expected = 0;
  for (int64_t d = x.dim() - 1; d >= first; --d) {
    if (d == class_dim || x.size(d) == 1) continue;
    if (!stride)
      stride = x.stride(d);
    else if (x.stride(d) != expected)
      return std::nullopt;
    expected = x.stride(d) * x.size(d);
  }
  return stride ? stride : single;
}

at::Tensor rows_copy(const at::Tensor& x, bool ensemble) {
  if (ensemble || x.dim() <= 2) return x.clone(at::MemoryFormat::Contiguous);
  return x.movedim(1, -1).clone(at::MemoryFormat::Contiguous).movedim(-1, 1);
}

ResultSizes::ResultSizes(const ForwardArguments& x) {
  if (x.ensemble()) loss = weights = normalizer = {x.clock.size(0)};
  weights.push_back(x.logits.size(class_dim(x.logits.dim(), x.ensemble())));
  normalizer.push_back(2);
  if (x.reduction != reduction_none) return;
  loss = x.ensemble() ? at::DimVector{x.logits.size(0), x.logits.size(1)} : at::DimVector(x.target.sizes());
}

namespace {

OptionalTensor contiguous(const OptionalTensor& x) { return x ? OptionalTensor(x->contiguous()) : x; }

}  // namespace

ScheduleData::ScheduleData(const ScheduleArguments& x, int64_t classes)
    : clock_(x.clock.contiguous()),
      steps_(contiguous(x.step_tensor)),
      order_(contiguous(x.class_order)),
      table_(contiguous(x.table)),
      classes_(classes) {}

Schedule ScheduleData::of_member(int64_t member) const {
  const double* own_table = table() == nullptr ? nullptr : table() + member * table_rows() * classes_;
  return {clock() + member, class_order(), own_table, table_rows(), classes_};
}

}  // namespace dynloss
