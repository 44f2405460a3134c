// Kernels for few classes: a thread per row, the rows of a block staged through shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/member.cuh"

namespace dynloss::cuda {

template <typename S>
constexpr int max_small_threads = sizeof(S) == 8 ? 256 : 512;

// Rows lie in the tile at an odd distance, so that the threads of a warp hit different banks.
__host__ __device__ constexpr int pitch_of(int classes) { return classes | 1; }

// Rows that a block goes through together: behind the scratch, their labels and one tile per operand.
template <typename T>
struct Tile {
  int64_t first;
  int count;  // at most grid.tile_rows; none after the last row
  int* labels;
  T *z, *v, *u;

  __device__ Tile(const Grid& grid, int classes, int order)
      : labels(reinterpret_cast<int*>(memory_after_scratch())),
        z(reinterpret_cast<T*>(labels + grid.tile_rows)),
        v(order >= 2 ? z + grid.tile_rows * pitch_of(classes) : z),
        u(order >= 3 ? v + grid.tile_rows * pitch_of(classes) : v) {}

  __device__ void move_to(int64_t row, const Problem& p, const Grid& grid) {
    first = row;
    count = static_cast<int>(p.rows - first < grid.tile_rows ? p.rows - first : grid.tile_rows);
  }
};

__device__ inline bool is_flat(const Operand& x, const Problem& p) {
  return x.class_stride == 1 && x.row_stride == p.classes &&
         (p.inner_rows == p.rows || x.outer_stride == p.inner_rows * p.classes);
}

// Calls f(element of the piece, element of the tile) for the elements of piece k that are in the run.
template <int kClasses, typename S, typename F>
__device__ void for_elements(const Run<S>& run, int k, int size, int classes, F&& f) {
  const int i = static_cast<int>(run.begin(k));
  const int start = i > 0 ? i : 0;
  int row = start / (kClasses > 0 ? kClasses : classes);
  int column = start - row * classes;
#pragma unroll
  for (int j = 0; j < piece_size<S>; ++j) {
    if (i + j < 0 || i + j >= size) continue;
    f(j, row * pitch_of(classes) + column);
    if (++column == classes) column = 0, ++row;
  }
}

template <typename S, int kClasses, typename T>
__device__ void stage_in(const Operand& x, const Problem& p, int64_t member, const Tile<T>& tile, T* to) {
  if (tile.count <= 0) return;
  const int classes = kClasses > 0 ? kClasses : static_cast<int>(p.classes);
  if (is_flat(x, p)) {
    const int size = tile.count * classes;
    const Run<S> run(row_of<S>(x, p, member, tile.first), size);
    const int pieces = static_cast<int>(run.pieces());
#pragma unroll 4
    for (int k = threadIdx.x; k < pieces; k += blockDim.x) {
      const Piece<S> piece = run.load(k, S{});
      for_elements<kClasses>(run, k, size, classes, [&](int j, int at) { to[at] = widen(piece.values[j]); });
    }
    return;
  }
  for (int r = threadIdx.x; r < tile.count; r += blockDim.x) {
    const S* row = row_of<S>(x, p, member, tile.first + r);
    for (int c = 0; c < classes; ++c) to[r * pitch_of(classes) + c] = widen(row[c * x.class_stride]);
  }
}

template <typename S, int kClasses, typename T>
__device__ void stage_out(const Operand& x, const Problem& p, int64_t member, const Tile<T>& tile) {
  const int classes = kClasses > 0 ? kClasses : static_cast<int>(p.classes);
  if (is_flat(x, p)) {
    const int size = tile.count * classes;
    const Run<S> run(row_of<S>(x, p, member, tile.first), size);
    const int pieces = static_cast<int>(run.pieces());
#pragma unroll 4
    for (int k = threadIdx.x; k < pieces; k += blockDim.x) {
      Piece<S> piece;
      for_elements<kClasses>(run, k, size, classes,
                             [&](int j, int at) { piece.values[j] = narrow<S>(tile.z[at]); });
      run.store(k, piece);
    }
    return;
  }
  for (int r = threadIdx.x; r < tile.count; r += blockDim.x) {
    S* row = row_of<S>(x, p, member, tile.first + r);
    for (int c = 0; c < classes; ++c) row[c * x.class_stride] = narrow<S>(tile.z[r * pitch_of(classes) + c]);
  }
}

// With the logits, so that both are under way at once.
template <typename T>
__device__ void stage_labels(const Problem& p, int64_t member, const Tile<T>& tile) {
  for (int r = threadIdx.x; r < tile.count; r += blockDim.x)
    tile.labels[r] = RowLabel(p, member, tile.first + r).code();
}

// A row in shared memory, or for a number of classes known to the compiler in registers.
template <typename T, int kClasses>
struct SmallRow {
  T* tile;
  int num_classes;
  T registers[kClasses > 0 ? kClasses : 1];

  __device__ SmallRow(T* tile, int num_classes) : tile(tile), num_classes(num_classes) {
    if constexpr (kClasses > 0) {
#pragma unroll
      for (int c = 0; c < kClasses; ++c) registers[c] = tile[c];
    }
  }
  __device__ int classes() const { return kClasses > 0 ? kClasses : num_classes; }
  __device__ T& operator[](int c) {
    if constexpr (kClasses > 0)
      return registers[c];
    else
      return tile[c];
  }

