// The cross-entropy ops on CPU: targets are checked and counted, Γ(step) is evaluated, and the rows are
// shared out over threads in chunks that depend on the shape alone, so that the result has the same bits for
// every number of threads.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "core/oscillation.h"
#include "cpu/instruction_set.h"
#include "cpu/kernel.h"

#ifndef INTRA_OP_PARALLEL
#error "at::parallel_for would be a loop: compile with -fopenmp, as torch was"
#endif

namespace dynloss::cpu {

namespace {

using Optional = std::optional<at::Tensor>;

constexpr int64_t elements_per_chunk = 8192;
constexpr int64_t elements_worth_a_thread = 32768;

// Without the detour through the dispatcher, which takes as long as a small loss.
at::Tensor new_tensor(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_cpu(sizes, dtype);
}

// ---- Γ(step)

const int64_t* order_data(const Optional& class_order) {
  return class_order ? class_order->const_data_ptr<int64_t>() : nullptr;
}

void check_class_order(const Optional& class_order, int64_t classes) {
  if (!class_order) return;
  const int64_t* order = order_data(class_order);
  for (int64_t i = 0; i < classes; ++i)
    TORCH_CHECK_INDEX(order[i] >= 0 && order[i] < classes, "class_order: class ", order[i], " at position ",
                      i, " is out of range for ", classes, " classes");
}

Schedule member_schedule(const at::Tensor& clock, const Optional& class_order, const Optional& table,
                         int64_t member, int64_t classes) {
  const auto* clocks = reinterpret_cast<const Clock*>(clock.const_data_ptr<double>());
  const int64_t rows = table ? table->size(-2) : 0;
  const double* first = table ? table->const_data_ptr<double>() + member * rows * classes : nullptr;
  return {clocks + member, order_data(class_order), first, rows, classes};
}

void write_weights(const Schedule& schedule, int64_t step, double* out) {
  const ClassWeights weights = weights_at(schedule, step);
  for (int64_t c = 0; c < schedule.num_classes; ++c) out[c] = weights[c];
}

at::Tensor oscillation_weights(const at::Tensor& steps, const at::Tensor& clock, const Optional& class_order,
                               const Optional& table, int64_t classes) {
  TORCH_CHECK_VALUE(steps.dim() == 1 && steps.scalar_type() == at::kLong,
                    "steps: expected int64 of shape (S,), got ", steps.scalar_type(), " of shape ",
                    steps.sizes());
  check_schedule({clock, std::nullopt, class_order, table}, classes, steps.device());
  check_class_order(class_order, classes);
  const int64_t members = is_ensemble(clock) ? clock.size(0) : 1;
  std::vector<int64_t> sizes = {steps.size(0)};
  if (is_ensemble(clock)) sizes.push_back(members);
  sizes.push_back(classes);
  const at::Tensor weights = new_tensor(sizes, at::kDouble);
  const at::Tensor clocks = clock.contiguous(), step_list = steps.contiguous();
  const Optional tables = table ? Optional(table->contiguous()) : table;
  const Optional order = class_order ? Optional(class_order->contiguous()) : class_order;
  double* out = weights.mutable_data_ptr<double>();
  for (int64_t s = 0; s < steps.size(0); ++s)
    for (int64_t e = 0; e < members; ++e, out += classes)
      write_weights(member_schedule(clocks, order, tables, e, classes),
                    step_list.const_data_ptr<int64_t>()[s], out);
  return weights;
}

// ---- tensors as blocks of rows

// How logits lie in memory: `planes` where the rows of a block are neighbours, else each row is contiguous.
struct Layout {
  bool planes;
  int64_t blocks;
  int64_t rows;
  int64_t classes;
};

// The stride that walks dimensions [first, dim) of x, without the class dimension, as one; none if there is
// none, `single` where there is but one step.
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

std::optional<Operand> as_rows(const at::Tensor& x, bool ensemble) {
  if (x.numel() == 0) return Operand{x.data_ptr(), 0, 0, 1};  // contiguous() keeps its strides
  const int64_t class_dim = ensemble ? 2 : (x.dim() == 1 ? 0 : 1);
  if (x.stride(class_dim) != 1 && x.size(class_dim) != 1) return std::nullopt;
  const auto row_stride = joint_stride(x, ensemble ? 1 : 0, class_dim, x.size(class_dim));
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
  const int64_t classes = logits.size(ensemble ? 2 : (logits.dim() == 1 ? 0 : 1));
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

// Shaped like the logits, and with their strides where these leave no gaps.
at::Tensor new_gradient(const at::Tensor& logits) {
  at::Tensor gradient =
      logits.is_non_overlapping_and_dense()
          ? at::Tensor(at::detail::empty_strided_cpu(logits.sizes(), logits.strides(), logits.scalar_type()))
          : new_tensor(logits.sizes(), logits.scalar_type());
  advise_huge_pages(gradient);
  return gradient;
}

// The operands of one call in a common layout, that of the logits. Those that do not fit are copied; a result
// that does not is written to a copy, which finish() copies back.
class Operands {
 public:
  Operands(const at::Tensor& logits, bool ensemble) : ensemble_(ensemble) {
    planes_ = !as_rows(logits, ensemble) && as_planes(logits, ensemble);
    this->logits = input(logits);
    layout = layout_of(logits, ensemble, planes_);
  }

  Operand input(const at::Tensor& x) {
    if (const auto operand = view(x)) return *operand;
    copies_.push_back(rearranged(x));
    return *view(copies_.back());
  }

  Operand output(const at::Tensor& out) {
    if (const auto operand = view(out)) return *operand;
    destination_ = out;
    return input(out);
  }

  void finish() {
    if (destination_.defined()) destination_.copy_(copies_.back());
  }

  Operand logits;
  Layout layout;

 private:
  std::optional<Operand> view(const at::Tensor& x) const {
    return planes_ ? as_planes(x, ensemble_) : as_rows(x, ensemble_);
  }

  at::Tensor rearranged(const at::Tensor& x) const {
    if (planes_) return x.dim() == 2 ? x.t().contiguous().t() : x.contiguous();
    return ensemble_ || x.dim() <= 2 ? x.contiguous() : x.movedim(1, -1).contiguous().movedim(-1, 1);
  }

  bool ensemble_, planes_;
  std::vector<at::Tensor> copies_;
  at::Tensor destination_;
};

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

// ---- targets

at::Tensor as_labels(const at::Tensor& target) {
  return target.scalar_type() == at::kLong ? target.contiguous() : target.to(at::kLong).contiguous();
}

// The labels of block `index`; an ensemble may share them.
const int64_t* block_labels(const at::Tensor& labels, const Layout& layout, int64_t index) {
  const bool shared = layout.blocks > 1 && labels.numel() == layout.rows && layout.rows > 0;
  return labels.const_data_ptr<int64_t>() + (shared ? 0 : index * layout.rows);
}

// How many of labels [first, first + rows) count; all of those must be classes.
int64_t counted_labels(const at::Tensor& labels, int64_t first, int64_t rows, int64_t classes,
                       int64_t ignore_index) {
  const LabelCount count =
      selected_kernels().count_labels(labels.const_data_ptr<int64_t>() + first, rows, classes, ignore_index);
  if (!count.valid) check_labels(labels, classes, ignore_index);  // says which
  return count.counted;
}

double sum_of_label_weights(const int64_t* labels, int64_t rows, int64_t ignore_index,
                            const double* weights) {
  double sum = 0;
  for (int64_t i = 0; i < rows; ++i) sum += labels[i] == ignore_index ? 0.0 : weights[labels[i]];
  return sum;
}

// ---- running the rows

// One value per block, mostly a single one.
template <typename T>
using Few = c10::SmallVector<T, 4>;

// All blocks of a call; Γ, the sum of Γ and the scale may differ from block to block.
struct Run {
  Layout layout;
  Block block;  // what the blocks have in common
  Few<const int64_t*> labels;
  Few<const double*> weights;
  Few<double> scale;
  char* row_loss = nullptr;
  const char* row_scale = nullptr;
  int64_t item_size = 0;       // of row_loss
  int64_t row_scale_size = 0;  // of row_scale

  // The sum of the losses of each block.
  Few<double> operator()() const {
    const RunRows run_rows = selected_kernels().run_rows;
    const int64_t classes = std::max<int64_t>(layout.classes, 1);
    // A multiple of every vector's width, so that only the last chunk of a block has a partial vector.
    const int64_t rows_per_chunk = std::max<int64_t>(64, elements_per_chunk / classes / 64 * 64);
    const int64_t long_row_chunk = std::max<int64_t>(1, elements_per_chunk / classes);
    const int64_t chunk = classes <= max_tile_classes || layout.planes ? rows_per_chunk : long_row_chunk;
    const int64_t chunks = (layout.rows + chunk - 1) / chunk;
    c10::SmallVector<double, 64> partial(layout.blocks * chunks);
    const int64_t grain = std::max<int64_t>(1, elements_worth_a_thread / (chunk * classes));
    const Few<double> weight_sums = sums_of_weights();
    at::parallel_for(0, layout.blocks * chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t index = i / chunks, first = i % chunks * chunk;
        partial[i] = run_rows(at(index, weight_sums), first, std::min(first + chunk, layout.rows));
      }
    });
    Few<double> sums(layout.blocks, 0.0);
    for (int64_t i = 0; i < layout.blocks * chunks; ++i) sums[i / chunks] += partial[i];
    return sums;
  }

