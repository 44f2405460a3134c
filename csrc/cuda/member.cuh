// What a block of threads knows of its member (a single problem, or one of an ensemble) before and after it
// goes through the rows: Γ(step), normalizers, the reduction.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/cross_entropy_row.h"
#include "core/oscillation.h"
#include "cuda/block.cuh"
#include "cuda/cross_entropy.h"
#include "cuda/storage.cuh"

namespace dynloss::cuda {

// How a launch is cut up.
struct Grid {
  int threads;
  int blocks;           // per member
  int count_blocks;     // per member, of the launch before; 0: there was none
  size_t block_memory;  // bytes
  // Rows that a warp handles:
  int log2_lanes;     // of the lanes per row
  int units;          // of neighbouring elements that each of them has, or one less
  int tile_rows;      // that a warp goes through at once: a multiple of the rows that its lanes take
  int label_bytes;    // of a tile
  int operand_bytes;  // of a tile
  int buffer_bytes;   // labels and operands of a tile
  // Rows that a block handles:
  int cached_pieces;  // of each operand's row that stay in shared memory
  bool held;          // the block has registers for the row
};

// ---- what all kernels share

__device__ inline int member_index(const Grid& grid) { return static_cast<int>(blockIdx.x) / grid.blocks; }
__device__ inline int block_in_member(const Grid& grid) { return static_cast<int>(blockIdx.x) % grid.blocks; }

template <typename S>
__device__ S* row_of(const Operand& operand, const Problem& p, int64_t member, int64_t row) {
  const int64_t outer = p.inner_rows == p.rows ? 0 : row / p.inner_rows;
  return static_cast<S*>(operand.data) + member * operand.member_stride + outer * operand.outer_stride +
         (row - outer * p.inner_rows) * operand.row_stride;
}

// The label of a row as it is in memory: to be loaded early, and looked at late.
__device__ inline int64_t label_of(const Problem& p, int64_t member, int64_t row) {
  return load_label(p.target, p.label, member * p.target_member_stride + row);
}

// The label of a row. An ignored row contributes 0; a label that is no class makes its row NaN and is never
// used as an index.
struct RowLabel {
  static constexpr int ignored = -2, no_class = -1;

  int index;  // a class, or one of these

  __device__ explicit RowLabel(int index) : index(index) {}
  __device__ RowLabel(const Problem& p, int64_t label)
      : index(label == p.ignore_index           ? ignored
              : label < 0 || label >= p.classes ? no_class
                                                : static_cast<int>(label)) {}
  __device__ RowLabel(const Problem& p, int64_t member, int64_t row)
      : RowLabel(p, label_of(p, member, row)) {}

  __device__ bool usual() const { return index >= 0; }

  template <typename T>
  __device__ T fill() const {
    return index == ignored ? T(0) : static_cast<T>(NAN);
  }
};

__host__ __device__ inline bool is_smooth(const Problem& p) { return p.label_smoothing != 0; }

// Σ Γ, where label smoothing asks for it.
__device__ inline double sum_of_weights(const ClassWeights& weights, const Problem& p) {
  if (!is_smooth(p)) return 0.0;
  if (weights.table_row == nullptr) return weights.raised + (p.classes - 1) * weights.rest;
  double sum[1] = {0.0};
  for (int64_t c = threadIdx.x; c < p.classes; c += blockDim.x) sum[0] += weights.table_row[c];
  block_sum(sum);
  return sum[0];
}

// What the rows of one member share, in the type of the arithmetic.
template <typename T>
struct MemberWeights {
  const double* table_row;
  int active;
  T raised, rest;
  SharedTargetWeights<T> shared;

  __device__ MemberWeights(const ClassWeights& weights, const Problem& p)
      : table_row(weights.table_row),
        active(static_cast<int>(weights.active)),
        raised(kept(static_cast<T>(weights.raised))),
        rest(kept(static_cast<T>(weights.rest))),
        shared(sum_of_weights(weights, p), p.label_smoothing, p.classes) {}

