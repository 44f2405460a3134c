// The perceptrons of an ensemble, one block each, for any number of steps without the host.
//
// Threads take samples on the way forward, and hidden units, each with a slice of the samples, on the way
// back: so that nothing is added up across threads but the slices' sums. Hidden values are computed again on
// the way back: few inputs make that cheaper than memory. What fits lies in shared memory, the rest in a
// workspace.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/cross_entropy_row.h"
#include "core/oscillation.h"
#include "core/perceptron.h"
#include "cuda/block.cuh"
#include "cuda/perceptron.h"

namespace dynloss::cuda {

namespace {

constexpr int threads = 256;
// Inputs or classes that a thread adds up at a time.
constexpr int group = 4;
// Slices' sums may take so much of the shared memory.
constexpr int64_t max_slice_bytes = 49152;

// Where the parts of a member's memory lie, and how the backward pass is cut up. Sizes in elements; a part
// that is not in the block is in the workspace, or for `parameters` and `inputs` where the arguments have it.
struct PerceptronPlan {
  int64_t slices;
  bool parameters_in_block, sums_in_block, planes_in_block, inputs_in_block;
  int64_t parameters, sums, planes, inputs;
  int64_t block_bytes;
  int64_t workspace;
};

template <Activation A, typename T>
__device__ T activated(T x) {
  if (A == Activation::relu) return x < T(0) ? T(0) : x;  // NaN stays
  return std::tanh(x);
}

// x · act', by the value of the activation.
template <Activation A, typename T>
__device__ T times_slope(T x, T value) {
  if (A == Activation::relu) return value > T(0) ? x : T(0);
  return x - x * value * value;
}

// PerceptronShape in registers of 32 bits.
struct Sizes {
  int samples, inputs, hidden, classes, slices;
  int b1, w2, b2, size;  // as there
};

// A member in its block; kAlong: with a direction v.
template <typename T, Activation A, bool kAlong>
struct Member {
  Sizes sizes;
  const T* inputs;
  int row_stride, column_stride;
  const int64_t* target;
  int target_stride;
  const T* p;  // parameters
  const T* v;  // a direction, or null
  const double* gamma;
  T *logits, *along;  // (C, N): they become gradients
  T* sums;            // (slices, P)

  __device__ T input(int n, int d) const { return inputs[n * row_stride + d * column_stride]; }

  // Of hidden unit h before the activation, by the parameters or the direction.
  __device__ T hidden_input(const T* flat, int n, int h) const {
    T x = flat[sizes.b1 + h];
    for (int d = 0; d < sizes.inputs; ++d) x += input(n, d) * flat[d * sizes.hidden + h];
    return x;
  }

  __device__ void forward(int n) const {
    for (int first = 0; first < sizes.classes; first += group) {
      const int count = sizes.classes - first < group ? sizes.classes - first : group;
      T z[group], y[group];
#pragma unroll
      for (int j = 0; j < group; ++j) {
        z[j] = j < count ? p[sizes.b2 + first + j] : T(0);
        y[j] = j < count && kAlong ? v[sizes.b2 + first + j] : T(0);
      }
      for (int h = 0; h < sizes.hidden; ++h) {
        const T value = activated<A>(hidden_input(p, n, h));
        const T* w = p + sizes.w2 + h * sizes.classes + first;
#pragma unroll
        for (int j = 0; j < group; ++j)
          if (j < count) z[j] += value * w[j];
        if (!kAlong) continue;
        const T change = times_slope<A>(hidden_input(v, n, h), value);
        const T* u = v + sizes.w2 + h * sizes.classes + first;
#pragma unroll
        for (int j = 0; j < group; ++j)
          if (j < count) y[j] += value * u[j] + change * w[j];
      }
#pragma unroll
      for (int j = 0; j < group; ++j) {
        if (j >= count) continue;
        logits[(first + j) * sizes.samples + n] = z[j];
        if (kAlong) along[(first + j) * sizes.samples + n] = y[j];
      }
    }
  }

