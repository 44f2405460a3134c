// The perceptron ops on CPU: members are shared out over threads, each by itself, so that results have the
// same bits for every number of threads and of members.
#include "cpu/perceptron.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <tuple>
#include <utility>

#include "cpu/instruction_set.h"
#include "cpu/operands.h"
#include "cpu/oscillation.h"

namespace dynloss::cpu {

namespace {

// Of a block's planes: half of the second cache of the machines of today, as there may be two.
constexpr int64_t block_bytes = 262144;

int64_t rounded_up(int64_t x, int64_t quantum) { return (x + quantum - 1) / quantum * quantum; }

// How many samples are processed at a time: all of them, or equal parts.
template <typename T>
int64_t block_of(const PerceptronShape& shape, int64_t padded) {
  constexpr int64_t size = sizeof(T);
  const int64_t planes =
      has_few_planes(shape) ? std::max<int64_t>(16, shape.hidden / (8 * size)) : shape.hidden;
  const int64_t most = std::max<int64_t>(4, block_bytes / size / planes / plane_quantum<T>);
  const int64_t quanta = padded / plane_quantum<T>;
  const int64_t blocks = (quanta + most - 1) / most;
  return (quanta + blocks - 1) / blocks * plane_quantum<T>;
}

}  // namespace

template <typename T>
T* Plane<T>::allocate(int64_t size) {
  void* data = std::aligned_alloc(64, std::max<int64_t>(64, rounded_up(size * sizeof(T), 64)));
  if (data == nullptr) throw std::bad_alloc();
  return static_cast<T*>(data);
}

template <>
const PerceptronKernels<float>& perceptron_kernels<float>() {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::avx512) return avx512_perceptron_f32;
  if (instruction_set() == InstructionSet::avx2) return avx2_perceptron_f32;
#endif
  return default_perceptron_f32;
}

template <>
const PerceptronKernels<double>& perceptron_kernels<double>() {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::avx512) return avx512_perceptron_f64;
  if (instruction_set() == InstructionSet::avx2) return avx2_perceptron_f64;
#endif
  return default_perceptron_f64;
}

template <typename T>
PerceptronBench<T>::PerceptronBench(const PerceptronArguments& x, const ScheduleData& schedule, bool along)
    : x_(x), schedule_(schedule), member_{} {
  const PerceptronShape shape = x.shape();
  member_.shape = shape;
  member_.padded = rounded_up(shape.samples, plane_quantum<T>);
  member_.block = block_of<T>(shape, member_.padded);
  const int64_t block = member_.block;
  inputs_ = Plane<T>(shape.inputs * member_.padded);
  logits_ = Plane<T>(shape.classes * block);
  if (along) logits_along_ = Plane<T>(shape.classes * block);
  if (has_few_planes(shape)) {
    const int64_t outputs = shape.classes - 1;
    const int64_t moments = rounded_up(shape.hidden, plane_quantum<T>) * (shape.inputs + 1) * outputs;
    active_ = Plane<uint8_t>(shape.hidden * block / 8);
    outputs_ = Plane<T>((shape.hidden + 1) * outputs);
    moments_ = Plane<T>(moments);
    if (along) {
      outputs_along_ = Plane<T>((shape.hidden + 1) * outputs);
      moments_along_ = Plane<T>(moments);
      softmax_ = Plane<T>((shape.classes + 2) * block);
    }
  } else {
    hidden_ = Plane<T>(shape.hidden * block);
    tile_ = Plane<T>(perceptron_tile_planes * block);
    if (along) hidden_along_ = Plane<T>(shape.hidden * block);
  }
  labels_.assign(member_.padded, no_label);
  gamma_.resize(shape.classes);
  member_.inputs = inputs_.get();
  member_.labels = labels_.data();
  member_.gamma = gamma_.data();
  member_.softmax = softmax_.get();
  member_.active = active_.get();
  member_.outputs = outputs_.get();
  member_.outputs_along = outputs_along_.get();
  member_.moments = moments_.get();
  member_.moments_along = moments_along_.get();
  member_.hidden = hidden_.get();
  member_.hidden_along = hidden_along_.get();
  member_.logits = logits_.get();
  member_.logits_along = logits_along_.get();
  member_.tile = tile_.get();
}

template <typename T>
void PerceptronBench<T>::take(int64_t index) {
  if (index_ < 0 || x_.own_inputs()) {
    const at::Tensor from = x_.own_inputs() ? x_.inputs.select(0, index) : x_.inputs;
    const T* data = static_cast<const T*>(from.const_data_ptr());
    const int64_t samples = member_.shape.samples, row = from.stride(0), column = from.stride(1);
    for (int64_t d = 0; d < member_.shape.inputs; ++d) {
      T* plane = inputs_.get() + d * member_.padded;
      for (int64_t n = 0; n < samples; ++n) plane[n] = data[n * row + d * column];
      std::fill(plane + samples, plane + member_.padded, T(0));
    }
  }
  if (index_ < 0 || x_.own_target()) {
    const at::Tensor from = x_.own_target() ? x_.target.select(0, index) : x_.target;
    const int64_t* data = from.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < member_.shape.samples; ++n) labels_[n] = data[n * from.stride(0)];
  }
  index_ = index;
  set_parameters(static_cast<const T*>(x_.parameters.const_data_ptr()) + index * x_.parameters.size(1));
  set_step(x_.step);
}

