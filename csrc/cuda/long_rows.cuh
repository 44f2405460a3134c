// Kernels for long rows: a block per row. As much of a row as there is room for stays in shared memory, where
// it arrives without the threads' help; the rest is read again from L2.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/member.cuh"

namespace dynloss::cuda {

// As many threads as a block can have with the registers that they need.
constexpr int max_block_threads(bool wide, bool sm_90) { return wide || !sm_90 ? 512 : 768; }
template <typename S>
constexpr int block_bound = max_block_threads(sizeof(S) == 8, is_sm_90);

// A row that a block's registers cannot hold arrives in so many parts, each of which is worked on while the
// next are under way, and is replaced by the next row as it is written.
constexpr int row_parts = 4;
// Rows that they can hold have so many places, so that two are under way while one is worked on.
constexpr int held_places = 3;
constexpr int held_threads = 256, held_items = 32;  // per thread

// Blocks of so many threads that a multiprocessor has registers for; `simple`: of a half type, without
// smoothing.
constexpr int held_blocks(bool simple) { return simple ? 3 : 2; }
constexpr int loads_in_flight = is_sm_90 ? 4 : 2;

// Of a row that is being fetched; each part has been committed by itself.
__device__ inline void wait_for_part(int part) {
  if (part == 0)
    wait_for_copies<3>();
  else if (part == 1)
    wait_for_copies<2>();
  else if (part == 2)
    wait_for_copies<1>();
  else
    wait_for_copies<0>();
}

// x[index] = value, if there is such an element.
template <int n, typename T>
__device__ inline void replace(T (&x)[n], int index, T value) {
  if (static_cast<unsigned>(index) >= n) return;
#pragma unroll
  for (int j = 0; j < n; ++j) x[j] = index == j ? value : x[j];
}

// The elements of a row of one operand. Each thread meets its own pieces only, so that it need not wait for
// others.
template <typename S>
class LongRow {
 public:
  using T = Arithmetic<S>;

  // `place`: in shared memory. Beside the row there is `fill`.
  __device__ LongRow(S* first, int size, int shift, const Grid& grid, int place, T fill)
      : run_(first, size, shift),
        cache_(reinterpret_cast<Piece<S>*>(memory_after_scratch()) + place * grid.cached_pieces),
        cached_(run_.pieces() < grid.cached_pieces ? run_.pieces() : grid.cached_pieces),
        part_width_((grid.cached_pieces + row_parts * blockDim.x - 1) / (row_parts * blockDim.x) *
                    blockDim.x),
        fill_(narrow<S>(fill)) {}

  __device__ const Run<S>& run() const { return run_; }
  __device__ int cached() const { return cached_; }

  // Calls f(k) for the cached pieces of a part that belong to the thread.
  template <typename F>
  __device__ void for_part(int part, F&& f) const {
    const int end = (part + 1) * part_width_ < cached_ ? (part + 1) * part_width_ : cached_;
#pragma unroll 1
    for (int k = part * part_width_ + threadIdx.x; k < end; k += blockDim.x) f(k);
  }
  // Calls f(k) for the others.
  template <typename F>
  __device__ void for_rest(F&& f) const {
    const int pieces = run_.pieces();
#pragma unroll 1
    for (int k = cached_ + threadIdx.x; k < pieces; k += blockDim.x) f(k);
  }
  template <typename F>
  __device__ void for_pieces(F&& f) const {
#pragma unroll 1
    for (int k = threadIdx.x; k < cached_; k += blockDim.x) f(k);
    for_rest(f);
  }

  __device__ void fetch_piece(int k) const { run_.fetch(k, cache_ + k, fill_); }
  __device__ void fetch() const {
#pragma unroll 1
    for (int part = 0; part < row_parts; ++part) {
      for_part(part, [&](int k) { fetch_piece(k); });
      commit_copies();
    }
  }

  __device__ Piece<S> operator[](int k) const {
    return k < cached_ ? load_piece(cache_ + k) : run_.load(k, fill_);
  }

