// Kernels for long rows: a block per row, kept in shared memory if it has room, else read again from L2.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/member.cuh"

namespace dynloss::cuda {

template <typename S>
constexpr int max_block_threads = sizeof(S) == 8 ? 256 : 512;
constexpr int loads_in_flight = 4;

// Calls f(k) for the pieces that belong to a thread.
template <typename F>
__device__ void for_pieces(int64_t pieces, F&& f) {
  for (int64_t k = threadIdx.x; k < pieces; k += blockDim.x) f(k);
}

// The logits of a row, kept in shared memory if it has room: each thread meets its own pieces again, so that
// no barrier is needed.
template <typename S>
class LongRow {
 public:
  using T = Arithmetic<S>;

  __device__ LongRow(const Problem& p, const Grid& grid, int64_t member, int64_t row)
      : run_(row_of<S>(p.logits, p, member, row), p.classes),
        cache_(grid.cached ? reinterpret_cast<Piece<S>*>(memory_after_scratch()) : nullptr) {}

  __device__ const Run<S>& run() const { return run_; }

  __device__ MaxSum<T> read() {
    MaxSum<T> part = MaxSum<T>::empty();
    const int64_t pieces = run_.pieces();
    for (int64_t k = threadIdx.x; k < pieces; k += loads_in_flight * blockDim.x) {
      Piece<S> batch[loads_in_flight];
#pragma unroll
      for (int b = 0; b < loads_in_flight; ++b)
        if (k + b * blockDim.x < pieces) batch[b] = run_.load(k + b * blockDim.x, lowest());
#pragma unroll
      for (int b = 0; b < loads_in_flight; ++b) {
        if (k + b * blockDim.x >= pieces) break;
        if (cache_ != nullptr) cache_[k + b * blockDim.x] = batch[b];
        T z[piece_size<S>];
#pragma unroll
        for (int j = 0; j < piece_size<S>; ++j) z[j] = widen(batch[b].values[j]);
        part.add(z);
      }
    }
    return block_merge(part);
  }

  __device__ Piece<S> again(int64_t k) const {
    return cache_ != nullptr ? cache_[k] : run_.load(k, lowest());
  }

 private:
  __device__ static S lowest() { return narrow<S>(-static_cast<T>(INFINITY)); }