template <typename T>
void PerceptronBench<T>::set_step(int64_t step) {
  write_weights(schedule_.of_member(is_ensemble(x_.clock) ? index_ : 0), step, /*weight=*/nullptr,
                gamma_.data());
  member_.prepared = false;
}

template <typename T>
PerceptronSums PerceptronBench<T>::evaluate(T* gradient) const {
  if (gradient != nullptr) std::fill(gradient, gradient + member_.shape.size(), T(0));
  PerceptronSums sums;
  perceptron_kernels<T>().evaluate(member_, &sums, gradient);
  const auto samples = static_cast<double>(member_.shape.samples);
  return {sums.weighted_loss / samples, sums.loss / samples, sums.correct / samples};
}

template <typename T>
void PerceptronBench<T>::gradient(T* gradient) const {
  std::fill(gradient, gradient + member_.shape.size(), T(0));
  perceptron_kernels<T>().evaluate(member_, nullptr, gradient);
}

template <typename T>
void PerceptronBench<T>::multiply(const T* v, T* product) {
  std::fill(product, product + member_.shape.size(), T(0));
  perceptron_kernels<T>().multiply(member_, v, product);
  member_.prepared = member_.block == member_.padded;
}

template class PerceptronBench<float>;
template class PerceptronBench<double>;

