// Kernels for rows that fit the registers of a warp: a group of 1, 2, 4, ... 32 lanes takes a row.
//
// Each warp goes through tiles of neighbouring rows. A tile travels to shared memory as it lies in memory, 16
// bytes at a time and without the threads' help, while the warp works on the tile before it; its lanes pick
// their elements from there and put the results in their place, which go out 16 bytes at a time. So the
// number of classes and the alignment of rows decide nothing about the traffic.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/member.cuh"

namespace dynloss::cuda {

constexpr int warp_row_threads = 256;

// More elements per lane would not fit its registers.
template <typename S>
constexpr int max_warp_items = sizeof(S) == 8 ? 16 : 64;

// Blocks that a multiprocessor has registers for; `simple`: a kernel of the forward pass without smoothing.
constexpr int warp_row_blocks(bool wide, int items, bool simple) {
  return wide ? 1 : items > 16 || !simple ? 2 : 3;
}

// A tile has no more rows than this.
constexpr int max_tile_rows = 256;

// ---- tiles

struct TileRows {
  int64_t first;
  int count;  // none after the last row of the member

  __device__ TileRows(int64_t first, const Problem& p, const Grid& grid)
      : first(first),
        count(first >= p.rows                   ? 0
              : p.rows - first < grid.tile_rows ? static_cast<int>(p.rows - first)
                                                : grid.tile_rows) {}
};

// Whether the rows of a member follow each other without a gap.
__device__ inline bool is_flat(const Operand& x, const Problem& p) {
  return x.class_stride == 1 && x.row_stride == p.classes &&
         (p.inner_rows == p.rows || x.outer_stride == p.inner_rows * p.classes);
}

// Calls f(row, class, element in memory) for the elements of rows that are not flat. Lanes take neighbouring
// classes where these are neighbours in memory, else neighbouring rows.
template <typename S, typename F>
__device__ void for_scattered(const Operand& x, const Problem& p, int member, const TileRows& rows,
                              int classes, F&& f) {
  const bool along_row = x.class_stride == 1 && classes >= warp_size;
#pragma unroll 1
  for (int r = along_row ? 0 : lane_index(); r < rows.count; r += along_row ? 1 : warp_size) {
    S* row = row_of<S>(x, p, member, rows.first + r);
#pragma unroll 1
    for (int c = along_row ? lane_index() : 0; c < classes; c += along_row ? warp_size : 1)
      f(r, c, row[c * x.class_stride]);
  }
}

template <typename S>
__device__ S* flat_rows(const Operand& x, int member, const TileRows& rows, int classes) {
  return static_cast<S*>(x.data) + member * x.member_stride + rows.first * classes;
}

// One operand of a tile in shared memory: row after row, beginning as far from a multiple of 16 bytes as in
// the memory that it came from.
template <typename S>
class Tile {
 public:
  __device__ explicit Tile(unsigned char* memory) : pieces_(reinterpret_cast<Piece<S>*>(memory)) {}

  // By all lanes of the warp; there when they have waited for their copies.
  __device__ void fetch(const Operand& x, const Problem& p, int member, const TileRows& rows,
                        int classes) const {
    if (rows.count == 0) return;
    if (!is_flat(x, p)) {
      S* to = elements(0);
      for_scattered<S>(x, p, member, rows, classes,
                       [&](int r, int c, S& from) { to[r * classes + c] = from; });
      return;
    }
    S* from = flat_rows<S>(x, member, rows, classes);
    S* to = elements(misalignment(from));
    Pieces pieces(from, rows.count * classes);
    pieces.extend(rows.first * classes, (p.rows - rows.first) * classes);
    pieces.for_each([&](int i) { start_copy<16>(to + i, from + i); });
    pieces.for_others([&](int i) { to[i] = from[i]; });
  }

  __device__ void store(const Operand& x, const Problem& p, int member, const TileRows& rows, int classes,
                        int shift) const {
    const S* from = elements(shift);
    if (!is_flat(x, p)) {
      for_scattered<S>(x, p, member, rows, classes, [&](int r, int c, S& to) { to = from[r * classes + c]; });
      return;
    }
    S* to = flat_rows<S>(x, member, rows, classes);
    const int size = rows.count * classes;
    if (misalignment(to) != shift) {
      for (int i = lane_index(); i < size; i += warp_size) to[i] = from[i];
      return;
    }
    const Pieces pieces(to, size);
    pieces.for_each([&](int i) { store_piece(to + i, *reinterpret_cast<const uint4*>(from + i)); });
    pieces.for_others([&](int i) { to[i] = from[i]; });
  }