  // The maximum of the row and Σ exp(z - maximum) but for the class `without`, of a row that is being
  // fetched.
  __device__ MaxSum<T> max_sum(int without) const {
    MaxSum<T> thread = MaxSum<T>::empty();
    const auto add = [&](Piece<S> piece, int k) {
      replace(piece.values, without - run_.begin(k), narrow<S>(-static_cast<T>(INFINITY)));
      T z[piece_size<S>];
#pragma unroll
      for (int j = 0; j < piece_size<S>; ++j) z[j] = widen(piece.values[j]);
      thread.add(z, [](T x) { return exponential<S>(x); });
    };
#pragma unroll 1
    for (int part = 0; part < row_parts; ++part) {
      wait_for_part(part);
      for_part(part, [&](int k) { add(load_piece(cache_ + k), k); });
    }
    const int pieces = run_.pieces(), threads = static_cast<int>(blockDim.x);
#pragma unroll 1
    for (int k = not_ahead(cached_) + threadIdx.x; k < pieces; k += loads_in_flight * threads) {
      Piece<S> batch[loads_in_flight];
#pragma unroll
      for (int b = 0; b < loads_in_flight; ++b)
        if (k + b * threads < pieces) batch[b] = run_.load(k + b * threads, fill_);
#pragma unroll
      for (int b = 0; b < loads_in_flight; ++b)
        if (k + b * threads < pieces) add(batch[b], k + b * threads);
    }
    return block_merge(thread);
  }

 private:
  Run<S> run_;
  Piece<S>* cache_;
  int cached_;
  int part_width_;  // the same for all rows, which take each other's places
  S fill_;
};
template <typename S>
__device__ LongRow<S> logits_of(const Problem& p, const Grid& grid, int member, int64_t row, int place = 0) {
  S* first = row_of<S>(p.logits, p, member, row);
  return {first, static_cast<int>(p.classes),          misalignment(first), grid,
          place, -static_cast<Arithmetic<S>>(INFINITY)};
}

// The maximum of a row and the sums of e = exp(z - max).
template <typename S>
struct LongSums {
  using T = Arithmetic<S>;

  T max;
  RowSum<T> sum;

  __device__ LongSums(T picked, const MaxSum<T>& others)
      : max(larger(picked, others.max)), sum{exponential<S>(picked - max), others.sum_at(max)} {}
};

// The gradient of the elements of a piece, those beside the row included.
template <typename S, bool kSmooth>
struct LongGradient {
  using T = Arithmetic<S>;

  const MemberWeights<T>& weights;
  RowGradient<T> gradient;
  int label;
  int classes;
  T top;

  __device__ Piece<S> operator()(const Piece<S>& z, int begin) const {
    T e[piece_size<S>];
#pragma unroll
    for (int j = 0; j < piece_size<S>; ++j) e[j] = exponential<S>(widen(z.values[j]) - top);
    return of(e, begin);
  }

  __device__ Piece<S> of(T (&x)[piece_size<S>], int begin) const {
#pragma unroll
    for (int j = 0; j < piece_size<S>; ++j) x[j] = gradient.of_softmax(x[j]);
    if constexpr (kSmooth) {
#pragma unroll
      for (int j = 0; j < piece_size<S>; ++j)
        if (begin + j >= 0 && begin + j < classes) x[j] -= gradient.of_smoothing(weights.gamma(begin + j));
    }
    replace(x, label - begin, gradient.at_label);
    return narrow_piece<S>(x);
  }
};

// A row in the registers of a block: each thread has e = exp(z - its own maximum) of its pieces, so that one
// exponential suffices for sum and gradient.
template <typename S>
class HeldRow {
 public:
  using T = Arithmetic<S>;

  __device__ explicit HeldRow(const LongRow<S>& row) : row_(row) {}