  // The logits of a sample become their gradient, of the mean over all samples; along the direction, too.
  // Adds to the weighted loss, the plain loss and the number of right answers.
  __device__ void row(int n, double (&measured)[3]) const {
    const int64_t label = target[n * target_stride];
    const int N = sizes.samples;
    T* z = logits + n;
    T* y = along + n;
    T top = z[0];
    int answer = 0;
    for (int c = 1; c < sizes.classes; ++c) {
      if (!(z[c * N] > top)) continue;
      top = z[c * N];
      answer = c;
    }
    RowSum<T> sum{T(0), T(0)};
    T picked = 0;
    for (int c = 0; c < sizes.classes; ++c) {
      const T shifted = z[c * N] - top, e = std::exp(shifted);
      z[c * N] = e;
      if (c == label) {
        picked = shifted;
        sum.label = e;
      } else {
        sum.others += e;
      }
    }
    const bool is_class = label >= 0 && label < sizes.classes;
    const SharedTargetWeights<T> shared(0.0, 0.0, sizes.classes);
    const TargetWeights<T> q = shared.at(is_class ? static_cast<T>(gamma[label]) : T(0));
    const T loss = log_of_sum(sum.rest()) - picked;
    measured[0] += static_cast<double>(q.total * loss);
    measured[1] += static_cast<double>(loss);
    measured[2] += answer == label ? 1.0 : 0.0;
    const RowGradient<T> gradient(static_cast<T>(1.0 / static_cast<double>(N)), q, sum);
    if (kAlong) {
      InnerProducts<T> products;
      products.v_top = y[answer * N];
      for (int c = 0; c < sizes.classes; ++c) products.add(z[c * N], y[c * N]);
      products.divide(sum.all());
      for (int c = 0; c < sizes.classes; ++c)
        y[c * N] = gradient.factor * z[c * N] * products.factor(y[c * N]);
    }
    for (int c = 0; c < sizes.classes; ++c)
      z[c * N] = c == label ? gradient.at_label : gradient.of_softmax(z[c * N]);
  }

  // The sums of hidden unit h over a slice of the samples.
  __device__ void backward(int h, int slice) const {
    const int begin = slice * sizes.samples / sizes.slices, end = (slice + 1) * sizes.samples / sizes.slices;
    const int D = sizes.inputs, H = sizes.hidden, C = sizes.classes, N = sizes.samples;
    const T* from = kAlong ? along : logits;
    T* out = sums + slice * sizes.size;
    const T* w = p + sizes.w2 + h * C;
    const T* u = kAlong ? v + sizes.w2 + h * C : nullptr;
    for (int first = 0; first < (D > C ? D : C); first += group) {
      T of_input[group] = {}, of_class[group] = {}, of_bias = 0;
      for (int n = begin; n < end; ++n) {
        const T value = activated<A>(hidden_input(p, n, h));
        T change = 0, back = 0;
        if (kAlong) change = times_slope<A>(hidden_input(v, n, h), value);
        for (int c = 0; c < C; ++c) back += from[c * N + n] * w[c];
        if (kAlong) {
          T plain = 0;
          for (int c = 0; c < C; ++c) {
            back += logits[c * N + n] * u[c];
            plain += logits[c * N + n] * w[c];
          }
          back = times_slope<A>(back, value);
          if (A == Activation::tanh) back -= T(2) * value * change * plain;
        } else {
          back = times_slope<A>(back, value);
        }
        of_bias += back;
#pragma unroll
        for (int j = 0; j < group; ++j) {
          if (first + j < D) of_input[j] += back * input(n, first + j);
          if (first + j >= C) continue;
          of_class[j] += value * from[(first + j) * N + n];
          if (kAlong) of_class[j] += change * logits[(first + j) * N + n];
        }
      }
#pragma unroll
      for (int j = 0; j < group; ++j) {
        if (first + j < D) out[(first + j) * H + h] = of_input[j];
        if (first + j < C) out[sizes.w2 + h * C + first + j] = of_class[j];
      }
      if (first == 0) out[sizes.b1 + h] = of_bias;
    }
  }

  // Of the bias of a class.
  __device__ void backward_bias(int c, int slice) const {
    const int begin = slice * sizes.samples / sizes.slices, end = (slice + 1) * sizes.samples / sizes.slices;
    const T* from = (kAlong ? along : logits) + c * sizes.samples;
    T sum = 0;
    for (int n = begin; n < end; ++n) sum += from[n];
    sums[slice * sizes.size + sizes.b2 + c] = sum;
  }

