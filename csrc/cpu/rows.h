// The cross-entropy kernels for one instruction set, included under the conditions of target.h.

namespace dynloss::cpu::INSTRUCTION_SET {

template <Kind K>
constexpr bool has_output_v = K != Kind::loss;
template <Kind K>
constexpr bool has_loss_v = K == Kind::loss || K == Kind::loss_and_gradient;
template <Kind K>
constexpr bool has_v_v = K == Kind::hessian || K == Kind::third;

#include "vector.h"
//
#include "small_rows.h"
//
#include "long_rows.h"

LabelCount count_labels(const int64_t* labels, int64_t rows, int64_t num_classes, int64_t ignore_index) {
  const auto is_class = [=](auto label)
                            DYNLOSS_ALWAYS_INLINE_LAMBDA { return (label >= 0) & (label < num_classes); };
  Mask<double> counted{}, valid = ~Mask<double>{};
  int64_t i = 0;
  for (; i + width<double> <= rows; i += width<double>) {
    Mask<double> label;
    std::memcpy(&label, labels + i, sizeof(label));
    const Mask<double> counts = label != ignore_index;
    counted -= counts;
    valid &= is_class(label) | ~counts;
  }
  LabelCount result{0, true};
  for (int lane = 0; lane < width<double>; ++lane) {
    result.counted += counted[lane];
    result.valid &= valid[lane] != 0;
  }
  for (; i < rows; ++i) {
    const bool counts = labels[i] != ignore_index;
    result.counted += counts;
    result.valid &= is_class(labels[i]) | !counts;
  }
  return result;
}

// ---- dispatch over kind, storage and shape

template <typename T, typename S, Kind K>
double run_kind(const Block& block, int64_t begin, int64_t end) {
  const bool planes = block.logits.class_stride != 1;
  if (!planes && block.num_classes > max_tile_classes) return run_long_rows<T, S, K>(block, begin, end);
  // What training runs most, at the numbers of classes of the paper.
  constexpr bool frequent =
      (K == Kind::loss_and_gradient || K == Kind::hessian) && !std::is_same_v<S, Half> && VECTOR_BYTES > 16;
  if constexpr (frequent)
    if (!planes) {
      if (block.num_classes == 3) return run_small_rows<T, S, K, 3>(block, begin, end);
      if (block.num_classes == 10) return run_small_rows<T, S, K, 10>(block, begin, end);
    }
  return run_small_rows<T, S, K, 0>(block, begin, end);
}

template <typename T, typename S>
double run_storage(const Block& block, int64_t begin, int64_t end) {
  switch (block.kind) {
    case Kind::loss:
      return run_kind<T, S, Kind::loss>(block, begin, end);
    case Kind::loss_and_gradient:
      return run_kind<T, S, Kind::loss_and_gradient>(block, begin, end);
    case Kind::gradient:
      return run_kind<T, S, Kind::gradient>(block, begin, end);
    case Kind::hessian:
      return run_kind<T, S, Kind::hessian>(block, begin, end);
    default:
      return run_kind<T, S, Kind::third>(block, begin, end);
  }
}

double run_rows(const Block& block, int64_t begin, int64_t end) {
  switch (block.storage) {
    case Storage::float32:
      return run_storage<float, float>(block, begin, end);
    case Storage::float64:
      return run_storage<double, double>(block, begin, end);
    case Storage::float16:
      return run_storage<float, Half>(block, begin, end);
    default:
      return run_storage<float, BFloat16>(block, begin, end);
  }
}

}  // namespace dynloss::cpu::INSTRUCTION_SET
