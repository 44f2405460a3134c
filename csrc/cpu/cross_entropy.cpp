// The cross-entropy ops on CPU: targets are checked and counted, Γ(step) is evaluated, and the rows are
// shared out over threads in chunks that depend on the shape alone, so that the result has the same bits for
// every number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/instruction_set.h"
#include "cpu/operands.h"
#include "cpu/oscillation.h"
#include "layout.h"
#include "ops.h"

#ifndef INTRA_OP_PARALLEL
#error "at::parallel_for would be a loop: compile with -fopenmp, as torch was"
#endif

namespace dynloss::cpu {

namespace {

constexpr int64_t elements_per_chunk = 8192;
constexpr int64_t elements_worth_a_thread = 32768;

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

struct Results {
  at::Tensor loss, gradient, weights, normalizer;
};

// The class weights and the divisors of each member; returns whether any row is ignored.
bool resolve(const ForwardArguments& x, Gradient gradient, const at::Tensor& labels, int64_t classes,
             const Results& results) {
  const ScheduleData schedule(x.schedule(), classes);
  check_class_order(schedule, classes);
  const int64_t members = x.ensemble() ? x.clock.size(0) : 1;
  const bool own_labels = x.ensemble() && x.target.dim() == 2;
  const int64_t samples = own_labels ? x.target.size(1) : labels.numel();
  const int64_t step = x.step.expect_int(), ignore_index = x.ignore_index.expect_int();
  const at::Tensor weight = x.weight ? x.weight->to(at::kDouble).contiguous() : at::Tensor();
  double* weights = results.weights.mutable_data_ptr<double>();
  double* normalizer = results.normalizer.mutable_data_ptr<double>();
  // float16 could not hold the gradient of a mean until a loss scale has been applied.
  const bool postpone = gradient == Gradient::into_logits && x.logits.scalar_type() == at::kHalf;
  int64_t counted = 0, ignored = 0;
  for (int64_t e = 0; e < members; ++e, weights += classes, normalizer += 2) {
    const int64_t first = own_labels ? e * samples : 0;
    if (e == 0 || own_labels) {
      counted = counted_labels(labels, first, samples, classes, ignore_index);
      ignored += samples - counted;
    }
    const int64_t offset = schedule.steps() == nullptr ? 0 : schedule.steps()[e * schedule.step_stride()];
    const double* own_weight =
        x.weight ? weight.const_data_ptr<double>() + (weight.dim() == 2 ? e * classes : 0) : nullptr;
    if (classes > 0) write_weights(schedule.of_member(e), step + offset, own_weight, weights);
    double divisor = 1.0;
    if (x.reduction == reduction_mean)
      divisor = x.by_weights ? sum_of_label_weights(labels.const_data_ptr<int64_t>() + first, samples,
                                                    ignore_index, weights)
                             : static_cast<double>(counted);
    normalizer[0] = divisor;
    normalizer[1] = postpone ? 1.0 : divisor;
  }
  return ignored > 0;
}

Results forward(const ForwardArguments& x, Gradient gradient) {
  check_forward(x);
  Operands operands(x.logits, x.ensemble());
  const at::Tensor labels = as_labels(x.target);
  const ResultSizes sizes(x);
  Results results;
  results.weights = new_tensor(sizes.weights, at::kDouble);
  results.normalizer = new_tensor(sizes.normalizer, at::kDouble);
  const bool any_ignored = resolve(x, gradient, labels, operands.layout.classes, results);
  const double* normalizer = results.normalizer.const_data_ptr<double>();

  Run run = new_run(gradient == Gradient::none ? Kind::loss : Kind::loss_and_gradient, operands, x.logits,
                    labels, results.weights, x.ignore_index.expect_int(), any_ignored, x.label_smoothing);
  if (gradient != Gradient::none) {
    results.gradient = gradient == Gradient::into_logits ? x.logits : new_gradient(x.logits);
    run.block.out = operands.output(results.gradient);
    run.block.into_logits = run.block.out.data == run.block.logits.data;
    for (int64_t index = 0; index < run.layout.blocks; ++index)
      run.scale[index] = 1.0 / normalizer[x.ensemble() ? 2 * index + 1 : 1];
  }
  results.loss = new_tensor(sizes.loss, loss_dtype(x.logits, x.reduction));
  if (x.reduction == reduction_none) {
    // Empty tensors have no rows to write.
    run.row_loss = static_cast<char*>(results.loss.data_ptr());
    run();
  } else {
    write_loss(results.loss, run(), normalizer);
  }
  operands.finish();
  return results;
}

ops::Loss cross_entropy(const ForwardArguments& x) {
  const Results results = forward(x, Gradient::none);
  return {results.loss, results.weights, results.normalizer};
}

// The gradient of a mean is always divided by what the loss is: labels are counted first.
ops::LossAndGradient cross_entropy_with_gradient(const ForwardArguments& x, bool) {
  const Results results = forward(x, Gradient::fresh);
  return {results.loss, results.gradient, results.weights, results.normalizer};
}

ops::Loss cross_entropy_into_logits(const ForwardArguments& x) {
  const Results results = forward(x, Gradient::into_logits);
  return {results.loss, results.weights, results.normalizer};
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

at::Tensor cross_entropy_derivative(const DerivativeArguments& x) {
  check_derivative(x);
  const bool ensemble = x.ensemble();
  constexpr Kind kinds[] = {Kind::gradient, Kind::hessian, Kind::third};
  const size_t along = x.directions.size();
  const int64_t ignore_index = x.ignore_index.expect_int();
  Operands operands(x.logits, ensemble);
  const at::Tensor labels = as_labels(x.target), gamma = x.weights.contiguous(),
                   divisors = x.normalizer.contiguous();
  const bool any_ignored =
      counted_labels(labels, 0, labels.numel(), operands.layout.classes, ignore_index) < labels.numel();
  Run run =
      new_run(kinds[along], operands, x.logits, labels, gamma, ignore_index, any_ignored, x.label_smoothing);
  if (along >= 1) run.block.v = operands.input(x.directions[along - 1]);
  if (along == 2) run.block.u = operands.input(x.directions[0]);
  at::Tensor out = new_gradient(x.logits);
  run.block.out = operands.output(out);

  const bool per_row = x.grad_output.dim() > (ensemble ? 1 : 0);
  const auto arithmetic = x.logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor scale = x.grad_output.to(per_row ? arithmetic : at::kDouble).contiguous();
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

}  // namespace

TORCH_LIBRARY_IMPL(dynloss, CPU, library) {
  library.impl("cross_entropy", &forward_kernel<&cross_entropy>);
  library.impl("cross_entropy_with_gradient",
               &forward_kernel<&cross_entropy_with_gradient, const at::Tensor&, bool>);
  library.impl("cross_entropy_into_logits", &forward_kernel<&cross_entropy_into_logits, at::Tensor&>);
  library.impl("rescale_", &rescale_);
  library.impl("cross_entropy_derivative", &derivative_kernel<&cross_entropy_derivative>);
}

}  // namespace dynloss::cpu
