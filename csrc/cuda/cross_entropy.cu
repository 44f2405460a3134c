// The cross-entropy kernels: one launch computes Γ(step), the loss, its gradient and the reduction. Weights
// of classes that multiply Γ take another one before it.
//
// A row stays on chip between the passes that softmax needs, where it fits:
//   C <= 2048 (float64: 512)   1 to 32 lanes of a warp per row, in registers
//   above                      a block per row, in registers (half types and float32 to 8192) or in shared
//                              memory as far as there is room; the rest is read again from L2
// The blocks of a launch take the rows of their member in turns. Sums over rows are taken in float64, all
// sums in an order that depends on the shape, the alignment and the device alone: in each thread, over its
// block, and by the block that is last to arrive over the blocks.
#include <algorithm>
#include <cstdint>
#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

#include "cuda/cross_entropy.h"
#include "cuda/long_rows.cuh"
#include "cuda/member.cuh"
#include "cuda/storage.cuh"
#include "cuda/warp_rows.cuh"

namespace dynloss::cuda {

namespace {

// ---- what is no pass over logits

__global__ void evaluate_weights(const Weights p, const Grid grid) {
  const int64_t total = p.num_steps * p.members * p.classes;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += int64_t(grid.blocks) * blockDim.x) {
    const int64_t c = i % p.classes, member = i / p.classes % p.members, s = i / p.classes / p.members;
    const double* table = p.table == nullptr ? nullptr : p.table + member * p.table_rows * p.classes;
    p.out[i] = weights_at({p.clock + member, p.class_order, table, p.table_rows, p.classes}, p.steps[s])[c];
  }
}

// What `weight` makes of Γ, for the launches after it.
__global__ void weigh_classes(const Forward p, const Grid grid) {
  const int64_t member = member_index(grid);
  const ClassWeights gamma = gamma_of(p, member);
  for (int64_t c = int64_t(block_in_member(grid)) * blockDim.x + threadIdx.x; c < p.classes;
       c += int64_t(grid.blocks) * blockDim.x)
    p.weights[member * p.classes + c] =
        gamma[c] * load_as<double>(p.weight, p.weight_storage, member * p.weight_member_stride + c);
}

// Labels of a member other than ignore_index, of the thread's share: 16 bytes of them at a time.
template <typename L>
__device__ int count_usual(const Forward& p, const Grid& grid, int member) {
  L* first = static_cast<L*>(const_cast<void*>(p.target)) + member * p.target_member_stride;
  const Run<L, int64_t> run(first, p.rows);
  int counted = 0;  // of a share that an int can count
#pragma unroll 4
  for (int64_t k = int64_t(block_in_member(grid)) * blockDim.x + threadIdx.x; k < run.pieces();
       k += int64_t(grid.blocks) * blockDim.x) {
    const Piece<L> labels = run.load(k, L{});
#pragma unroll
    for (int j = 0; j < piece_size<L>; ++j)
      counted += static_cast<uint64_t>(run.begin(k) + j) < static_cast<uint64_t>(p.rows) &&
                 labels.values[j] != p.ignore_index;
  }
  return counted;
}

// What the losses of a member are divided by, in parts: the forward launch after it adds them up.
__global__ void count_labels(const Forward p, const Grid grid) {
  const int member = member_index(grid);
  double sum[1] = {0.0};
  if (p.by_weights) {
    const ClassWeights& weights = share_weights(p, member);
#pragma unroll 4
    for (int64_t row = int64_t(block_in_member(grid)) * blockDim.x + threadIdx.x; row < p.rows;
         row += int64_t(grid.blocks) * blockDim.x)
      sum[0] += normalizer_term(p, weights, RowLabel(p, member, row));
  } else {
    sum[0] = p.label == Label::int64   ? count_usual<int64_t>(p, grid, member)
             : p.label == Label::int32 ? count_usual<int32_t>(p, grid, member)
                                       : count_usual<uint8_t>(p, grid, member);
  }
  block_sum(sum);
  if (threadIdx.x == 0) p.counts[blockIdx.x] = sum[0];
}

template <typename S>
__global__ void rescale_gradient(const Rescale p, const Grid grid) {
  using T = Arithmetic<S>;
  const int member = member_index(grid);
  const double* normalizer = p.normalizer + 2 * member;
  const double factor = load_as<double>(p.grad_output, p.grad_storage, member * p.grad_member_stride) *
                        (normalizer[1] / normalizer[0]);
  if (factor == 1.0) return;
  const Run<S, int64_t> run(static_cast<S*>(p.gradient) + member * p.member_stride, p.size);
  const T by = static_cast<T>(factor);
  for (int64_t k = int64_t(block_in_member(grid)) * blockDim.x + threadIdx.x; k < run.pieces();
       k += int64_t(grid.blocks) * blockDim.x) {
    Piece<S> piece = run.load(k, S{});
#pragma unroll
    for (int j = 0; j < piece_size<S>; ++j) piece.values[j] = narrow<S>(weighted(widen(piece.values[j]), by));
    run.store(k, piece);
  }
}

// ---- launching

constexpr size_t reserved_block_memory = 1024;  // of each block, for the driver
constexpr int threads_per_multiprocessor = 2048;
constexpr int max_shared_threads = 256;  // of a block per row that is not alone on its multiprocessor
// Bytes that are under way for each warp: more than a multiprocessor needs to hide the latency, so that what
// a tile costs besides is spread over many rows.
constexpr int64_t tile_bytes = 4096;
// Where a launch that counts the labels costs little beside the pass over the logits, and less than another
// pass over the gradient, should some rows be ignored.
constexpr int64_t elements_worth_counting = int64_t(1) << 22;
constexpr int64_t labels_per_count_block = 1024, max_count_blocks = 1024;
constexpr int count_threads = 256;

struct Device {
  int index = 0;
  int multiprocessors = 0;
  int max_block_memory = 0;
  int multiprocessor_memory = 0;
  bool is_sm_90 = false;
};

cudaError_t current_device(Device* device) {
  cudaError_t error = cudaGetDevice(&device->index);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device->index);
  };
  ask(&device->multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&device->max_block_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&device->multiprocessor_memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  int major = 0, minor = 0;
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  device->is_sm_90 = major == 9 && minor == 0;
  return error;
}

