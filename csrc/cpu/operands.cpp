#include "cpu/operands.h"

#include <ATen/EmptyTensor.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>

#include "layout.h"

namespace dynloss::cpu {

namespace {

std::optional<Operand> as_rows(const at::Tensor& x, bool ensemble) {
  if (x.numel() == 0) return Operand{x.data_ptr(), 0, 0, 1};  // contiguous() keeps its strides
  const int64_t dim = class_dim(x.dim(), ensemble);
  if (x.stride(dim) != 1 && x.size(dim) != 1) return std::nullopt;
  const auto row_stride = joint_stride(x, ensemble ? 1 : 0, dim, x.size(dim));
  if (!row_stride) return std::nullopt;
  return Operand{x.data_ptr(), ensemble ? x.stride(0) : 0, *row_stride, 1};
}

std::optional<Operand> as_planes(const at::Tensor& x, bool ensemble) {
  if (ensemble || x.dim() < 2 || x.size(1) > max_plane_classes) return std::nullopt;
  if (x.dim() == 2) {
    if (x.stride(0) != 1) return std::nullopt;
    return Operand{x.data_ptr(), 0, 1, x.stride(1)};
  }
  if (joint_stride(x, 2, 1, 1) != 1) return std::nullopt;
  return Operand{x.data_ptr(), x.stride(0), 1, x.stride(1)};
}

Layout layout_of(const at::Tensor& logits, bool ensemble, bool planes) {
  const int64_t classes = logits.size(class_dim(logits.dim(), ensemble));
  const int64_t samples = logits.numel() / std::max<int64_t>(classes, 1);
  int64_t blocks = 1;
  if (ensemble)
    blocks = logits.size(0);
  else if (planes && logits.dim() > 2)
    blocks = logits.size(0);
  return {planes, blocks, blocks == 0 ? 0 : samples / blocks, classes};
}

// A fresh tensor of many megabytes spends more time in page faults than in arithmetic; large pages make them
// rare.
void advise_huge_pages(const at::Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const auto begin = (reinterpret_cast<uintptr_t>(fresh.data_ptr()) + page - 1) & ~(page - 1);
  const auto end = (reinterpret_cast<uintptr_t>(fresh.data_ptr()) + fresh.nbytes()) & ~(page - 1);
  if (end > begin + page) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

at::Tensor new_tensor(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_cpu(sizes, dtype);
}

at::Tensor new_gradient(const at::Tensor& logits) {
  at::Tensor gradient =
      logits.is_non_overlapping_and_dense()
          ? at::Tensor(at::detail::empty_strided_cpu(logits.sizes(), logits.strides(), logits.scalar_type()))
          : new_tensor(logits.sizes(), logits.scalar_type());
  advise_huge_pages(gradient);
  return gradient;
}

Operands::Operands(const at::Tensor& logits, bool ensemble) : ensemble_(ensemble) {
  planes_ = !as_rows(logits, ensemble) && as_planes(logits, ensemble);
  this->logits = input(logits);
  layout = layout_of(logits, ensemble, planes_);
}

Operand Operands::input(const at::Tensor& x) {
  if (const auto operand = view(x)) return *operand;
  copies_.push_back(rearranged(x));
  return *view(copies_.back());
}

Operand Operands::output(const at::Tensor& out) {
  if (const auto operand = view(out)) return *operand;
  destination_ = out;
  return input(out);
}

void Operands::finish() {
  if (destination_.defined()) destination_.copy_(copies_.back());
}

std::optional<Operand> Operands::view(const at::Tensor& x) const {
  return planes_ ? as_planes(x, ensemble_) : as_rows(x, ensemble_);
}

at::Tensor Operands::rearranged(const at::Tensor& x) const {
  if (!planes_) return rows_copy(x, ensemble_);
  return x.dim() == 2 ? x.t().contiguous().t() : x.contiguous();
}

}  // namespace dynloss::cpu