  __device__ T max() {
    T top = -static_cast<T>(INFINITY);
#pragma unroll
    for (int c = 0; c < classes(); ++c) top = (*this)[c] > top ? (*this)[c] : top;
    return top;
  }
  // z becomes e = exp(z - max).
  __device__ T exponentials(T top) {
    T sum = 0;
#pragma unroll
    for (int c = 0; c < classes(); ++c) sum += (*this)[c] = std::exp((*this)[c] - top);
    return sum;
  }
};

template <typename T>
__device__ void fill_tile_row(T* tile, int classes, T value) {
  for (int c = 0; c < classes; ++c) tile[c] = value;
}

// Leaves the gradient in the tile.
template <typename S, int kClasses>
__device__ void forward_row(const Forward& p, ForwardBlock<S>& block, int64_t row_index, RowLabel label,
                            Arithmetic<S>* tile) {
  using T = Arithmetic<S>;
  const MemberWeights<T>& weights = block.member_weights;
  SmallRow<T, kClasses> row(tile, static_cast<int>(p.classes));
  if (!label.usual()) {
    fill_tile_row(tile, row.classes(), label.fill<T>());
    block.add(p, row_index, label, label.fill<T>());
    return;
  }
  const TargetWeights<T> q = weights.at(label.index);
  const T top = row.max();
  T linear = weighted(q.on_label, tile[label.index] - top);
  if (weights.smooth) {
#pragma unroll
    for (int c = 0; c < row.classes(); ++c) linear += weighted(q.spread * weights.gamma(c), row[c] - top);
  }
  const T sum = row.exponentials(top);
  block.add(p, row_index, label, q.loss(sum, linear));
  const LabelledGradient<T> gradient(q, block.scale, sum);
#pragma unroll
  for (int c = 0; c < row.classes(); ++c) tile[c] = gradient(weights, c, label.index, row[c]);
}

// One resident block suffices: left to itself the compiler spills registers so that more fit.
template <typename S, int kClasses>
__global__ void __launch_bounds__(max_small_threads<S>, 1) forward_small(const Forward p, const Grid grid) {
  using T = Arithmetic<S>;
  const int classes = kClasses > 0 ? kClasses : static_cast<int>(p.classes);
  const int64_t member = member_index(grid);
  Tile<T> tile(grid, classes, 1);
  const auto stage = [&](int64_t first) {
    tile.move_to(first, p, grid);
    stage_in<S, kClasses>(p.logits, p, member, tile, tile.z);
    stage_labels(p, member, tile);
  };
  stage(block_in_member(grid) * grid.tile_rows);
  ForwardBlock<S> block(p, grid);  // evaluates Γ while the loads are under way, and has a barrier
  while (tile.count > 0) {
    for (int r = threadIdx.x; r < tile.count; r += blockDim.x)
      forward_row<S, kClasses>(p, block, tile.first + r, RowLabel(tile.labels[r]),
                               tile.z + r * pitch_of(classes));
    __syncthreads();
    if (p.out.data != nullptr) stage_out<S, kClasses>(p.out, p, member, tile);
    if (tile.first + grid.blocks * grid.tile_rows >= p.rows) break;
    __syncthreads();
    stage(tile.first + grid.blocks * grid.tile_rows);
    __syncthreads();
  }
  block.finish(p, grid);
}

// Leaves the derivative in the tile.
template <typename S>
__device__ void derivative_row(const Derivative& p, const DerivativeBlock<S>& block, int64_t row_index,
                               RowLabel label, Arithmetic<S>* tile, const Arithmetic<S>* v,
                               const Arithmetic<S>* u) {
  using T = Arithmetic<S>;
  const MemberWeights<T>& weights = block.member_weights;
  const int classes = static_cast<int>(p.classes);
  if (!label.usual()) {
    fill_tile_row(tile, classes, label.fill<T>());
    return;
  }
  SmallRow<T, 0> row(tile, classes);
  const T sum = row.exponentials(row.max());
  const LabelledGradient<T> gradient(weights.at(label.index), block.row_scale(p, row_index), sum);
  if (p.order == 1) {
    for (int c = 0; c < classes; ++c) tile[c] = gradient(weights, c, label.index, tile[c]);
    return;
  }
  InnerProducts<T> products;
  for (int c = 0; c < classes; ++c) products.add(tile[c], u[c], v[c]);
  products.divide(sum);
  for (int c = 0; c < classes; ++c)
    tile[c] *= gradient.factor * factor_of_order(products, p.order, u[c], v[c]);
}

template <typename S>
__global__ void __launch_bounds__(max_small_threads<S>, 1)
    derivative_small(const Derivative p, const Grid grid) {
  using T = Arithmetic<S>;
  const DerivativeBlock<S> block(p, grid);
  const int classes = static_cast<int>(p.classes);
  Tile<T> tile(grid, classes, p.order);
  for (int64_t first = block_in_member(grid) * grid.tile_rows; first < p.rows;
       first += grid.blocks * grid.tile_rows) {
    tile.move_to(first, p, grid);
    stage_in<S, 0>(p.logits, p, block.member, tile, tile.z);
    if (p.order >= 2) stage_in<S, 0>(p.v, p, block.member, tile, tile.v);
    if (p.order >= 3) stage_in<S, 0>(p.u, p, block.member, tile, tile.u);
    stage_labels(p, block.member, tile);
    __syncthreads();
    for (int r = threadIdx.x; r < tile.count; r += blockDim.x) {
      const int at = r * pitch_of(classes);
      derivative_row<S>(p, block, first + r, RowLabel(tile.labels[r]), tile.z + at, tile.v + at, tile.u + at);
    }
    __syncthreads();
    stage_out<S, 0>(p.out, p, block.member, tile);
    __syncthreads();
  }
}

}  // namespace dynloss::cuda