size_t storage_size(Storage storage) {
  return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }
int round_up(int64_t x, int64_t multiple) { return static_cast<int>(divide_up(x, multiple) * multiple); }

// Elements of a row for each of the lanes that share it.
int items_of(const Problem& p) {
  return p.classes <= 16 * warp_size ? 16 : p.classes <= 32 * warp_size ? 32 : 64;
}

// The kernels which know their number of classes.
bool has_own_kernel(const Forward& p) {
  return !is_smooth(p) && (p.classes == 2 || p.classes == 3 || p.classes == 10);
}
bool has_own_kernel(const Derivative&) { return false; }

bool is_simple(const Forward& p) { return !is_smooth(p); }
bool is_simple(const Derivative&) { return false; }

bool fits_warp(const Problem& p) {
  return p.classes <=
         (p.storage == Storage::float64 ? max_warp_items<double> : max_warp_items<float>)*warp_size;
}

// Whether each row of x begins at a multiple of 16 bytes in shared memory.
bool is_aligned(const Problem& p, const Operand& x) {
  const int64_t piece = 16 / storage_size(p.storage);
  return p.classes % piece == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
         x.member_stride % piece == 0 && x.outer_stride % piece == 0 && x.row_stride % piece == 0;
}
bool is_aligned(const Forward& p) { return is_aligned(p, p.logits); }
bool is_aligned(const Derivative& p) {
  return is_aligned(p, p.logits) && (p.order < 2 || is_aligned(p, p.v)) &&
         (p.order < 3 || is_aligned(p, p.u));
}

// Blocks that a multiprocessor has shared memory for, of at most so many.
int64_t resident_blocks(const Device& device, const Grid& grid, int64_t most) {
  const int64_t room = device.multiprocessor_memory / (grid.block_memory + reserved_block_memory);
  return device.multiprocessors * std::clamp<int64_t>(room, 1, most);
}

int clamp_blocks(int64_t wanted, int64_t most) {
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, most));
}