  __device__ MaxSum<T> max_sum(int without) {
    top_ = -static_cast<T>(INFINITY);
    for_pieces([&](int i, int k) {
      const Piece<S> z = k < row_.cached() ? row_[k] : filled_piece<S>(-static_cast<T>(INFINITY));
#pragma unroll
      for (int j = 0; j < piece_size<S>; ++j) e_[i][j] = widen(z.values[j]);
      replace(e_[i], without - row_.run().begin(k), -static_cast<T>(INFINITY));
#pragma unroll
      for (int j = 0; j < piece_size<S>; ++j) top_ = larger(e_[i][j], top_);
    });
    const T base = top_ == -static_cast<T>(INFINITY) ? T(0) : top_;
    T sum = 0;
    for_pieces([&](int i, int) {
      T of_piece = 0;
#pragma unroll
      for (int j = 0; j < piece_size<S>; ++j) of_piece += e_[i][j] = exponential<S>(e_[i][j] - base);
      sum += of_piece;
    });
    return block_merge(MaxSum<T>{top_, sum});
  }

  // Calls f(k, e) with the pieces of e = exp(z - max).
  template <typename F>
  __device__ void for_exponentials(T max, F&& f) {
    const T factor = std::exp(top_ - max);
    for_pieces([&](int i, int k) {
      if (k >= row_.cached()) return;
#pragma unroll
      for (int j = 0; j < piece_size<S>; ++j) e_[i][j] *= factor;
      f(k, e_[i]);
    });
  }

 private:
  // Calls f(piece of the thread, piece of the row).
  template <typename F>
  __device__ void for_pieces(F&& f) {
#pragma unroll
    for (int i = 0; i < held_items / piece_size<S>; ++i)
      f(i, i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x));
  }

  const LongRow<S>& row_;
  T e_[held_items / piece_size<S>][piece_size<S>];
  T top_;
};

// The loss of a row, by all threads of the block.
template <bool kSmooth, typename S, typename T = Arithmetic<S>>
__device__ T long_row_loss(const Forward& p, const MemberWeights<T>& weights, const TargetWeights<T>& q,
                           const LongRow<S>& row, const LongSums<S>& whole, T picked) {
  T linear = weighted(q.on_label, picked - whole.max);
  if constexpr (kSmooth) {
    T part[1] = {T(0)};
    row.for_pieces([&](int k) {
      const Piece<S> piece = row[k];
      const int begin = row.run().begin(k);
#pragma unroll
      for (int j = 0; j < piece_size<S>; ++j)
        if (begin + j >= 0 && begin + j < p.classes)
          part[0] += weighted(q.spread * weights.gamma(begin + j), widen(piece.values[j]) - whole.max);
    });
    block_sum(part);
    linear += part[0];
  }
  return q.loss(whole.sum, linear);
}

template <typename S>
__device__ Run<S> out_of(const Forward& p, int member, int64_t row, int shift) {
  S* first = p.out.data != nullptr ? row_of<S>(p.out, p, member, row) : nullptr;
  return {first, static_cast<int>(p.classes), shift};
}

template <typename S, bool kSmooth>
__global__ void __launch_bounds__(held_threads, registers_for(held_blocks(sizeof(S) == 2 && !kSmooth)))
    forward_held(const Forward p, const Grid grid) {
  using T = Arithmetic<S>;
  const int member = member_index(grid);
  // Of a row after the last, nothing; ignored rows come, too.
  const auto fetch = [&](int64_t row, int place) {
    if (row < p.rows)
      logits_of<S>(p, grid, member, row, place).for_pieces([&](int k) {
        logits_of<S>(p, grid, member, row, place).fetch_piece(k);
      });
    commit_copies();
  };
  int64_t r = block_in_member(grid);
#pragma unroll 1
  for (int place = 0; place < held_places; ++place) fetch(r + int64_t(place) * grid.blocks, place);
  RowLabel label = r < p.rows ? RowLabel(p, member, r) : RowLabel(RowLabel::ignored);
  ForwardBlock<S> block(p, grid);  // evaluates Γ while the first rows are under way
  const MemberWeights<T>& weights = block.member_weights;
  for (int place = 0; r < p.rows; place = place + 1 < held_places ? place + 1 : 0) {
    const int64_t next = r + grid.blocks;
    const int64_t next_label = next < p.rows ? label_of(p, member, next) : p.ignore_index;
    const LongRow<S> row = logits_of<S>(p, grid, member, r, place);
    const Run<S> out = out_of<S>(p, member, r, row.run().shift());
    wait_for_copies<held_places - 1>();
    T loss = label.fill<T>();
    if (label.usual()) {
      // Before the barriers in max_sum(): the gradient may go where the logits are.
      const S picked = row_of<S>(p.logits, p, member, r)[label.index];
      HeldRow<S> held(row);
      const MaxSum<T> others = held.max_sum(label.index);
      const LongSums<S> whole(widen(awaited(picked)), others);
      const TargetWeights<T> q = weights.template at<kSmooth>(label.index);
      loss = long_row_loss<kSmooth>(p, weights, q, row, whole, widen(picked));
      if (p.out.data != nullptr) {
        const LongGradient<S, kSmooth> gradient{
            weights, {block.scale, q, whole.sum}, label.index, static_cast<int>(p.classes), whole.max};
        held.for_exponentials(whole.max, [&](int k, T(&e)[piece_size<S>]) {
          out.store(k, gradient.of(e, row.run().begin(k)));
        });
      }
    } else if (p.out.data != nullptr) {
      row.for_pieces([&](int k) { out.store(k, filled_piece<S>(loss)); });
    }
    fetch(r + int64_t(held_places) * grid.blocks, place);  // where this thread alone has read
    if (threadIdx.x == 0) block.add(p, r, label, loss);
    r = next;
    label = RowLabel(p, awaited(next_label));
  }
  block.finish(p, grid);
}