  __device__ T gamma(int class_index) const {
    if (table_row != nullptr) return static_cast<T>(table_row[class_index]);
    return class_index == active ? raised : rest;
  }
  // kSmooth: the labels are smoothed.
  template <bool kSmooth>
  __device__ TargetWeights<T> at(int label) const {
    if constexpr (kSmooth) return shared.at(gamma(label));
    const T on_label = gamma(label);
    return {on_label, T(0), T(0), on_label};
  }
};

// weight · x, where a weight of 0 takes an infinite x with it.
template <typename T>
__device__ T weighted(T weight, T x) {
  return weight == T(0) ? T(0) : weight * x;
}

__device__ inline double normalizer_term(const Forward& p, const ClassWeights& weights,
                                         const RowLabel& label) {
  if (label.index == RowLabel::ignored) return 0.0;
  if (!p.by_weights) return 1.0;
  return label.usual() ? weights[label.index] : 0.0;
}

// ---- forward: before and after the rows

__device__ inline ClassWeights gamma_of(const Forward& p, int64_t member) {
  const int64_t offset = p.step_tensor == nullptr ? 0 : p.step_tensor[member * p.step_member_stride];
  const double* table = p.table == nullptr ? nullptr : p.table + member * p.table_rows * p.classes;
  return weights_at({p.clock + member, p.class_order, table, p.table_rows, p.classes}, p.step + offset);
}

// Γ(step) is evaluated by one thread and shared; where classes have a weight of their own a launch before has
// written all of it out.
__device__ inline const ClassWeights& share_weights(const Forward& p, int64_t member) {
  if (threadIdx.x == 0)
    scratch().weights =
        p.weight == nullptr ? gamma_of(p, member) : ClassWeights{p.weights + member * p.classes, 0, 1.0, 1.0};
  __syncthreads();
  return scratch().weights;
}

// The first block of a member also writes Γ out.
__device__ inline const ClassWeights& prepare_weights(const Forward& p, const Grid& grid) {
  const int64_t member = member_index(grid);
  const ClassWeights& weights = share_weights(p, member);
  if (p.weight == nullptr && block_in_member(grid) == 0)
    for (int64_t c = threadIdx.x; c < p.classes; c += blockDim.x)
      p.weights[member * p.classes + c] = weights[c];
  return weights;
}

// Whether a block knows what the losses are divided by before it goes through its rows: it has all rows of
// its member and can count them, or a launch before has counted.
__device__ inline bool counts_first(const Grid& grid) { return grid.blocks == 1 || grid.count_blocks > 0; }

__device__ inline double count_first(const Forward& p, const Grid& grid) {
  if (!counts_first(grid) || !p.mean) return 1.0;
  const int64_t member = member_index(grid);
  double sum[1] = {0.0};
  if (grid.count_blocks > 0)
    for (int64_t i = threadIdx.x; i < grid.count_blocks; i += blockDim.x)
      sum[0] += p.counts[member * grid.count_blocks + i];
  else
    for (int64_t row = threadIdx.x; row < p.rows; row += blockDim.x)
      sum[0] += normalizer_term(p, scratch().weights, RowLabel(p, member, row));
  block_sum(sum);
  return sum[0];
}

// What the gradient is divided by as it is written.
__device__ inline double gradient_divisor(const Forward& p, const Grid& grid, double counted) {
  if (!p.mean || p.division == Division::postponed) return 1.0;
  return counts_first(grid) ? counted : static_cast<double>(p.rows);
}

// Γ, the weights of the rows and the divisors: what a block works with.
template <typename S>
struct ForwardBlock {
  using T = Arithmetic<S>;

  int member;
  MemberWeights<T> member_weights;
  T scale;
  bool knows_normalizer;
  double loss_sum = 0;
  double normalizer_sum = 0;

  __device__ ForwardBlock(const Forward& p, const Grid& grid)
      : member(member_index(grid)),
        member_weights(prepare_weights(p, grid), p),
        knows_normalizer(counts_first(grid)) {
    const double counted = count_first(p, grid);
    const double divisor = gradient_divisor(p, grid, counted);
    scale = static_cast<T>(1.0 / divisor);
    if (threadIdx.x == 0) {
      scratch().counted = counted;
      scratch().divisor = divisor;
    }
  }

  // By one thread of each row.
  __device__ void add(const Forward& p, int64_t row, const RowLabel& label, T loss) {
    if (p.row_loss != nullptr) static_cast<S*>(p.row_loss)[member * p.rows + row] = narrow<S>(loss);
    loss_sum += static_cast<double>(loss);
    if (p.mean && !knows_normalizer) normalizer_sum += normalizer_term(p, scratch().weights, label);
  }

  // The sums over the blocks of the member, known to the block that arrives last.
  __device__ bool sum_over_blocks(const Forward& p, const Grid& grid, double (&sums)[2]) const {
    const double* partials = p.partials + 2 * member * grid.blocks;
    if (threadIdx.x == 0) {
      double* own = p.partials + 2 * int64_t(blockIdx.x);
      own[0] = sums[0];
      own[1] = sums[1];
      __threadfence();
      scratch().last = atomicAdd(&p.arrivals[member], 1u) == static_cast<unsigned>(grid.blocks - 1);
      __threadfence();  // before the barrier, which hands on to the block what this thread may now see
    }
    __syncthreads();
    if (!scratch().last) return false;
    sums[0] = sums[1] = 0.0;
    for (int64_t i = threadIdx.x; i < grid.blocks; i += blockDim.x) {
      sums[0] += __ldcg(partials + 2 * i);
      sums[1] += __ldcg(partials + 2 * i + 1);
    }
    block_sum(sums);
    if (threadIdx.x == 0) p.arrivals[member] = 0;  // for the next launch
    return true;
  }

  __device__ void finish(const Forward& p, const Grid& grid) const {
    double* normalizer = p.normalizer + 2 * member;
    if (p.loss == nullptr) {
      if (block_in_member(grid) == 0 && threadIdx.x == 0) normalizer[0] = normalizer[1] = 1.0;
      return;
    }
    double sums[2] = {loss_sum, normalizer_sum};
    block_sum(sums);
    if (grid.blocks > 1 && !sum_over_blocks(p, grid, sums)) return;
    if (threadIdx.x != 0) return;
    normalizer[0] = !p.mean ? 1.0 : counts_first(grid) ? scratch().counted : sums[1];
    normalizer[1] = scratch().divisor;
    static_cast<T*>(p.loss)[member] = static_cast<T>(sums[0] / normalizer[0]);
  }
};

// ---- derivatives

template <typename S>
struct DerivativeBlock {
  using T = Arithmetic<S>;

  int member;
  MemberWeights<T> member_weights;
  T scale;

  __device__ DerivativeBlock(const Derivative& p, const Grid& grid)
      : DerivativeBlock(p, member_index(grid), {p.weights + member_index(grid) * p.classes, 0, 1.0, 1.0}) {}
  __device__ DerivativeBlock(const Derivative& p, int member, const ClassWeights& weights)
      : member(member), member_weights(weights, p), scale(static_cast<T>(1.0 / p.normalizer[2 * member])) {}

  __device__ T row_scale(const Derivative& p, int64_t row) const {
    return scale *
           load_as<T>(p.grad_output, p.grad_storage, member * p.grad_member_stride + row * p.grad_row_stride);
  }
};

}  // namespace dynloss::cuda