// `reduced`: the rows of a member are summed, which a single block does best where it takes few at a time.
// More would go through it in series, with the other multiprocessors idle.
template <typename P>
void cut_for_warps(const P& p, const Device& device, int operands, bool reduced, Grid* grid) {
  const int items = items_of(p);
  const bool own = has_own_kernel(p);
  while (!own && (items << grid->log2_lanes) < p.classes) ++grid->log2_lanes;
  const int unit = is_aligned(p) ? 16 / storage_size(p.storage) : 1;
  grid->units = static_cast<int>(divide_up(p.classes, unit << grid->log2_lanes));
  const int rows_at_once = warp_size >> grid->log2_lanes;
  const int64_t row_bytes = std::max<int64_t>(p.classes, 1) * storage_size(p.storage);
  const int blocks_by_registers =
      registers_for(warp_row_blocks(p.storage == Storage::float64, items, is_simple(p)), device.is_sm_90);
  // Where rows are few, all warps get some.
  const int64_t warps = int64_t(device.multiprocessors) * blocks_by_registers * warp_row_threads / warp_size;
  int64_t rows = std::min(tile_bytes / row_bytes, divide_up(p.rows, warps));
  rows = std::clamp<int64_t>(rows, rows_at_once, max_tile_rows);
  // A multiple of 8 rows ends at a multiple of 16 bytes.
  const int64_t step = rows >= 8 ? std::max(8, rows_at_once) : rows_at_once;
  grid->tile_rows = static_cast<int>(rows / step * step);
  grid->label_bytes = round_up(grid->tile_rows * sizeof(int64_t), 16);
  grid->operand_bytes = round_up(grid->tile_rows * row_bytes, 16) + 16;  // wherever the first row begins
  grid->buffer_bytes = grid->label_bytes + operands * grid->operand_bytes;
  // As many warps to a multiprocessor as its registers and its memory allow; smaller blocks only for an
  // eighth more.
  int64_t resident = 0;
  for (int threads = warp_row_threads; threads >= warp_size; threads /= 2) {
    Grid with = *grid;
    with.threads = threads;
    with.block_memory = sizeof(Scratch) + size_t(threads / warp_size) * 2 * grid->buffer_bytes;
    if (with.block_memory > static_cast<size_t>(device.max_block_memory)) continue;
    const int64_t blocks = resident_blocks(device, with, blocks_by_registers * warp_row_threads / threads);
    if (8 * blocks * threads < 9 * resident) continue;
    resident = blocks * threads;
    *grid = with;
  }
  const int64_t rows_of_block = grid->threads / warp_size * grid->tile_rows;
  grid->blocks = reduced && p.rows <= 2 * rows_of_block
                     ? 1
                     : clamp_blocks(divide_up(p.rows, rows_of_block), resident / grid->threads);
}

// As many threads as are worth starting for a row.
int threads_for(int64_t pieces, int64_t per_thread, int most) {
  int threads = 64;
  while (threads < most && threads * per_thread < pieces) threads *= 2;
  return threads;
}

void cut_for_blocks(const Problem& p, const Device& device, int operands, bool forward, Grid* grid) {
  const int64_t piece = 16 / storage_size(p.storage);
  const int64_t pieces = divide_up(p.classes + piece - 1, piece);  // wherever the row begins
  const auto row_memory = [&](int64_t of_pieces, int places) {
    return sizeof(Scratch) + of_pieces * places * 16;
  };
  const bool half = storage_size(p.storage) == 2, wide = p.storage == Storage::float64;
  grid->held = forward && !wide && pieces <= held_threads * held_items / piece &&
               row_memory(pieces, held_places) <= static_cast<size_t>(device.max_block_memory);
  if (grid->held) {
    grid->cached_pieces = static_cast<int>(pieces);
    grid->block_memory = row_memory(pieces, held_places);
    grid->threads = threads_for(pieces, held_items / piece, held_threads);
    const int blocks = registers_for(held_blocks(half && !is_smooth(p)), device.is_sm_90);
    const int most = blocks * held_threads / grid->threads;
    grid->blocks = clamp_blocks(p.rows, resident_blocks(device, *grid, most));
    return;
  }
  const int64_t room = (device.max_block_memory - sizeof(Scratch)) / (16 * operands);
  grid->cached_pieces = static_cast<int>(std::min(pieces, room));
  grid->block_memory = row_memory(grid->cached_pieces, operands);
  const int most = max_block_threads(wide, device.is_sm_90);
  const bool alone =
      2 * (grid->block_memory + reserved_block_memory) > static_cast<size_t>(device.multiprocessor_memory);
  grid->threads = alone ? most : threads_for(pieces, row_parts, max_shared_threads);
  grid->blocks = clamp_blocks(p.rows, resident_blocks(device, *grid, most / grid->threads));
}

// `reduced`: by a forward pass.
template <typename P>
Grid plan(const P& p, const Device& device, int operands, bool reduced) {
  Grid grid{};
  if (fits_warp(p))
    cut_for_warps(p, device, operands, reduced, &grid);
  else
    cut_for_blocks(p, device, operands, std::is_same_v<P, Forward>, &grid);
  return grid;
}

int blocks_that_count(const Forward& p, const Grid& grid) {
  if (!p.mean || p.out.data == nullptr || grid.blocks == 1 || p.division == Division::postponed) return 0;
  if (p.division == Division::estimated && p.rows * p.classes < elements_worth_counting) return 0;
  return clamp_blocks(p.rows / labels_per_count_block, max_count_blocks);
}