 private:
  Few<double> sums_of_weights() const {
    Few<double> sums(layout.blocks, 0.0);
    if (block.label_smoothing == 0) return sums;
    for (int64_t index = 0; index < layout.blocks; ++index) {
      if (index > 0 && weights[index] == weights[index - 1]) {
        sums[index] = sums[index - 1];
        continue;
      }
      for (int64_t c = 0; c < layout.classes; ++c) sums[index] += weights[index][c];
    }
    return sums;
  }

  Block at(int64_t index, const Few<double>& weight_sums) const {
    Block result = block;
    const auto advance = [&](Operand& operand, int64_t size) {
      if (operand.data != nullptr)
        operand.data = static_cast<char*>(operand.data) + index * operand.block_stride * size;
    };
    for (Operand* operand : {&result.logits, &result.u, &result.v, &result.out}) advance(*operand, item_size);
    result.labels = labels[index];
    result.weights = weights[index];
    result.weights_sum = weight_sums[index];
    result.scale = scale[index];
    if (row_loss != nullptr) result.row_loss = row_loss + index * layout.rows * item_size;
    if (row_scale != nullptr) result.row_scale = row_scale + index * layout.rows * row_scale_size;
    return result;
  }
};

Run new_run(Kind kind, const Operands& operands, const at::Tensor& logits, const at::Tensor& labels,
            const at::Tensor& weights, int64_t ignore_index, bool any_ignored, double label_smoothing) {
  Run run;
  run.layout = operands.layout;
  run.item_size = logits.element_size();
  run.block = {};
  run.block.kind = kind;
  run.block.storage = storage_of(logits.scalar_type());
  run.block.num_classes = operands.layout.classes;
  run.block.logits = operands.logits;
  run.block.ignore_index = ignore_index;
  run.block.any_ignored = any_ignored;
  run.block.label_smoothing = label_smoothing;
  const bool ensemble = is_ensemble(weights);
  for (int64_t index = 0; index < run.layout.blocks; ++index) {
    run.labels.push_back(block_labels(labels, run.layout, index));
    run.weights.push_back(weights.const_data_ptr<double>() + (ensemble ? index * run.layout.classes : 0));
  }
  run.scale.assign(run.layout.blocks, 1.0);
  return run;
}

void write_loss(const at::Tensor& loss, const Few<double>& block_sums, const double* normalizer) {
  const int64_t members = loss.numel();
  for (int64_t e = 0; e < members; ++e) {
    double sum = 0;
    if (members > 1 || loss.dim() == 1)
      sum = block_sums[e];
    else
      for (const double block_sum : block_sums) sum += block_sum;
    const double value = sum / normalizer[2 * e];
    if (loss.scalar_type() == at::kDouble)
      loss.mutable_data_ptr<double>()[e] = value;
    else
      loss.mutable_data_ptr<float>()[e] = static_cast<float>(value);
  }
}

// ---- the ops

struct Forward {
  at::Tensor loss, gradient, weights, normalizer;
};

// Where the gradient goes.
enum class Gradient { none, fresh, into_logits };

Forward forward(Gradient gradient, const at::Tensor& logits, const at::Tensor& target, int64_t step,
                const Optional& step_tensor, const at::Tensor& clock, const Optional& class_order,
                const Optional& table, int64_t reduction, bool by_weights, int64_t ignore_index,
                double label_smoothing) {
  const bool ensemble = is_ensemble(clock);
  const int64_t members = ensemble ? clock.size(0) : 1;
  check_options(reduction, label_smoothing);
  check_logits_and_target(logits, target, members, ensemble);
  Operands operands(logits, ensemble);
  const int64_t classes = operands.layout.classes;
  check_schedule({clock, step_tensor, class_order, table}, classes, logits.device());
  check_class_order(class_order, classes);
  const at::Tensor labels = as_labels(target);

  Forward result;
  result.weights =
      ensemble ? new_tensor({members, classes}, at::kDouble) : new_tensor({classes}, at::kDouble);
  result.normalizer = ensemble ? new_tensor({members, 2}, at::kDouble) : new_tensor({2}, at::kDouble);
  double* weights = result.weights.mutable_data_ptr<double>();
  double* normalizer = result.normalizer.mutable_data_ptr<double>();
  const at::Tensor clocks = clock.contiguous();
  const Optional tables = table ? Optional(table->contiguous()) : table;
  const Optional order = class_order ? Optional(class_order->contiguous()) : class_order;
  const Optional steps = step_tensor ? Optional(step_tensor->contiguous()) : step_tensor;
  const bool own_labels = ensemble && target.dim() == 2;
  const int64_t samples = own_labels ? target.size(1) : labels.numel();
  int64_t counted = 0, ignored = 0;
  for (int64_t e = 0; e < members; ++e) {
    const int64_t first = own_labels ? e * samples : 0;
    if (e == 0 || own_labels) {
      counted = counted_labels(labels, first, samples, classes, ignore_index);
      ignored += samples - counted;
    }
    const int64_t offset = steps ? steps->const_data_ptr<int64_t>()[steps->dim() == 1 ? e : 0] : 0;
    double* own_weights = weights + e * classes;
    if (classes > 0)
      write_weights(member_schedule(clocks, order, tables, e, classes), step + offset, own_weights);
    double divisor = 1.0;
    if (reduction == reduction_mean)
      divisor = by_weights ? sum_of_label_weights(labels.const_data_ptr<int64_t>() + first, samples,
                                                  ignore_index, own_weights)
                           : static_cast<double>(counted);
    normalizer[2 * e] = divisor;
    // float16 could not hold the gradient of a mean until a loss scale has been applied.
    const bool postpone = gradient == Gradient::into_logits && logits.scalar_type() == at::kHalf;
    normalizer[2 * e + 1] = postpone ? 1.0 : divisor;
  }

  Run run = new_run(gradient == Gradient::none ? Kind::loss : Kind::loss_and_gradient, operands, logits,
                    labels, result.weights, ignore_index, ignored > 0, label_smoothing);
  if (gradient != Gradient::none) {
    result.gradient = gradient == Gradient::into_logits ? logits : new_gradient(logits);
    run.block.out = operands.output(result.gradient);
    run.block.into_logits = run.block.out.data == run.block.logits.data;
    for (int64_t index = 0; index < run.layout.blocks; ++index)
      run.scale[index] = 1.0 / normalizer[ensemble ? 2 * index + 1 : 1];
  }
  const at::ScalarType dtype = loss_dtype(logits, reduction);
  if (reduction == reduction_none) {
    const auto sizes = ensemble ? at::DimVector{members, logits.size(1)} : at::DimVector(target.sizes());
    result.loss = new_tensor(sizes, dtype);
    // Empty tensors have no rows to write.
    run.row_loss = static_cast<char*>(result.loss.data_ptr());
    run();
  } else {
    result.loss = ensemble ? new_tensor({members}, dtype) : new_tensor({}, dtype);
    write_loss(result.loss, run(), normalizer);
  }
  operands.finish();
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy(
    const at::Tensor& logits, const at::Tensor& target, int64_t step, const Optional& step_tensor,
    const at::Tensor& clock, const Optional& class_order, const Optional& table, int64_t reduction,
    bool by_weights, int64_t ignore_index, double label_smoothing) {
  Forward result = forward(Gradient::none, logits, target, step, step_tensor, clock, class_order, table,
                           reduction, by_weights, ignore_index, label_smoothing);
  return {result.loss, result.weights, result.normalizer};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> cross_entropy_with_gradient(
    const at::Tensor& logits, const at::Tensor& target, int64_t step, const Optional& step_tensor,
    const at::Tensor& clock, const Optional& class_order, const Optional& table, int64_t reduction,
    bool by_weights, int64_t ignore_index, double label_smoothing, bool) {
  Forward result = forward(Gradient::fresh, logits, target, step, step_tensor, clock, class_order, table,
                           reduction, by_weights, ignore_index, label_smoothing);
  return {result.loss, result.gradient, result.weights, result.normalizer};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_into_logits(
    at::Tensor& logits, const at::Tensor& target, int64_t step, const Optional& step_tensor,
    const at::Tensor& clock, const Optional& class_order, const Optional& table, int64_t reduction,
    bool by_weights, int64_t ignore_index, double label_smoothing) {
  Forward result = forward(Gradient::into_logits, logits, target, step, step_tensor, clock, class_order,
                           table, reduction, by_weights, ignore_index, label_smoothing);
  return {result.loss, result.weights, result.normalizer};
}

void rescale_(at::Tensor& gradient, const at::Tensor& grad_output, const at::Tensor& normalizer) {
  const bool ensemble = grad_output.dim() == 1;
  const at::Tensor factors = grad_output.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true).contiguous();
  const at::Tensor divisors = normalizer.contiguous();
  double* factor = factors.mutable_data_ptr<double>();
  const double* divisor = divisors.const_data_ptr<double>();
  bool untouched = true;
  for (int64_t e = 0; e < factors.numel(); ++e) {
    // A mean over nothing has a gradient of 0, whatever it is divided by.
    if (divisor[2 * e] != 0) factor[e] *= divisor[2 * e + 1] / divisor[2 * e];
    untouched &= factor[e] == 1.0;
  }
  if (untouched) return;
  // By tensors without dimensions: a Scalar would be rounded to the gradient's type, and a tensor with
  // dimensions would make a float32 copy of a half gradient.
  if (!ensemble) gradient.mul_(factors);
  for (int64_t e = 0; ensemble && e < factors.numel(); ++e) gradient.select(0, e).mul_(factors.select(0, e));
}

at::Tensor derivative(Kind kind, const at::Tensor* u, const at::Tensor* v, const at::Tensor& grad_output,
                      const at::Tensor& logits, const at::Tensor& target, const at::Tensor& weights,
                      const at::Tensor& normalizer, int64_t ignore_index, double label_smoothing) {
  check_derivative(grad_output, logits, target, weights, normalizer);
  const bool ensemble = is_ensemble(weights);
  Operands operands(logits, ensemble);
  const at::Tensor labels = as_labels(target), gamma = weights.contiguous(),
                   divisors = normalizer.contiguous();
  const bool any_ignored =
      counted_labels(labels, 0, labels.numel(), operands.layout.classes, ignore_index) < labels.numel();
  Run run = new_run(kind, operands, logits, labels, gamma, ignore_index, any_ignored, label_smoothing);
  if (u != nullptr) check_direction("u", *u, logits), run.block.u = operands.input(*u);
  if (v != nullptr) check_direction("v", *v, logits), run.block.v = operands.input(*v);
  at::Tensor out = new_gradient(logits);
  run.block.out = operands.output(out);

  const bool per_row = grad_output.dim() > (ensemble ? 1 : 0);
  const auto arithmetic = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor scale = grad_output.to(per_row ? arithmetic : at::kDouble).contiguous();
  for (int64_t index = 0; index < run.layout.blocks; ++index) {
    const int64_t e = ensemble ? index : 0;
    run.scale[index] = 1.0 / divisors.const_data_ptr<double>()[2 * e];
    if (!per_row) run.scale[index] *= scale.const_data_ptr<double>()[e];
  }
  if (per_row) {
    run.row_scale = static_cast<const char*>(scale.const_data_ptr());
    run.row_scale_size = scale.element_size();
  }
  run();
  operands.finish();
  return out;
}

at::Tensor cross_entropy_gradient(const at::Tensor& grad_output, const at::Tensor& logits,
                                  const at::Tensor& target, const at::Tensor& weights,
                                  const at::Tensor& normalizer, int64_t ignore_index,
                                  double label_smoothing) {
  return derivative(Kind::gradient, nullptr, nullptr, grad_output, logits, target, weights, normalizer,
                    ignore_index, label_smoothing);
}

at::Tensor cross_entropy_hessian(const at::Tensor& v, const at::Tensor& grad_output, const at::Tensor& logits,
                                 const at::Tensor& target, const at::Tensor& weights,
                                 const at::Tensor& normalizer, int64_t ignore_index, double label_smoothing) {
  return derivative(Kind::hessian, nullptr, &v, grad_output, logits, target, weights, normalizer,
                    ignore_index, label_smoothing);
}

at::Tensor cross_entropy_third(const at::Tensor& u, const at::Tensor& v, const at::Tensor& grad_output,
                               const at::Tensor& logits, const at::Tensor& target, const at::Tensor& weights,
                               const at::Tensor& normalizer, int64_t ignore_index, double label_smoothing) {
  return derivative(Kind::third, &u, &v, grad_output, logits, target, weights, normalizer, ignore_index,
                    label_smoothing);
}

}  // namespace

TORCH_LIBRARY_IMPL(dynloss, CPU, library) {
  library.impl("oscillation_weights", &oscillation_weights);
  library.impl("cross_entropy", &cross_entropy);
  library.impl("cross_entropy_with_gradient", &cross_entropy_with_gradient);
  library.impl("cross_entropy_into_logits", &cross_entropy_into_logits);
  library.impl("rescale_", &rescale_);
  library.impl("cross_entropy_gradient", &cross_entropy_gradient);
  library.impl("cross_entropy_hessian", &cross_entropy_hessian);
  library.impl("cross_entropy_third", &cross_entropy_third);
}

}  // namespace dynloss::cpu