  // How many elements lie between a multiple of 16 bytes and the first.
  __device__ static int shift_of(const Operand& x, const Problem& p, int member, const TileRows& rows,
                                 int classes) {
    return is_flat(x, p) ? misalignment(flat_rows<S>(x, member, rows, classes)) : 0;
  }
  __device__ S* elements(int shift) const { return reinterpret_cast<S*>(pieces_) + shift; }

 private:
  // The pieces of 16 bytes in `size` elements, [begin, end), and the fewer elements before and behind them.
  struct Pieces {
    int size, begin, end;

    __device__ Pieces(const S* first, int size) : size(size) {
      const int shift = misalignment(first);
      begin = shift == 0 ? 0 : piece_size<S> - shift;
      end = (size + shift) / piece_size<S> * piece_size<S> - shift;
    }
    // Those at the ends as a whole, where there are so many elements before the first and from it on.
    __device__ void extend(int64_t before, int64_t behind) {
      if (begin > 0 && before >= piece_size<S>) begin -= piece_size<S>;
      if (end < size && behind >= end + piece_size<S>) end += piece_size<S>;
    }
    template <typename F>
    __device__ void for_each(F&& f) const {
#pragma unroll 1
      for (int i = begin + lane_index() * piece_size<S>; i < end; i += warp_size * piece_size<S>) f(i);
    }
    template <typename F>
    __device__ void for_others(F&& f) const {
      if (lane_index() < (begin < size ? begin : size)) f(lane_index());
      if (begin <= end && end + lane_index() < size) f(end + lane_index());
    }
  };

  Piece<S>* pieces_;
};

// The labels of a tile, as they are in memory.
class TileLabels {
 public:
  __device__ explicit TileLabels(unsigned char* memory) : memory_(memory) {}

  __device__ void fetch(const Problem& p, int member, const TileRows& rows) const {
    const int64_t first = member * p.target_member_stride + rows.first;
#pragma unroll 1
    for (int r = lane_index(); r < rows.count; r += warp_size) {
      if (p.label == Label::int64)
        start_copy<8>(memory_ + 8 * r, static_cast<const int64_t*>(p.target) + first + r);
      else if (p.label == Label::int32)
        start_copy<4>(memory_ + 4 * r, static_cast<const int32_t*>(p.target) + first + r);
      else
        memory_[r] = static_cast<const uint8_t*>(p.target)[first + r];
    }
  }
  __device__ RowLabel of(const Problem& p, int r) const { return {p, load_label(memory_, p.label, r)}; }

 private:
  unsigned char* memory_;
};

// What a warp has of the block's memory: two buffers, each for the labels of a tile and its operands.
struct WarpMemory {
  const Grid& grid;
  unsigned char* begin;

  __device__ explicit WarpMemory(const Grid& grid)
      : grid(grid), begin(memory_after_scratch() + warp_index() * 2 * grid.buffer_bytes) {}

  __device__ unsigned char* labels(int buffer) const { return begin + buffer * grid.buffer_bytes; }
  __device__ unsigned char* operand(int buffer, int index) const {
    return labels(buffer) + grid.label_bytes + index * grid.operand_bytes;
  }
};

__device__ inline int64_t first_tile_row(const Grid& grid) {
  return int64_t(block_in_member(grid) * num_warps() + warp_index()) * grid.tile_rows;
}
__device__ inline int64_t rows_per_round(const Grid& grid) {
  return int64_t(grid.blocks * num_warps()) * grid.tile_rows;
}

// ---- the rows of a tile

// The lanes of a row and the elements that each of them holds: `kUnit` neighbours at a time.
template <typename S, int kItems, int kUnit, int kClasses>
struct Lanes {
  using T = Arithmetic<S>;

  int classes;
  int log2;   // of the lanes per row
  int lane;   // in the row
  int units;  // that any lane has

  __device__ Lanes(const Problem& p, const Grid& grid)
      : classes(kClasses > 0 ? kClasses : static_cast<int>(p.classes)),
        log2(kClasses > 0 ? 0 : grid.log2_lanes),
        lane(kClasses > 0 ? 0 : lane_index() & ((1 << grid.log2_lanes) - 1)),
        units(grid.units) {}

  __device__ int rows_at_once() const { return warp_size >> log2; }
  __device__ int row() const { return lane_index() >> log2; }