  // One evaluation by the whole block; the means of what is measured, and the sizes.slices' sums where they
  // are wanted.
  __device__ void evaluate(double (&means)[3], bool measure, bool with_sums) const {
    double measured[3] = {0, 0, 0};
    for (int n = threadIdx.x; n < sizes.samples; n += blockDim.x) {
      forward(n);
      row(n, measured);
    }
    __syncthreads();
    if (with_sums) {
      const int units = sizes.hidden + sizes.classes;
      for (int i = threadIdx.x; i < units * sizes.slices; i += blockDim.x) {
        const int unit = i % units, slice = i / units;
        if (unit < sizes.hidden)
          backward(unit, slice);
        else
          backward_bias(unit - sizes.hidden, slice);
      }
      __syncthreads();
    }
    if (!measure) return;
    block_sum(measured);
#pragma unroll
    for (int i = 0; i < 3; ++i) means[i] = measured[i] / static_cast<double>(sizes.samples);
  }

  __device__ T total(int parameter) const {
    T sum = 0;
    for (int slice = 0; slice < sizes.slices; ++slice) sum += sums[slice * sizes.size + parameter];
    return sum;
  }
};

__device__ inline Schedule schedule_of(const Perceptrons& x, int64_t member) {
  const double* table = x.table == nullptr ? nullptr : x.table + member * x.table_member_stride;
  return {x.clock + member * x.clock_member_stride, x.class_order, table, x.table_rows, x.shape.classes};
}

// Γ for all threads; they have passed a barrier since they read the last one, and pass one before they read.
__device__ inline void set_gamma(const Perceptrons& x, int64_t member, int64_t step, double* gamma) {
  const ClassWeights weights = weights_at(schedule_of(x, member), step);
  for (int64_t c = threadIdx.x; c < x.shape.classes; c += blockDim.x) gamma[c] = weights[c];
}

// What is in the block's memory, and where in the workspace the rest begins.
template <typename T>
struct Memory {
  double* gamma;
  T* in_block;
  T* in_workspace;

  __device__ Memory(const Perceptrons& x, const PerceptronPlan& plan, int64_t member)
      : gamma(reinterpret_cast<double*>(memory_after_scratch())),
        in_block(reinterpret_cast<T*>(gamma + x.shape.classes)),
        in_workspace(static_cast<T*>(x.workspace) + member * plan.workspace) {}

  __device__ T* take(bool is_in_block, int64_t size) {
    T* const part = is_in_block ? in_block : in_workspace;
    in_block += is_in_block ? size : 0;
    in_workspace += is_in_block ? 0 : size;
    return part;
  }
};

template <typename T, Activation A, bool kAlong>
__device__ Member<T, A, kAlong> lay_out(const Perceptrons& x, const PerceptronPlan& plan, int64_t member,
                                        Memory<T>& memory) {
  const PerceptronShape& shape = x.shape;
  const auto narrow = [](int64_t size) { return static_cast<int>(size); };
  Member<T, A, kAlong> made{};
  made.sizes = {narrow(shape.samples), narrow(shape.inputs), narrow(shape.hidden),
                narrow(shape.classes), narrow(plan.slices),  narrow(shape.b1()),
                narrow(shape.w2()),    narrow(shape.b2()),   narrow(shape.size())};
  made.gamma = memory.gamma;
  made.target = x.target + member * x.target_member_stride;
  made.target_stride = narrow(x.target_row_stride);
  made.sums = memory.take(plan.sums_in_block, plan.sums);
  made.logits = memory.take(plan.planes_in_block, plan.planes);
  made.along = kAlong ? made.logits + shape.classes * shape.samples : nullptr;
  made.inputs = static_cast<const T*>(x.inputs) + member * x.inputs_member_stride;
  made.row_stride = narrow(x.inputs_row_stride);
  made.column_stride = narrow(x.inputs_column_stride);
  if (plan.inputs_in_block) {
    T* const planes = memory.take(true, plan.inputs);
    for (int i = threadIdx.x; i < narrow(plan.inputs); i += blockDim.x)
      planes[i] = made.input(i % made.sizes.samples, i / made.sizes.samples);
    made.inputs = planes;
    made.row_stride = 1;
    made.column_stride = made.sizes.samples;
  }
  return made;
}

// A copy in the block, or the original.
template <typename T>
__device__ T* near_block(Memory<T>& memory, bool is_in_block, T* original, int64_t size) {
  if (!is_in_block) return original;
  T* const copy = memory.take(true, size);
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) copy[i] = original[i];
  return copy;
}

template <typename T, Activation A, bool kAlong>
__global__ void __launch_bounds__(threads, 2) differentiate(PerceptronDerivative x, PerceptronPlan plan) {
  const int64_t m = blockIdx.x, size = x.shape.size();
  Memory<T> memory(x, plan, m);
  set_gamma(x, m, x.step, memory.gamma);
  Member<T, A, kAlong> member = lay_out<T, A, kAlong>(x, plan, m, memory);
  member.p = near_block(memory, plan.parameters_in_block, static_cast<T*>(x.parameters) + m * size, size);
  if constexpr (kAlong) {
    T* const v = const_cast<T*>(static_cast<const T*>(x.v)) + m * size;
    member.v = near_block(memory, plan.parameters_in_block, v, size);
  }
  __syncthreads();
  double means[3];
  member.evaluate(means, x.loss != nullptr, true);
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x)
    static_cast<T*>(x.out)[m * size + i] = member.total(i);
  if (x.loss != nullptr && threadIdx.x == 0) x.loss[m] = means[0];
}