namespace {

// f(T{}) with the type of the elements.
template <typename F>
void with_type(const at::Tensor& x, F&& f) {
  if (x.scalar_type() == at::kDouble)
    f(double{});
  else
    f(float{});
}

ScheduleData checked_schedule(const PerceptronArguments& x) {
  ScheduleData schedule(x.schedule(), x.shape().classes);
  check_class_order(schedule, x.shape().classes);
  check_labels(x.target.contiguous(), x.shape().classes, no_label - 1);
  return schedule;
}

// f(bench, member) for every member, each thread with a bench of its own.
template <typename T, typename F>
void for_members(const PerceptronArguments& x, bool along, F&& f) {
  const ScheduleData schedule = checked_schedule(x);
  at::parallel_for(0, x.members(), 1, [&](int64_t begin, int64_t end) {
    PerceptronBench<T> bench(x, schedule, along);
    for (int64_t m = begin; m < end; ++m) {
      bench.take(m);
      f(bench, m);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> perceptron_gradient(const PerceptronArguments& x) {
  check_perceptron(x);
  const at::Tensor loss = new_tensor({x.members()}, at::kDouble);
  const at::Tensor gradient = new_tensor(x.parameters.sizes(), x.parameters.scalar_type());
  with_type(x.parameters, [&](auto zero) {
    using T = decltype(zero);
    T* out = static_cast<T*>(gradient.data_ptr());
    double* losses = loss.mutable_data_ptr<double>();
    for_members<T>(x, false, [&](const PerceptronBench<T>& bench, int64_t m) {
      losses[m] = bench.evaluate(out + m * bench.shape().size()).weighted_loss;
    });
  });
  return {loss, gradient};
}

at::Tensor perceptron_hvp(const PerceptronArguments& x, const at::Tensor& v) {
  check_perceptron(x);
  check_perceptron_direction(x, v);
  const at::Tensor product = new_tensor(x.parameters.sizes(), x.parameters.scalar_type());
  const at::Tensor directions = v.contiguous();
  with_type(x.parameters, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(directions.const_data_ptr());
    T* out = static_cast<T*>(product.data_ptr());
    for_members<T>(x, true, [&](PerceptronBench<T>& bench, int64_t m) {
      bench.multiply(from + m * bench.shape().size(), out + m * bench.shape().size());
    });
  });
  return product;
}

template <typename T>
class ProductOf final : public PerceptronProduct {
 public:
  explicit ProductOf(const PerceptronArguments& x)
      : parameters_(x.parameters),
        inputs_(x.inputs),
        target_(x.target),
        clock_(x.clock),
        class_order_(x.class_order),
        table_(x.table),
        x_{parameters_, inputs_, target_, x.hidden, x.activation, x.step, clock_, class_order_, table_},
        schedule_(checked_schedule(x_)),
        bench_(x_, schedule_, /*along=*/true) {
    bench_.take(0);
  }

  at::Tensor multiply(const at::Tensor& v) override {
    if (v.scalar_type() != parameters_.scalar_type() || v.dim() != 1 || v.size(0) != bench_.shape().size())
      check_perceptron_direction(x_, v.unsqueeze(0));  // raises
    at::Tensor product = new_tensor({bench_.shape().size()}, parameters_.scalar_type());
    const std::lock_guard<std::mutex> alone(mutex_);
    bench_.multiply(static_cast<const T*>(v.const_data_ptr()), static_cast<T*>(product.data_ptr()));
    return product;
  }

 private:
  const at::Tensor parameters_, inputs_, target_, clock_;
  const OptionalTensor class_order_, table_;
  const PerceptronArguments x_;  // of these
  const ScheduleData schedule_;
  PerceptronBench<T> bench_;
  std::mutex mutex_;
};

// The parameters of one member, and where the next ones are written.
template <typename T>
struct Descent {
  T *parameters, *velocity;  // velocity: null without momentum

  void copy_from(const Descent& other, int64_t size) const {
    std::memcpy(parameters, other.parameters, size * sizeof(T));
    if (velocity != nullptr) std::memcpy(velocity, other.velocity, size * sizeof(T));
  }
};

at::Tensor perceptron_train_(const PerceptronArguments& x, const DescentArguments& descent) {
  check_perceptron(x);
  check_descent(x, descent);
  const RecordedSteps recorded(x.step, descent.num_steps, descent.record_every);
  const at::Tensor records = new_tensor({recorded.count, x.members(), 3}, at::kDouble);
  const at::Tensor rates = descent.learning_rate.contiguous();
  const at::Tensor momenta = descent.momentum ? descent.momentum->contiguous() : at::Tensor();
  double* record = static_cast<double*>(records.data_ptr());
  bool* finite = static_cast<bool*>(descent.finite.data_ptr());
  std::fill(record, record + records.numel(), std::numeric_limits<double>::quiet_NaN());
  with_type(x.parameters, [&](auto zero) {
    using T = decltype(zero);
    for_members<T>(x, false, [&](PerceptronBench<T>& bench, int64_t m) {
      if (!finite[m]) return;
      const int64_t size = bench.shape().size();
      const auto own_row = [&](const at::Tensor& all) { return static_cast<T*>(all.data_ptr()) + m * size; };
      const bool with_momentum = descent.velocity.has_value();
      const T rate = static_cast<T>(rates.const_data_ptr<double>()[m]);
      const T momentum = with_momentum ? static_cast<T>(momenta.const_data_ptr<double>()[m]) : T(0);
      const Descent<T> own{own_row(x.parameters), with_momentum ? own_row(*descent.velocity) : nullptr};
      const int64_t padded = rounded_up(size, plane_quantum<T>);
      const int64_t planes = with_momentum ? 5 : 3;
      const Plane<T> memory(planes * padded);
      std::fill(memory.get(), memory.get() + planes * padded, T(0));
      T* const spare = with_momentum ? memory.get() + 3 * padded : nullptr;
      Descent<T> now{memory.get(), spare},
          next{now.parameters + padded, with_momentum ? spare + padded : nullptr};
      T* const gradient = memory.get() + 2 * padded;
      now.copy_from(own, size);
      const auto measure = [&](int64_t update, T* into) {
        const PerceptronSums means = bench.evaluate(into);
        double* row = record + (recorded.row(update) * x.members() + m) * 3;
        row[0] = means.weighted_loss;
        row[1] = means.loss;
        row[2] = means.correct;
      };
      const int64_t end = x.step + descent.num_steps;
      for (int64_t step = x.step; step < end && finite[m]; ++step) {
        bench.set_step(step);
        bench.set_parameters(now.parameters);
        // The last update's row is measured on the way; that of the last one of all below.
        if (step > x.step && recorded.contains(step - 1))
          measure(step - 1, gradient);
        else
          bench.gradient(gradient);
        finite[m] = perceptron_kernels<T>().descend(padded, rate, momentum, now.parameters, gradient,
                                                    now.velocity, next.parameters, next.velocity);
        if (finite[m]) std::swap(now, next);
      }
      if (finite[m] && recorded.contains(end - 1)) {
        bench.set_step(end);
        bench.set_parameters(now.parameters);
        measure(end - 1, nullptr);
      }
      own.copy_from(now, size);
    });
  });
  return records;
}

}  // namespace

std::unique_ptr<PerceptronProduct> PerceptronProduct::of(const PerceptronArguments& x) {
  check_perceptron(x);
  if (x.parameters.scalar_type() == at::kDouble) return std::make_unique<ProductOf<double>>(x);
  return std::make_unique<ProductOf<float>>(x);
}

TORCH_LIBRARY_IMPL(dynloss, CPU, library) {
  library.impl("perceptron_gradient", &perceptron_kernel<&perceptron_gradient>);
  library.impl("perceptron_hvp", &perceptron_kernel<&perceptron_hvp, const at::Tensor&, const at::Tensor&>);
  library.impl("perceptron_train_", &descent_kernel<&perceptron_train_>);
}

}  // namespace dynloss::cpu