  // Calls f(item, class, whether it is in the row) with the first of each unit. No time goes to units that no
  // lane has.
  template <typename F>
  __device__ void for_units(F&& f) const {
    if constexpr (kClasses > 0) {
#pragma unroll
      for (int c = 0; c < kClasses; ++c) f(c, c, true);
    } else {
      constexpr int together = kUnit > 1 ? 1 : 4;
      int c = not_ahead(lane * kUnit);
#pragma unroll
      for (int k = 0; k < kItems / kUnit; ++k) {
        if (k % together == 0 && k > 0 && k >= units) break;
        f(k * kUnit, c, c < classes);
        c += kUnit << log2;
      }
    }
  }
  // Calls f(item, class) for the elements of the row.
  template <typename F>
  __device__ void for_items(F&& f) const {
    for_units([&](int i, int c, bool in_row) {
      if (!in_row) return;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) f(i + j, c + j);
    });
  }
  // Calls f(item, element of each row) for rows in shared memory; beside the row it is given `fill`.
  template <typename F, typename... Rows>
  __device__ void for_elements(T fill, F&& f, const Rows*... rows) const {
    for_units([&](int i, int c, bool in_row) {
      if constexpr (kUnit > 1) {
        const auto all = [&](const Piece<Rows>&... pieces) {
#pragma unroll
          for (int j = 0; j < kUnit; ++j) f(i + j, widen(pieces.values[j])...);
        };
        all((in_row ? load_piece(reinterpret_cast<const Piece<Rows>*>(rows + c))
                    : filled_piece<Rows>(fill))...);
      } else {
        f(i, (in_row ? widen(rows[c]) : fill)...);
      }
    });
  }
  __device__ void store(S* row, const T (&x)[kItems]) const {
    for_units([&](int i, int c, bool in_row) {
      if constexpr (kUnit > 1) {
        T values[kUnit];
#pragma unroll
        for (int j = 0; j < kUnit; ++j) values[j] = x[i + j];
        if (in_row) *reinterpret_cast<Piece<S>*>(row + c) = narrow_piece<S>(values);
      } else {
        if (in_row) row[c] = narrow<S>(x[i]);
      }
    });
  }
  __device__ void fill(S* row, T value) const {
    for_items([&](int, int c) { row[c] = narrow<S>(value); });
  }

  __device__ T sum(T x) const {
    for (int offset = (1 << log2) / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(all_lanes, x, offset);
    return x;
  }
  template <typename X>
  __device__ X largest(X x) const {
    for (int offset = (1 << log2) / 2; offset > 0; offset /= 2)
      x = larger(__shfl_xor_sync(all_lanes, x, offset), x);
    return x;
  }
  // The label's logit. -inf takes its place in the row, for sums over the other classes. `there`: it is
  // wanted.
  __device__ T take(S* row, int label, bool there) const {
    const T lowest = -static_cast<T>(INFINITY);
    const T picked = there ? widen(row[label]) : lowest;
    __syncwarp();  // all lanes have read it: no shuffle is a fence
    if (lane == 0 && there) row[label] = narrow<S>(lowest);
    __syncwarp();
    return picked;
  }
  // The elements that the lane has, -inf beside the row; and the maximum of the row.
  __device__ T load(const S* row, T (&z)[kItems]) const {
    T top = -static_cast<T>(INFINITY);
    for_elements(
        top,
        [&](int i, T x) {
          z[i] = x;
          top = larger(x, top);
        },
        row);
    return largest(top);
  }
  // z becomes e = exp(z - max), of which the sum is returned.
  __device__ T exponentials(T top, T (&z)[kItems]) const {
    T total = 0;
    for_units([&](int i, int, bool) {
      T part = 0;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) part += z[i + j] = exponential<S>(z[i + j] - top);
      total += part;
    });
    return sum(total);
  }
};

// Leaves a row's gradient in its place, but for the label's element: a single lane writes that when all have
// written theirs.
template <bool kSmooth, typename S, int kItems, int kUnit, int kClasses>
__device__ void write_gradient(const Lanes<S, kItems, kUnit, kClasses>& lanes, S* row,
                               const MemberWeights<Arithmetic<S>>& weights,
                               const RowGradient<Arithmetic<S>>& gradient, Arithmetic<S> (&e)[kItems]) {
  if constexpr (kSmooth)
    lanes.for_items(
        [&](int i, int c) { e[i] = gradient.of_softmax(e[i]) - gradient.of_smoothing(weights.gamma(c)); });
  else
    lanes.for_units([&](int i, int, bool) {
#pragma unroll
      for (int j = 0; j < kUnit; ++j) e[i + j] = gradient.of_softmax(e[i + j]);
    });
  lanes.store(row, e);
}