template <typename T, Activation A>
__global__ void __launch_bounds__(threads, 2) descend(PerceptronDescent x, PerceptronPlan plan) {
  const int64_t m = blockIdx.x, size = x.shape.size();
  if (!x.finite[m]) return;
  T* const parameters = static_cast<T*>(x.parameters) + m * size;
  T* const velocity = x.velocity == nullptr ? nullptr : static_cast<T*>(x.velocity) + m * size;
  const T rate = static_cast<T>(x.learning_rate[m]);
  const T momentum = velocity == nullptr ? T(0) : static_cast<T>(x.momentum[m]);
  Memory<T> memory(x, plan, m);
  Member<T, A, false> member = lay_out<T, A, false>(x, plan, m, memory);
  T* const p = near_block(memory, plan.parameters_in_block, parameters, size);
  member.p = p;
  const int64_t end = x.step + x.num_steps;
  bool finite = true;
  for (int64_t step = x.step; step <= end && finite; ++step) {
    set_gamma(x, m, step, memory.gamma);
    __syncthreads();
    // The row of the last update is measured on the way; that of the last one of all in a pass of its own.
    const int64_t update = step - 1;
    const bool due =
        step > x.step && update >= x.first_record && (update - x.first_record) % x.record_every == 0;
    if (step == end && !due) break;
    double means[3];
    member.evaluate(means, due, step < end);
    if (due && threadIdx.x < 3) {
      const int64_t place = ((update - x.first_record) / x.record_every * x.members + m) * 3;
      x.records[place + threadIdx.x] = threadIdx.x == 0 ? means[0] : threadIdx.x == 1 ? means[1] : means[2];
    }
    if (step == end) break;
    // The next parameters and velocity wait in the sums, each where only its thread has read.
    double not_finite[1] = {0};
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
      T change = member.total(i);
      if (velocity != nullptr) {
        change += momentum * velocity[i];
        member.sums[size + i] = change;
      }
      const T next = p[i] - rate * change;
      member.sums[i] = next;
      if (!(next - next == T(0))) not_finite[0] += 1;
    }
    block_sum(not_finite);
    finite = not_finite[0] == 0;
    for (int64_t i = threadIdx.x; i < size && finite; i += blockDim.x) {
      p[i] = member.sums[i];
      if (velocity != nullptr) velocity[i] = member.sums[size + i];
    }
  }
  if (!finite && threadIdx.x == 0) x.finite[m] = false;
  for (int64_t i = threadIdx.x; i < size && p != parameters; i += blockDim.x) parameters[i] = p[i];
}

// ---- the host

cudaError_t block_memory_limit(int64_t* bytes) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes = limit;
  return error;
}