  Run<S> run_;
  Piece<S>* cache_;
};

template <typename S>
__device__ void fill_row(const Run<S>& out, Arithmetic<S> value) {
  Piece<S> piece;
#pragma unroll
  for (int j = 0; j < piece_size<S>; ++j) piece.values[j] = narrow<S>(value);
  for_pieces(out.pieces(), [&](int64_t k) { out.store(k, piece); });
}

template <typename S>
__device__ void write_gradient(const LongRow<S>& row, const Run<S>& out,
                               const LabelledGradient<Arithmetic<S>>& gradient,
                               const MemberWeights<Arithmetic<S>>& weights, int64_t classes, int64_t label,
                               Arithmetic<S> top) {
  using T = Arithmetic<S>;
  for_pieces(row.run().pieces(), [&](int64_t k) {
    Piece<S> piece = row.again(k);
    const int64_t begin = row.run().begin(k);
#pragma unroll
    for (int j = 0; j < piece_size<S>; ++j) {
      const int64_t c = begin + j;
      const T e = std::exp(widen(piece.values[j]) - top);
      if (c >= 0 && c < classes) piece.values[j] = narrow<S>(gradient(weights, c, label, e));
    }
    out.store(k, piece);
  });
}

template <typename S>
__global__ void __launch_bounds__(max_block_threads<S>, 1) forward_block(const Forward p, const Grid grid) {
  using T = Arithmetic<S>;
  ForwardBlock<S> block(p, grid);
  const MemberWeights<T>& weights = block.member_weights;
  for (int64_t r = block_in_member(grid); r < p.rows; r += grid.blocks) {
    LongRow<S> row(p, grid, block.member, r);
    const RowLabel label(p, block.member, r);
    T loss = label.fill<T>();
    const Run<S> out(p.out.data != nullptr ? row_of<S>(p.out, p, block.member, r) : nullptr, p.classes,
                     row.run().shift());
    if (label.usual()) {
      const TargetWeights<T> q = weights.at(label.index);
      // Before the barriers in read(): the gradient may go where the logits are.
      const T picked = widen(row_of<S>(p.logits, p, block.member, r)[label.index]);
      const MaxSum<T> whole = row.read();
      T linear = weighted(q.on_label, picked - whole.max);
      if (weights.smooth) {
        T part[1] = {T(0)};
        for_pieces(row.run().pieces(), [&](int64_t k) {
          const Piece<S> piece = row.again(k);
          const int64_t begin = row.run().begin(k);
#pragma unroll
          for (int j = 0; j < piece_size<S>; ++j)
            if (begin + j >= 0 && begin + j < p.classes)
              part[0] += weighted(q.spread * weights.gamma(begin + j), widen(piece.values[j]) - whole.max);
        });
        block_sum(part);
        linear += part[0];
      }
      loss = q.loss(whole.sum, linear);
      if (p.out.data != nullptr)
        write_gradient(row, out, LabelledGradient<T>(q, block.scale, whole.sum), weights, p.classes,
                       label.index, whole.max);
    } else if (p.out.data != nullptr) {
      fill_row(out, loss);
    }
    if (threadIdx.x == 0) block.add(p, r, label, loss);
  }
  block.finish(p, grid);
}

template <typename S>
__global__ void __launch_bounds__(max_block_threads<S>, 1)
    derivative_block(const Derivative p, const Grid grid) {
  using T = Arithmetic<S>;
  const DerivativeBlock<S> block(p, grid);
  const MemberWeights<T>& weights = block.member_weights;
  for (int64_t r = block_in_member(grid); r < p.rows; r += grid.blocks) {
    LongRow<S> row(p, grid, block.member, r);
    const RowLabel label(p, block.member, r);
    const Run<S> out(row_of<S>(p.out, p, block.member, r), p.classes, row.run().shift());
    if (!label.usual()) {
      fill_row(out, label.fill<T>());
      continue;
    }
    const MaxSum<T> whole = row.read();
    const LabelledGradient<T> gradient(weights.at(label.index), block.row_scale(p, r), whole.sum);
    if (p.order == 1) {
      write_gradient(row, out, gradient, weights, p.classes, label.index, whole.max);
      continue;
    }
    const Operand& second = p.order == 3 ? p.u : p.v;
    const Run<S> v(row_of<S>(p.v, p, block.member, r), p.classes, row.run().shift());
    const Run<S> u(row_of<S>(second, p, block.member, r), p.classes, row.run().shift());
    // Calls f(e, u, v, element of the piece) for a piece.
    const auto elements = [&](int64_t k, const Piece<S>& zs, auto&& f) {
      const Piece<S> us = u.load(k, S{}), vs = v.load(k, S{});
#pragma unroll
      for (int j = 0; j < piece_size<S>; ++j)
        f(std::exp(widen(zs.values[j]) - whole.max), widen(us.values[j]), widen(vs.values[j]), j);
    };
    InnerProducts<T> products;
    for_pieces(row.run().pieces(), [&](int64_t k) {
      elements(k, row.again(k), [&](T e, T ui, T vi, int) { products.add(e, ui, vi); });
    });
    T sums[3] = {products.pv, products.pu, products.puv};
    block_sum(sums);
    products = {sums[0], sums[1], sums[2]};
    products.divide(whole.sum);
    for_pieces(row.run().pieces(), [&](int64_t k) {
      const Piece<S> zs = row.again(k);
      Piece<S> piece;
      elements(k, zs, [&](T e, T ui, T vi, int j) {
        piece.values[j] = narrow<S>(gradient.factor * e * factor_of_order(products, p.order, ui, vi));
      });
      out.store(k, piece);
    });
  }
}

}  // namespace dynloss::cuda