// One row of the forward pass; `inside`: there is such a row. All lanes of the warp come here.
template <bool kSmooth, typename S, int kItems, int kUnit, int kClasses>
__device__ void forward_row(const Forward& p, ForwardBlock<S>& block,
                            const Lanes<S, kItems, kUnit, kClasses>& lanes, int64_t index, bool inside,
                            const RowLabel& label, S* row) {
  using T = Arithmetic<S>;
  const MemberWeights<T>& weights = block.member_weights;
  const bool usual = inside && label.usual();
  T z[kItems];
  const T picked = lanes.take(row, label.index, usual);
  const T top = larger(picked, lanes.load(row, z));
  T smoothed = 0;
  if constexpr (kSmooth) {
    lanes.for_items([&](int i, int c) {
      smoothed +=
          weighted(weights.shared.spread * weights.gamma(c), (c == label.index ? picked : z[i]) - top);
    });
    smoothed = lanes.sum(smoothed);
  }
  const T below_top = kept(picked - top);
  const T others = lanes.exponentials(top, z);
  const RowSum<T> sum{exponential<S>(below_top), others};
  const TargetWeights<T> q = weights.template at<kSmooth>(usual ? label.index : 0);
  const T linear = weighted(q.on_label, below_top) + smoothed;
  if (lanes.lane == 0 && inside) block.add(p, index, label, usual ? q.loss(sum, linear) : label.fill<T>());
  if (p.out.data == nullptr) return;
  const RowGradient<T> gradient(block.scale, q, sum);
  if (usual)
    write_gradient<kSmooth>(lanes, row, weights, gradient, z);
  else if (inside)
    lanes.fill(row, label.fill<T>());
  __syncwarp();
  if (lanes.lane == 0 && usual) row[label.index] = narrow<S>(gradient.at_label);
}

template <typename S, int kItems, int kUnit, int kClasses, bool kSmooth>
__global__ void __launch_bounds__(warp_row_threads,
                                  registers_for(warp_row_blocks(sizeof(S) == 8, kItems, !kSmooth)))
    forward_warp(const Forward p, const Grid grid) {
  const Lanes<S, kItems, kUnit, kClasses> lanes(p, grid);
  const int member = member_index(grid);
  const WarpMemory memory(grid);
  const auto fetch = [&](const TileRows& rows, int buffer) {
    Tile<S>(memory.operand(buffer, 0)).fetch(p.logits, p, member, rows, lanes.classes);
    TileLabels(memory.labels(buffer)).fetch(p, member, rows);
    commit_copies();
  };
  TileRows rows(first_tile_row(grid), p, grid);
  fetch(rows, 0);
  ForwardBlock<S> block(p, grid);  // evaluates Γ while the first tile is under way
#pragma unroll 1
  for (int buffer = 0; rows.count > 0; buffer ^= 1) {
    const TileRows next(rows.first + rows_per_round(grid), p, grid);
    fetch(next, buffer ^ 1);
    wait_for_copies<1>();
    __syncwarp();
    const TileLabels labels(memory.labels(buffer));
    const Tile<S> tile(memory.operand(buffer, 0));
    const int shift = Tile<S>::shift_of(p.logits, p, member, rows, lanes.classes);
    S* elements = tile.elements(shift);
#pragma unroll 1
    for (int first = 0; first < rows.count; first += lanes.rows_at_once()) {
      const int r = first + lanes.row();
      forward_row<kSmooth>(p, block, lanes, rows.first + r, r < rows.count, labels.of(p, r),
                           elements + r * lanes.classes);
    }
    __syncwarp();
    if (p.out.data != nullptr) tile.store(p.out, p, member, rows, lanes.classes, shift);
    __syncwarp();  // before the buffer is filled again
    rows = next;
  }
  block.finish(p, grid);
}