// The parts go into the block in the order in which they are read most.
cudaError_t plan_of(const Perceptrons& x, bool along, int64_t least_slices, PerceptronPlan* result) {
  int64_t limit = 0;
  if (const cudaError_t error = block_memory_limit(&limit); error != cudaSuccess) return error;
  const PerceptronShape& shape = x.shape;
  for (const int64_t size : {shape.size(), shape.samples * shape.classes, shape.samples * shape.inputs,
                             shape.samples * x.inputs_row_stride + shape.inputs * x.inputs_column_stride})
    if (size >= INT32_MAX / 2) return cudaErrorInvalidValue;
  const int64_t element = x.is_double ? 8 : 4, size = shape.size();
  PerceptronPlan plan{};
  const int64_t units = shape.hidden + shape.classes;
  const int64_t by_memory = max_slice_bytes / (size * element);
  plan.slices = std::max<int64_t>(1, std::min({threads / units, by_memory, shape.samples}));
  plan.parameters = size * (along ? 2 : 1);
  plan.sums = size * std::max(plan.slices, least_slices);
  plan.planes = shape.samples * shape.classes * (along ? 2 : 1);
  plan.inputs = shape.samples * shape.inputs;
  plan.block_bytes = static_cast<int64_t>(sizeof(Scratch)) + shape.classes * 8;
  if (plan.block_bytes > limit) return cudaErrorInvalidValue;
  const auto take = [&](int64_t elements) {
    const bool fits = plan.block_bytes + elements * element <= limit;
    if (fits) plan.block_bytes += elements * element;
    return fits;
  };
  plan.parameters_in_block = take(plan.parameters);
  plan.planes_in_block = take(plan.planes);
  plan.inputs_in_block = take(plan.inputs);
  plan.sums_in_block = take(plan.sums);
  plan.workspace = (plan.planes_in_block ? 0 : plan.planes) + (plan.sums_in_block ? 0 : plan.sums);
  *result = plan;
  return cudaSuccess;
}

cudaError_t plan_of(const PerceptronDerivative& x, PerceptronPlan* plan) {
  return plan_of(x, x.v != nullptr, 1, plan);
}
cudaError_t plan_of(const PerceptronDescent& x, PerceptronPlan* plan) {
  return plan_of(x, false, x.velocity == nullptr ? 1 : 2, plan);
}

template <typename P>
cudaError_t size_of_workspace(const P& problem, int64_t* size) {
  PerceptronPlan plan;
  const cudaError_t error = plan_of(problem, &plan);
  if (error == cudaSuccess) *size = plan.workspace;
  return error;
}

template <typename P>
cudaError_t launch_kernel(void (*kernel)(P, PerceptronPlan), const P& problem, cudaStream_t stream) {
  if (problem.members == 0) return cudaSuccess;
  if (problem.members > INT32_MAX) return cudaErrorInvalidConfiguration;
  PerceptronPlan plan;
  if (const cudaError_t error = plan_of(problem, &plan); error != cudaSuccess) return error;
  const cudaError_t allowed =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(plan.block_bytes));
  if (allowed != cudaSuccess) return allowed;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(problem.members));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = plan.block_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, problem, plan);
}

// Calls f(T{}, the activation as a constant).
template <typename F>
cudaError_t with_kind(const Perceptrons& problem, F&& f) {
  const auto with_activation = [&](auto zero) {
    return problem.shape.activation == Activation::relu
               ? f(zero, std::integral_constant<Activation, Activation::relu>())
               : f(zero, std::integral_constant<Activation, Activation::tanh>());
  };
  return problem.is_double ? with_activation(double{}) : with_activation(float{});
}

}  // namespace

cudaError_t workspace_size(const PerceptronDerivative& problem, int64_t* size) {
  return size_of_workspace(problem, size);
}
cudaError_t workspace_size(const PerceptronDescent& problem, int64_t* size) {
  return size_of_workspace(problem, size);
}

cudaError_t launch(const PerceptronDerivative& problem, cudaStream_t stream) {
  return with_kind(problem, [&](auto zero, auto activation) {
    using T = decltype(zero);
    constexpr Activation A = activation();
    return launch_kernel(problem.v != nullptr ? differentiate<T, A, true> : differentiate<T, A, false>,
                         problem, stream);
  });
}

cudaError_t launch(const PerceptronDescent& problem, cudaStream_t stream) {
  return with_kind(problem, [&](auto zero, auto activation) {
    return launch_kernel(descend<decltype(zero), activation()>, problem, stream);
  });
}

}  // namespace dynloss::cuda
