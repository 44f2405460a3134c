// Kernels for rows that fit the registers of a warp.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/member.cuh"

namespace dynloss::cuda {

constexpr int max_warp_threads = 256;

// More elements per lane would not fit its registers.
template <typename S>
constexpr int max_warp_items = sizeof(S) == 8 ? 16 : 32;

// Calls f(item, class) for the elements that a lane holds; items beyond the row are left out.
template <typename S, int kItems, typename F>
__device__ void for_items(const Run<S>& run, int64_t classes, F&& f) {
#pragma unroll
  for (int k = 0; k < kItems / piece_size<S>; ++k) {
    const int begin = static_cast<int>(run.begin(k * warp_size + lane_index()));
#pragma unroll
    for (int j = 0; j < piece_size<S>; ++j)
      if (begin + j >= 0 && begin + j < classes) f(k * piece_size<S> + j, begin + j);
  }
}

template <typename S, int kItems>
__device__ void load_items(const Run<S>& run, Arithmetic<S> fill, Arithmetic<S> (&z)[kItems]) {
#pragma unroll
  for (int k = 0; k < kItems / piece_size<S>; ++k) {
    const Piece<S> piece = run.load(k * warp_size + lane_index(), narrow<S>(fill));
#pragma unroll
    for (int j = 0; j < piece_size<S>; ++j) z[k * piece_size<S> + j] = widen(piece.values[j]);
  }
}

template <typename S, int kItems>
__device__ void store_items(const Run<S>& run, const Arithmetic<S> (&x)[kItems]) {
#pragma unroll
  for (int k = 0; k < kItems / piece_size<S>; ++k) {
    Piece<S> piece;
#pragma unroll
    for (int j = 0; j < piece_size<S>; ++j) piece.values[j] = narrow<S>(x[k * piece_size<S> + j]);
    run.store(k * warp_size + lane_index(), piece);
  }
}

template <typename T, int kItems>
__device__ T max_of_items(const T (&z)[kItems]) {
  T top = z[0];
#pragma unroll
  for (int i = 1; i < kItems; ++i) top = z[i] > top ? z[i] : top;
  return warp_max(top);
}

template <typename T, int kItems>
__device__ T exponentials_of_items(T top, T (&z)[kItems]) {
  T sum = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) sum += z[i] = std::exp(z[i] - top);
  return warp_sum(sum);
}

template <typename T, int kItems>
__device__ void fill_items(T value, T (&x)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) x[i] = value;
}

template <typename S, int kItems>
__global__ void __launch_bounds__(max_warp_threads, 1) forward_warp(const Forward p, const Grid grid) {
  using T = Arithmetic<S>;
  ForwardBlock<S> block(p, grid);
  const MemberWeights<T>& weights = block.member_weights;
  for (int64_t row = block_in_member(grid) * num_warps() + warp_index(); row < p.rows;
       row += grid.blocks * num_warps()) {
    const S* logits = row_of<S>(p.logits, p, block.member, row);
    const Run<S> in(logits, p.classes);
    T z[kItems];
    load_items<S>(in, -static_cast<T>(INFINITY), z);
    const RowLabel label(p, block.member, row);
    T loss = label.fill<T>();
    if (label.usual()) {
      const TargetWeights<T> q = weights.at(label.index);
      const T top = max_of_items(z);
      T linear = weighted(q.on_label, widen(logits[label.index]) - top);
      if (weights.smooth) {
        T part = 0;
        for_items<S, kItems>(
            in, p.classes, [&](int i, int c) { part += weighted(q.spread * weights.gamma(c), z[i] - top); });
        linear += warp_sum(part);
      }
      const T sum = exponentials_of_items(top, z);
      loss = q.loss(sum, linear);
      const LabelledGradient<T> gradient(q, block.scale, sum);
      for_items<S, kItems>(in, p.classes,
                           [&](int i, int c) { z[i] = gradient(weights, c, label.index, z[i]); });
    } else {
      fill_items(loss, z);
    }
    __syncwarp();  // all lanes have read: the gradient may go where the logits are
    if (p.out.data != nullptr)
      store_items<S>(Run<S>(row_of<S>(p.out, p, block.member, row), p.classes, in.shift()), z);
    if (lane_index() == 0) block.add(p, row, label, loss);
  }
  block.finish(p, grid);
}

template <typename S, int kItems>
__global__ void __launch_bounds__(max_warp_threads, 1) derivative_warp(const Derivative p, const Grid grid) {
  using T = Arithmetic<S>;
  const DerivativeBlock<S> block(p, grid);
  const MemberWeights<T>& weights = block.member_weights;
  for (int64_t row = block_in_member(grid) * num_warps() + warp_index(); row < p.rows;
       row += grid.blocks * num_warps()) {
    const Run<S> in(row_of<S>(p.logits, p, block.member, row), p.classes);
    const Run<S> out(row_of<S>(p.out, p, block.member, row), p.classes, in.shift());
    T z[kItems];
    const RowLabel label(p, block.member, row);
    if (!label.usual()) {
      fill_items(label.fill<T>(), z);
      store_items<S>(out, z);
      continue;
    }
    load_items<S>(in, -static_cast<T>(INFINITY), z);
    const T sum = exponentials_of_items(max_of_items(z), z);
    const LabelledGradient<T> gradient(weights.at(label.index), block.row_scale(p, row), sum);
    if (p.order == 1) {
      for_items<S, kItems>(in, p.classes,
                           [&](int i, int c) { z[i] = gradient(weights, c, label.index, z[i]); });
    } else {
      const Operand& second = p.order == 3 ? p.u : p.v;
      const Run<S> v(row_of<S>(p.v, p, block.member, row), p.classes, in.shift());
      const Run<S> u(row_of<S>(second, p, block.member, row), p.classes, in.shift());
      InnerProducts<T> products;
      // Both directions are read twice, the second time from the cache: registers hold the logits only.
#pragma unroll
      for (int k = 0; k < kItems / piece_size<S>; ++k) {
        const Piece<S> vs = v.load(k * warp_size + lane_index(), S{});
        const Piece<S> us = u.load(k * warp_size + lane_index(), S{});
#pragma unroll
        for (int j = 0; j < piece_size<S>; ++j)
          products.add(z[k * piece_size<S> + j], widen(us.values[j]), widen(vs.values[j]));
      }
      products = {warp_sum(products.pv), warp_sum(products.pu), warp_sum(products.puv)};
      products.divide(sum);
#pragma unroll
      for (int k = 0; k < kItems / piece_size<S>; ++k) {
        const Piece<S> vs = v.load(k * warp_size + lane_index(), S{});
        const Piece<S> us = u.load(k * warp_size + lane_index(), S{});
#pragma unroll
        for (int j = 0; j < piece_size<S>; ++j)
          z[k * piece_size<S> + j] *=
              gradient.factor * factor_of_order(products, p.order, widen(us.values[j]), widen(vs.values[j]));
      }
    }
    store_items<S>(out, z);
  }
}

}  // namespace dynloss::cuda
