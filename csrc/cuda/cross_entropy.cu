// The cross-entropy kernels: one launch computes Γ(step), the loss, its gradient and the reduction.
//
// A row stays on chip between the passes that softmax needs, where it fits:
//   C <= 32      a thread per row, the rows of a block staged through shared memory
//   C <= 1024    a warp per row, in registers
//   above        a block per row, in shared memory up to what a block can have, else read again from L2
// The blocks of a launch take the rows of their member in turns. Sums are taken in float64 in an order that
// depends on the shape and the device alone: in each thread, over its block, and by the block that is last to
// arrive over the blocks.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/cross_entropy.h"
#include "cuda/long_rows.cuh"
#include "cuda/member.cuh"
#include "cuda/small_rows.cuh"
#include "cuda/storage.cuh"
#include "cuda/warp_rows.cuh"

namespace dynloss::cuda {

namespace {

// ---- what is no pass over logits

__global__ void evaluate_weights(const Weights p, const Grid grid) {
  const int64_t total = p.num_steps * p.members * p.classes;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += grid.blocks * blockDim.x) {
    const int64_t c = i % p.classes, member = i / p.classes % p.members, s = i / p.classes / p.members;
    const double* table = p.table == nullptr ? nullptr : p.table + member * p.table_rows * p.classes;
    p.out[i] = weights_at({p.clock + member, p.class_order, table, p.table_rows, p.classes}, p.steps[s])[c];
  }
}

// What the losses of a member are divided by, in parts: the forward launch after it adds them up.
__global__ void count_labels(const Forward p, const Grid grid) {
  const int64_t member = member_index(grid);
  const ClassWeights& weights = share_weights(p, member);
  double sum[1] = {0.0};
#pragma unroll 4
  for (int64_t row = block_in_member(grid) * blockDim.x + threadIdx.x; row < p.rows;
       row += grid.blocks * blockDim.x)
    sum[0] += normalizer_term(p, weights, RowLabel(p, member, row));
  block_sum(sum);
  if (threadIdx.x == 0) p.counts[blockIdx.x] = sum[0];
}

template <typename S>
__global__ void rescale_gradient(const Rescale p, const Grid grid) {
  using T = Arithmetic<S>;
  const int64_t member = member_index(grid);
  const double* normalizer = p.normalizer + 2 * member;
  const double factor = load_as<double>(p.grad_output, p.grad_storage, member * p.grad_member_stride) *
                        (normalizer[1] / normalizer[0]);
  if (factor == 1.0) return;
  const Run<S> run(static_cast<S*>(p.gradient) + member * p.member_stride, p.size);
  const T by = static_cast<T>(factor);
  for (int64_t k = block_in_member(grid) * blockDim.x + threadIdx.x; k < run.pieces();
       k += grid.blocks * blockDim.x) {
    Piece<S> piece = run.load(k, S{});
#pragma unroll
    for (int j = 0; j < piece_size<S>; ++j) piece.values[j] = narrow<S>(weighted(widen(piece.values[j]), by));
    run.store(k, piece);
  }
}

// ---- launching

constexpr size_t plain_block_memory = 48 * 1024;  // more has to be asked for
constexpr int threads_per_multiprocessor = 2048;
// Where a launch that counts the labels costs little beside the pass over the logits, and less than another
// pass over the gradient, should some rows be ignored.
constexpr int64_t elements_worth_counting = int64_t(1) << 22;
constexpr int64_t labels_per_count_block = 4096, max_count_blocks = 256;
constexpr int count_threads = 256;

struct Device {
  int multiprocessors = 0;
  int max_block_memory = 0;
};

cudaError_t current_device(Device* device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device->max_block_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  return error;
}

enum class Regime { small, warp, block };

size_t storage_size(Storage storage) {
  return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

// Elements that pieces of a row may have to cover: all rows of x begin at a multiple of 16 bytes or they may
// not.
int64_t span_of(const Problem& p) {
  const int64_t piece = 16 / storage_size(p.storage);
  const Operand& x = p.logits;
  const bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.member_stride % piece == 0 &&
                       x.outer_stride % piece == 0 && x.row_stride % piece == 0;
  return aligned ? p.classes : p.classes + piece - 1;
}

int64_t max_warp_span(Storage storage) {
  return warp_size * (storage == Storage::float64 ? max_warp_items<double> : max_warp_items<float>);
}

Regime regime_of(const Problem& p) {
  if (p.classes <= max_strided_classes) return Regime::small;
  return span_of(p) <= max_warp_span(p.storage) ? Regime::warp : Regime::block;
}

int round_up(int64_t x, int multiple) { return static_cast<int>((x + multiple - 1) / multiple * multiple); }

// Small rows: one per thread, or where there are plenty several, so that enough bytes are under way.
void cut_small(const Problem& p, const Device& device, int tiles, bool one_block, Grid* grid) {
  const bool wide = p.storage == Storage::float64;
  const int classes = static_cast<int>(p.classes);
  const int most = wide ? max_small_threads<double> : max_small_threads<float>;
  grid->threads = one_block ? std::clamp(round_up(p.rows, warp_size), warp_size, most) : 128;
  int per_thread = std::clamp(16 / std::max(classes, 1), 1, 4);
  if (p.rows < int64_t(device.multiprocessors) * 4 * grid->threads * per_thread) per_thread = 1;
  const size_t row = sizeof(int) + tiles * pitch_of(classes) * (wide ? sizeof(double) : sizeof(float));
  const int room = static_cast<int>((plain_block_memory - sizeof(Scratch)) / row) / warp_size * warp_size;
  grid->tile_rows = std::min(grid->threads * per_thread, room);
  grid->threads = std::min(grid->threads, grid->tile_rows);
  grid->block_memory += grid->tile_rows * row;
}

// The blocks of a regime, and how many rows each takes at once; `one_block`: as large as they can be.
Grid cut(const Problem& p, const Device& device, int tiles, bool one_block, int64_t* rows_at_once) {
  Grid grid{};
  grid.block_memory = sizeof(Scratch);
  *rows_at_once = 1;
  switch (regime_of(p)) {
    case Regime::small:
      cut_small(p, device, tiles, one_block, &grid);
      *rows_at_once = grid.tile_rows;
      break;
    case Regime::warp:
      grid.threads = one_block ? max_warp_threads : 128;
      *rows_at_once = grid.threads / warp_size;
      break;
    case Regime::block: {
      grid.threads = p.classes <= 4096               ? 256
                     : p.storage == Storage::float64 ? max_block_threads<double>
                                                     : max_block_threads<float>;
      const size_t row = (p.classes * storage_size(p.storage) + 31) / 16 * 16;
      grid.cached = grid.block_memory + row <= static_cast<size_t>(device.max_block_memory);
      if (grid.cached) grid.block_memory += row;
      break;
    }
  }
  return grid;
}

// `reduced`: the rows of a member are summed, which a single block does best where it takes them all at once.
// More would go through it in series, with the other multiprocessors idle.
Grid plan(const Problem& p, const Device& device, int tiles, bool reduced) {
  int64_t rows_at_once = 1;
  Grid grid = cut(p, device, tiles, reduced, &rows_at_once);
  grid.blocks = 1;
  if (reduced && p.rows <= rows_at_once) return grid;
  grid = cut(p, device, tiles, false, &rows_at_once);
  const int64_t resident = int64_t(device.multiprocessors) * (threads_per_multiprocessor / grid.threads);
  const int64_t wanted = (p.rows + rows_at_once - 1) / rows_at_once;
  grid.blocks = std::clamp<int64_t>(wanted, 1, resident);
  return grid;
}

int64_t blocks_that_count(const Forward& p, const Grid& grid) {
  if (!p.mean || p.out.data == nullptr || grid.blocks == 1 || p.division == Division::postponed) return 0;
  if (p.division == Division::estimated && p.rows * p.classes < elements_worth_counting) return 0;
  return std::clamp<int64_t>(p.rows / labels_per_count_block, 1, max_count_blocks);
}

Grid plan(const Forward& p, const Device& device) {
  Grid grid = plan(p, device, 1, p.loss != nullptr);
  grid.count_blocks = blocks_that_count(p, grid);
  return grid;
}

template <typename P>
cudaError_t launch(void (*kernel)(P, Grid), const P& problem, int64_t members, const Grid& grid,
                   const Device& device, cudaStream_t stream) {
  if (members == 0) return cudaSuccess;
  if (members > INT32_MAX / grid.blocks) return cudaErrorInvalidConfiguration;
  if (grid.block_memory > plain_block_memory) {
    // All that there is, since it belongs to the kernel: threads with rows of other lengths ask for the same.
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, device.max_block_memory);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(members * grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.block_memory;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, problem, grid);
}

// Calls f with a null pointer to the storage type.
template <typename F>
cudaError_t with_storage(Storage storage, F&& f) {
  switch (storage) {
    case Storage::float32:
      return f(static_cast<float*>(nullptr));
    case Storage::float64:
      return f(static_cast<double*>(nullptr));
    case Storage::float16:
      return f(static_cast<__half*>(nullptr));
    default:
      return f(static_cast<__nv_bfloat16*>(nullptr));
  }
}

template <typename S>
auto forward_kernel(const Forward& p) -> void (*)(Forward, Grid) {
  switch (regime_of(p)) {
    case Regime::small:
      switch (p.classes) {
        case 2:
          return forward_small<S, 2>;
        case 3:
          return forward_small<S, 3>;
        case 10:
          return forward_small<S, 10>;
        default:
          return forward_small<S, 0>;
      }
    case Regime::warp:
      return span_of(p) <= 8 * warp_size    ? forward_warp<S, 8>
             : span_of(p) <= 16 * warp_size ? forward_warp<S, 16>
                                            : forward_warp<S, max_warp_items<S>>;
    default:
      return forward_block<S>;
  }
}

template <typename S>
auto derivative_kernel(const Derivative& p) -> void (*)(Derivative, Grid) {
  switch (regime_of(p)) {
    case Regime::small:
      return derivative_small<S>;
    case Regime::warp:
      return span_of(p) <= 8 * warp_size ? derivative_warp<S, 8> : derivative_warp<S, max_warp_items<S>>;
    default:
      return derivative_block<S>;
  }
}

// For kernels whose threads walk over elements.
Grid elementwise(const Device& device, int64_t elements) {
  constexpr int threads = 256;
  const int64_t resident = int64_t(device.multiprocessors) * (threads_per_multiprocessor / threads);
  Grid grid{};
  grid.threads = threads;
  grid.blocks = std::clamp<int64_t>((elements + threads - 1) / threads, 1, resident);
  return grid;
}

}  // namespace

cudaError_t plan_forward(const Forward& problem, ForwardPlan* result) {
  Device device;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  const Grid grid = plan(problem, device);
  *result = {grid.blocks, grid.count_blocks};
  return cudaSuccess;
}

cudaError_t launch_forward(const Forward& problem, cudaStream_t stream) {
  Device device;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  const Grid grid = plan(problem, device);
  if (grid.count_blocks > 0) {
    Grid counting{};
    counting.threads = count_threads;
    counting.blocks = grid.count_blocks;
    counting.block_memory = sizeof(Scratch);
    const cudaError_t error = launch(count_labels, problem, problem.members, counting, device, stream);
    if (error != cudaSuccess) return error;
  }
  return with_storage(problem.storage, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    return launch(forward_kernel<S>(problem), problem, problem.members, grid, device, stream);
  });
}

cudaError_t launch_derivative(const Derivative& problem, cudaStream_t stream) {
  if (problem.members * problem.rows * problem.classes == 0) return cudaSuccess;
  Device device;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  const Grid grid = plan(problem, device, problem.order, false);
  return with_storage(problem.storage, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    return launch(derivative_kernel<S>(problem), problem, problem.members, grid, device, stream);
  });
}

cudaError_t launch_weights(const Weights& problem, cudaStream_t stream) {
  const int64_t elements = problem.num_steps * problem.members * problem.classes;
  if (elements == 0) return cudaSuccess;
  Device device;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  return launch(evaluate_weights, problem, 1, elementwise(device, elements), device, stream);
}

cudaError_t launch_rescale(const Rescale& problem, cudaStream_t stream) {
  if (problem.members * problem.size == 0) return cudaSuccess;
  Device device;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  const int64_t piece = 16 / storage_size(problem.storage);
  return with_storage(problem.storage, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    return launch(rescale_gradient<S>, problem, problem.members,
                  elementwise(device, problem.size / piece + 1), device, stream);
  });
}

}  // namespace dynloss::cuda