// One row of a derivative, in the place of the logits. All lanes of the warp come here.
template <typename S, int kItems, int kUnit>
__device__ void derivative_row(const Derivative& p, const DerivativeBlock<S>& block,
                               const Lanes<S, kItems, kUnit, 0>& lanes, int64_t index, bool inside,
                               const RowLabel& label, S* row, const S* v, const S* u) {
  using T = Arithmetic<S>;
  const MemberWeights<T>& weights = block.member_weights;
  const bool usual = inside && label.usual();
  T z[kItems];
  const T picked = lanes.take(row, label.index, usual && p.order == 1);
  const T top = larger(picked, lanes.load(row, z));
  const RowSum<T> sum{exponential<S>(picked - top), lanes.exponentials(top, z)};
  const int label_or_0 = usual ? label.index : 0;
  const RowGradient<T> gradient(
      inside ? block.row_scale(p, index) : T(0),
      is_smooth(p) ? weights.template at<true>(label_or_0) : weights.template at<false>(label_or_0), sum);
  InnerProducts<T> products;
  if (p.order > 1) {
    int at_top = 0;
    lanes.for_items([&](int i, int c) { at_top = z[i] < 1 ? at_top : c; });
    at_top = lanes.largest(at_top);
    products.v_top = inside ? widen(v[at_top]) : T(0);
    products.u_top = inside ? widen(u[at_top]) : T(0);
  }
  if (p.order == 2) {
    lanes.for_elements(T(0), [&](int i, T vi) { products.add(z[i], vi); }, v);
    products.pv = lanes.sum(products.pv);
  } else if (p.order == 3) {
    lanes.for_elements(T(0), [&](int i, T ui, T vi) { products.add(z[i], ui, vi); }, u, v);
    products.pv = lanes.sum(products.pv);
    products.pu = lanes.sum(products.pu);
    products.puv = lanes.sum(products.puv);
  }
  products.divide(sum.all());
  if (!usual) {
    if (inside) lanes.fill(row, label.fill<T>());
  } else if (p.order == 1) {
    if (is_smooth(p))
      write_gradient<true>(lanes, row, weights, gradient, z);
    else
      write_gradient<false>(lanes, row, weights, gradient, z);
  } else {
    if (p.order == 2) {
      lanes.for_elements(T(0), [&](int i, T vi) { z[i] *= gradient.factor * products.factor(vi); }, v);
    } else {
      lanes.for_elements(
          T(0), [&](int i, T ui, T vi) { z[i] *= gradient.factor * products.factor(ui, vi); }, u, v);
    }
    lanes.store(row, z);
  }
  __syncwarp();
  if (p.order == 1 && lanes.lane == 0 && usual) row[label.index] = narrow<S>(gradient.at_label);
}

template <typename S, int kItems, int kUnit>
__global__ void __launch_bounds__(warp_row_threads,
                                  registers_for(warp_row_blocks(sizeof(S) == 8, kItems, false)))
    derivative_warp(const Derivative p, const Grid grid) {
  const Lanes<S, kItems, kUnit, 0> lanes(p, grid);
  const int member = member_index(grid);
  const WarpMemory memory(grid);
  const auto operand = [&](int index) { return index == 0 ? p.logits : index == 1 ? p.v : p.u; };
  const auto fetch = [&](const TileRows& rows, int buffer) {
#pragma unroll 1
    for (int i = 0; i < p.order; ++i)
      Tile<S>(memory.operand(buffer, i)).fetch(operand(i), p, member, rows, lanes.classes);
    TileLabels(memory.labels(buffer)).fetch(p, member, rows);
    commit_copies();
  };
  TileRows rows(first_tile_row(grid), p, grid);
  fetch(rows, 0);
  const DerivativeBlock<S> block(p, grid);
#pragma unroll 1
  for (int buffer = 0; rows.count > 0; buffer ^= 1) {
    const TileRows next(rows.first + rows_per_round(grid), p, grid);
    fetch(next, buffer ^ 1);
    wait_for_copies<1>();
    __syncwarp();
    const TileLabels labels(memory.labels(buffer));
    // Of an operand that is there.
    const auto elements = [&](const Operand& x, int index) {
      return Tile<S>(memory.operand(buffer, index))
          .elements(Tile<S>::shift_of(x, p, member, rows, lanes.classes));
    };
    S* z = elements(p.logits, 0);
    const S* v = p.order >= 2 ? elements(p.v, 1) : z;
    const S* u = p.order >= 3 ? elements(p.u, 2) : z;
#pragma unroll 1
    for (int first = 0; first < rows.count; first += lanes.rows_at_once()) {
      const int r = first + lanes.row();
      const int at = r * lanes.classes;
      derivative_row(p, block, lanes, rows.first + r, r < rows.count, labels.of(p, r), z + at, v + at,
                     u + at);
    }
    __syncwarp();
    Tile<S>(memory.operand(buffer, 0))
        .store(p.out, p, member, rows, lanes.classes,
               Tile<S>::shift_of(p.logits, p, member, rows, lanes.classes));
    __syncwarp();
    rows = next;
  }
}

}  // namespace dynloss::cuda