template <typename S, bool kSmooth>
__global__ void __launch_bounds__(block_bound<S>, 1) forward_block(const Forward p, const Grid grid) {
  using T = Arithmetic<S>;
  const int member = member_index(grid);
  int64_t r = block_in_member(grid);
  RowLabel label = r < p.rows ? RowLabel(p, member, r) : RowLabel(RowLabel::ignored);
  if (label.usual()) logits_of<S>(p, grid, member, r).fetch();
  ForwardBlock<S> block(p, grid);  // evaluates Γ while the first row is under way
  const MemberWeights<T>& weights = block.member_weights;
  while (r < p.rows) {
    const int64_t next = r + grid.blocks;
    const int64_t next_in_memory = next < p.rows ? label_of(p, member, next) : p.ignore_index;
    const LongRow<S> row = logits_of<S>(p, grid, member, r);
    // Takes the place of this row, part by part.
    const LongRow<S> next_row = logits_of<S>(p, grid, member, next < p.rows ? next : r);
    const Run<S> out = out_of<S>(p, member, r, row.run().shift());
    // Writes the pieces that `f` makes of those of the row, and fetches the next row.
    const auto write = [&](auto&& f) {
      const RowLabel next_label(p, awaited(next_in_memory));
      row.for_rest([&](int k) { out.store(k, f(k)); });
#pragma unroll 1
      for (int part = 0; part < row_parts; ++part) {
        row.for_part(part, [&](int k) { out.store(k, f(k)); });
        if (next_label.usual()) next_row.for_part(part, [&](int k) { next_row.fetch_piece(k); });
        commit_copies();
      }
    };
    T loss = label.fill<T>();
    if (label.usual()) {
      // Before the barriers in max_sum(): the gradient may go where the logits are.
      const S picked = row_of<S>(p.logits, p, member, r)[label.index];
      const MaxSum<T> others = row.max_sum(label.index);
      const LongSums<S> whole(widen(awaited(picked)), others);
      const TargetWeights<T> q = weights.template at<kSmooth>(label.index);
      loss = long_row_loss<kSmooth>(p, weights, q, row, whole, widen(picked));
      if (p.out.data != nullptr) {
        const LongGradient<S, kSmooth> gradient{
            weights, {block.scale, q, whole.sum}, label.index, static_cast<int>(p.classes), whole.max};
        write([&](int k) { return gradient(row[k], row.run().begin(k)); });
      }
    } else if (p.out.data != nullptr) {
      write([&](int) { return filled_piece<S>(loss); });
    }
    if (threadIdx.x == 0) block.add(p, r, label, loss);
    r = next;
    label = RowLabel(p, awaited(next_in_memory));
    if (p.out.data == nullptr && label.usual()) next_row.fetch();
  }
  block.finish(p, grid);
}