Grid plan(const Forward& p, const Device& device) {
  Grid grid = plan(p, device, 1, p.loss != nullptr);
  grid.count_blocks = blocks_that_count(p, grid);
  return grid;
}

// All the shared memory that there is, to a block and to the blocks of a multiprocessor. It belongs to the
// kernel: threads with rows of other lengths ask for the same, and once suffices.
cudaError_t allow_block_memory(const void* kernel, const Device& device) {
  // Never destroyed: other threads may launch while the process ends.
  static auto& mutex = *new std::mutex;
  static auto& allowed = *new std::set<std::pair<const void*, int>>;
  const std::lock_guard lock(mutex);
  if (!allowed.emplace(kernel, device.index).second) return cudaSuccess;
  const auto set = [&](cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(kernel, attribute, value);
  };
  cudaError_t error = set(cudaFuncAttributeMaxDynamicSharedMemorySize, device.max_block_memory);
  if (error == cudaSuccess)
    error = set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) allowed.erase({kernel, device.index});
  return error;
}

template <typename P>
cudaError_t launch(void (*kernel)(P, Grid), const P& problem, int64_t members, const Grid& grid,
                   const Device& device, cudaStream_t stream) {
  if (members == 0) return cudaSuccess;
  if (members > INT32_MAX / grid.blocks) return cudaErrorInvalidConfiguration;
  if (grid.block_memory > sizeof(Scratch)) {  // it stages rows
    const cudaError_t error = allow_block_memory(reinterpret_cast<const void*>(kernel), device);
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

template <int value>
using Constant = std::integral_constant<int, value>;

// Calls f(items, unit) with constants: the items that p has, and a unit of one element or, where rows are
// aligned, of 16 bytes.
template <typename S, typename P, typename F>
auto with_items(const P& p, F&& f) {
  const auto with_unit = [&](auto items) {
    return is_aligned(p) ? f(items, Constant<piece_size<S>>{}) : f(items, Constant<1>{});
  };
  if constexpr (max_warp_items<S> > 16) {
    if (items_of(p) == 64) return with_unit(Constant<64>{});
    if (items_of(p) == 32) return with_unit(Constant<32>{});
  }
  return with_unit(Constant<16>{});
}

template <typename S, bool kSmooth>
auto forward_kernel(const Forward& p, bool is_held) -> void (*)(Forward, Grid) {
  if (!fits_warp(p)) {
    if constexpr (sizeof(S) <= 4)
      if (is_held) return forward_held<S, kSmooth>;
    return forward_block<S, kSmooth>;
  }
  if constexpr (!kSmooth)
    if (has_own_kernel(p))
      return p.classes == 2   ? forward_warp<S, 2, 1, 2, false>
             : p.classes == 3 ? forward_warp<S, 3, 1, 3, false>
                              : forward_warp<S, 10, 1, 10, false>;
  return with_items<S>(p, [](auto items, auto unit) { return forward_warp<S, items(), unit(), 0, kSmooth>; });
}

template <typename S>
auto derivative_kernel(const Derivative& p) -> void (*)(Derivative, Grid) {
  if (!fits_warp(p)) return derivative_block<S>;
  return with_items<S>(p, [](auto items, auto unit) { return derivative_warp<S, items(), unit()>; });
}

// For kernels whose threads walk over elements.
Grid elementwise(const Device& device, int64_t elements) {
  constexpr int threads = 256;
  const int64_t resident = int64_t(device.multiprocessors) * (threads_per_multiprocessor / threads);
  Grid grid{};
  grid.threads = threads;
  grid.blocks = clamp_blocks(divide_up(elements, threads), resident);
  return grid;
}

// Classes and positions in a row are ints.
bool is_possible(const Problem& p) { return p.classes < INT32_MAX - 64; }

}  // namespace

cudaError_t plan_forward(const Forward& problem, ForwardPlan* result) {
  if (!is_possible(problem)) return cudaErrorInvalidValue;
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
  if (problem.weight != nullptr) {
    const cudaError_t error =
        launch(weigh_classes, problem, problem.members, elementwise(device, problem.classes), device, stream);
    if (error != cudaSuccess) return error;
  }
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
    const auto kernel = is_smooth(problem) ? forward_kernel<S, true>(problem, grid.held)
                                           : forward_kernel<S, false>(problem, grid.held);
    return launch(kernel, problem, problem.members, grid, device, stream);
  });
}

cudaError_t launch_derivative(const Derivative& problem, cudaStream_t stream) {
  if (problem.members * problem.rows * problem.classes == 0) return cudaSuccess;
  if (!is_possible(problem)) return cudaErrorInvalidValue;
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