template <typename S>
__global__ void __launch_bounds__(block_bound<S>, 1) derivative_block(const Derivative p, const Grid grid) {
  using T = Arithmetic<S>;
  const DerivativeBlock<S> block(p, grid);
  const MemberWeights<T>& weights = block.member_weights;
  for (int64_t r = block_in_member(grid); r < p.rows; r += grid.blocks) {
    const RowLabel label(p, block.member, r);
    const LongRow<S> row = logits_of<S>(p, grid, block.member, r);
    const Run<S> out(row_of<S>(p.out, p, block.member, r), static_cast<int>(p.classes), row.run().shift());
    if (!label.usual()) {
      row.for_pieces([&](int k) { out.store(k, filled_piece<S>(label.fill<T>())); });
      continue;
    }
    const auto direction = [&](const Operand& x, int index) {
      return LongRow<S>(row_of<S>(x, p, block.member, r), static_cast<int>(p.classes), row.run().shift(),
                        grid, index, T(0));
    };
    const LongRow<S> v = direction(p.order >= 2 ? p.v : p.logits, 1);
    const LongRow<S> u = direction(p.order >= 3 ? p.u : p.logits, 2);
    if (p.order >= 2) v.fetch();
    if (p.order >= 3) u.fetch();
    row.fetch();
    const T lowest = -static_cast<T>(INFINITY);
    const T picked = p.order == 1 ? widen(row_of<S>(p.logits, p, block.member, r)[label.index]) : lowest;
    const LongSums<S> whole(picked, row.max_sum(p.order == 1 ? label.index : RowLabel::no_class));
    const RowGradient<T> gradient(
        block.row_scale(p, r),
        is_smooth(p) ? weights.template at<true>(label.index) : weights.template at<false>(label.index),
        whole.sum);
    if (p.order == 1) {
      const auto write = [&](auto of_row) {
        row.for_pieces([&](int k) { out.store(k, of_row(row[k], row.run().begin(k))); });
      };
      if (is_smooth(p))
        write(LongGradient<S, true>{weights, gradient, label.index, static_cast<int>(p.classes), whole.max});
      else
        write(LongGradient<S, false>{weights, gradient, label.index, static_cast<int>(p.classes), whole.max});
      continue;
    }
    // Calls f(e, u, v, element of the piece) for a piece.
    const auto elements = [&](int k, auto&& f) {
      const Piece<S> zs = row[k], vs = v[k];
      Piece<S> us = vs;
      if (p.order == 3) us = u[k];
#pragma unroll
      for (int j = 0; j < piece_size<S>; ++j) {
        const T e = exponential<S>(widen(zs.values[j]) - whole.max);
        f(e, widen(us.values[j]), widen(vs.values[j]), j);
      }
    };
    const auto at_top = [&](const LongRow<S>& direction) {
      T value = lowest;
      row.for_pieces([&](int k) {
        const Piece<S> zs = row[k], xs = direction[k];
#pragma unroll
        for (int j = 0; j < piece_size<S>; ++j)
          if (widen(zs.values[j]) == whole.max) value = larger(widen(xs.values[j]), value);
      });
      return block_merge(MaxSum<T>{value, T(0)}).max;
    };
    InnerProducts<T> products{at_top(v), p.order == 3 ? at_top(u) : T(0)};
    row.for_pieces([&](int k) { elements(k, [&](T e, T ui, T vi, int) { products.add(e, ui, vi); }); });
    T sums[3] = {products.pv, products.pu, products.puv};
    block_sum(sums);
    products = {products.v_top, products.u_top, sums[0], sums[1], sums[2]};
    products.divide(whole.sum.all());
    row.for_pieces([&](int k) {
      T x[piece_size<S>];
      elements(k, [&](T e, T ui, T vi, int j) {
        x[j] = gradient.factor * e * (p.order == 2 ? products.factor(vi) : products.factor(ui, vi));
      });
      out.store(k, narrow_piece<S>(x));
    });
  }
}

}  // namespace dynloss::cuda
