// The cross-entropy kernels for one instruction set. The including file sets INSTRUCTION_SET (a namespace),
// VECTOR_BYTES and the compiler's target, and includes every standard header before: inline functions of theirs
// must not be compiled for a machine that the program may not run on.

namespace dynloss::cpu::INSTRUCTION_SET {

#include "vector.h"

template <typename T, typename S>
inline S* at(const Operand& operand, int64_t row, int64_t class_index) {
  return static_cast<S*>(operand.data) + row * operand.row_stride + class_index * operand.class_stride;
}

template <Kind K>
constexpr bool has_output_v = K != Kind::loss;
template <Kind K>
constexpr bool has_loss_v = K == Kind::loss || K == Kind::loss_and_gradient;

// ---- many rows side by side, one per lane

template <typename T, typename S>
inline void load_tile(const Operand& operand, int64_t row, int lanes, int64_t num_classes, Vec<T>* tile) {
  if (operand.row_stride == 1) {
    for (int64_t c = 0; c < num_classes; ++c) {
      const S* p = at<T, S>(operand, row, c);
      tile[c] = lanes == width<T> ? Vec<T>(load(p)) : load_part<T, S>(p, lanes, T(0));
    }
    return;
  }
  if constexpr (std::is_same_v<T, S>) {
    if (lanes == width<T>) {
      const T* first = at<T, S>(operand, row, 0);
      for (int64_t c = 0; c < num_classes; ++c)
        for (int i = 0; i < width<T>; ++i) tile[c][i] = first[i * operand.row_stride + c];
      return;
    }
  }
  T* flat = reinterpret_cast<T*>(tile);
  for (int64_t c = 0; c < num_classes; ++c) tile[c] = Vec<T>{};
  for (int i = 0; i < lanes; ++i) {
    const S* p = at<T, S>(operand, row + i, 0);
    for (int64_t c = 0; c < num_classes; c += width<T>) {
      const int count = static_cast<int>(std::min<int64_t>(width<T>, num_classes - c));
      const Vec<T> part = load_part<T, S>(p + c, count, T(0));
      for (int k = 0; k < count; ++k) flat[(c + k) * width<T> + i] = part[k];
    }
  }
}

template <typename T, typename S>
inline void store_tile(const Operand& operand, int64_t row, int lanes, int64_t num_classes, const Vec<T>* tile) {
  if (operand.row_stride == 1) {
    for (int64_t c = 0; c < num_classes; ++c) {
      S* p = at<T, S>(operand, row, c);
      if (lanes == width<T>)
        store(p, tile[c]);
      else
        store_part<T, S>(p, tile[c], lanes);
    }
    return;
  }
  const T* flat = reinterpret_cast<const T*>(tile);
  for (int i = 0; i < lanes; ++i) {
    S* p = at<T, S>(operand, row + i, 0);
    if constexpr (std::is_same_v<T, S>) {
      for (int64_t c = 0; c < num_classes; ++c) p[c] = flat[c * width<T> + i];
    } else {
      for (int64_t c = 0; c < num_classes; c += width<T>) {
        const int count = static_cast<int>(std::min<int64_t>(width<T>, num_classes - c));
        Vec<T> part{};
        for (int k = 0; k < count; ++k) part[k] = flat[(c + k) * width<T> + i];
        store_part<T, S>(p + c, part, count);
      }
    }
  }
}

template <typename T, typename S, Kind K>
double run_tiles(const Block& block, int64_t begin, int64_t end) {
  const int64_t C = block.num_classes;
  const T keep_label = static_cast<T>(1.0 - block.label_smoothing);
  const T spread = static_cast<T>(block.label_smoothing / static_cast<double>(C));
  const bool smooth = block.label_smoothing != 0;
  Vec<T> z[max_plane_classes], u[K == Kind::third ? max_plane_classes : 1];
  Vec<T> v[K == Kind::third || K == Kind::hessian ? max_plane_classes : 1];
  double loss_sum = 0;
  for (int64_t row = begin; row < end; row += width<T>) {
    const int lanes = static_cast<int>(std::min<int64_t>(width<T>, end - row));
    int64_t label[width<T>];
    Vec<T> on_label{}, scale{};
    Mask<T> counted{};
    for (int i = 0; i < lanes; ++i) {
      label[i] = block.labels[row + i];
      const bool use = label[i] != block.ignore_index;
      if (!use) label[i] = 0;
      on_label[i] = keep_label * static_cast<T>(block.weights[label[i]]);
      counted[i] = use ? -1 : 0;
    }
    const Vec<T> total = on_label + static_cast<T>(block.weights_sum) * spread;

    load_tile<T, S>(block.logits, row, lanes, C, z);
    Vec<T> top = z[0];
    for (int64_t c = 1; c < C; ++c) top = maximum(z[c], top);

    if constexpr (has_loss_v<K>) {
      Vec<T> picked{};
      for (int i = 0; i < lanes; ++i) picked[i] = z[label[i]][i];
      Vec<T> linear = on_label * (picked - top);
      if (smooth)
        for (int64_t c = 0; c < C; ++c) linear += spread * static_cast<T>(block.weights[c]) * (z[c] - top);
      Vec<T> sum{};
      for (int64_t c = 0; c < C; ++c) {
        z[c] = exp_nonpositive(z[c] - top);
        sum += z[c];
      }
      Vec<T> loss = total * log_of_sum(sum) - linear;
      loss = counted ? loss : Vec<T>{};
      if (block.row_loss != nullptr) store_part<T, S>(static_cast<S*>(block.row_loss) + row, loss, lanes);
      for (int i = 0; i < lanes; ++i) loss_sum += static_cast<double>(loss[i]);
      if constexpr (K == Kind::loss) continue;
      scale = static_cast<T>(block.scale) / sum;
    } else {
      Vec<T> sum{};
      for (int64_t c = 0; c < C; ++c) {
        z[c] = exp_nonpositive(z[c] - top);
        sum += z[c];
      }
      scale = static_cast<T>(block.scale) / sum;
    }
    Vec<T> row_scale = broadcast(static_cast<T>(block.scale));
    if (block.row_scale != nullptr) {
      const Vec<T> factor = load_part<T, T>(static_cast<const T*>(block.row_scale) + row, lanes, T(0));
      scale *= factor;
      row_scale *= factor;
    }
    const Vec<T> scaled_total = scale * total;  // times exp(z - top): scale·Q·p

    if constexpr (K == Kind::gradient || K == Kind::loss_and_gradient) {
      for (int64_t c = 0; c < C; ++c) z[c] *= scaled_total;
      if (smooth)
        for (int64_t c = 0; c < C; ++c) z[c] -= row_scale * (spread * static_cast<T>(block.weights[c]));
      const Vec<T> at_label = row_scale * on_label;
      for (int i = 0; i < lanes; ++i) z[label[i]][i] -= at_label[i];
    } else if constexpr (K == Kind::hessian || K == Kind::third) {
      Vec<T> sum{}, pv{}, pu{}, puv{};
      load_tile<T, S>(block.v, row, lanes, C, v);
      for (int64_t c = 0; c < C; ++c) {
        sum += z[c];
        pv += z[c] * v[c];
      }
      pv /= sum;
      if constexpr (K == Kind::hessian) {
        for (int64_t c = 0; c < C; ++c) z[c] *= scaled_total * hessian_factor(v[c], pv);
      } else {
        load_tile<T, S>(block.u, row, lanes, C, u);
        for (int64_t c = 0; c < C; ++c) {
          pu += z[c] * u[c];
          puv += z[c] * u[c] * v[c];
        }
        pu /= sum;
        puv /= sum;
        for (int64_t c = 0; c < C; ++c) z[c] *= scaled_total * third_factor(u[c], v[c], pu, pv, puv);
      }
    }
    for (int64_t c = 0; c < C; ++c) z[c] = counted ? z[c] : Vec<T>{};
    store_tile<T, S>(block.out, row, lanes, C, z);
  }
  return loss_sum;
}

// ---- one row at a time, along its classes

template <typename T, typename S>
inline T row_max(const S* z, int64_t C) {
  const T lowest = -static_cast<T>(INFINITY);
  Vec<T> a = broadcast(lowest), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * width<T> <= C; i += 4 * width<T>) {
    a = maximum(Vec<T>(load(z + i)), a);
    b = maximum(Vec<T>(load(z + i + width<T>)), b);
    c = maximum(Vec<T>(load(z + i + 2 * width<T>)), c);
    d = maximum(Vec<T>(load(z + i + 3 * width<T>)), d);
  }
  for (; i + width<T> <= C; i += width<T>) a = maximum(Vec<T>(load(z + i)), a);
  if (i < C) b = maximum(load_part<T, S>(z + i, static_cast<int>(C - i), lowest), b);
  return horizontal_max<T>(maximum(maximum(a, b), maximum(c, d)));
}

// Calls f(i, count) for the vectors of a row; count < width only for the last.
template <typename T, typename F>
inline void for_vectors(int64_t C, F&& f) {
  int64_t i = 0;
  for (; i + width<T> <= C; i += width<T>) f(i, width<T>);
  if (i < C) f(i, static_cast<int>(C - i));
}

template <typename T, typename S>
inline Vec<T> load_some(const S* p, int count, T fill = T(0)) {
  return count == width<T> ? Vec<T>(load(p)) : load_part<T, S>(p, count, fill);
}

template <typename T, typename S>
inline void store_some(S* p, Vec<T> x, int count) {
  if (count == width<T>)
    store(p, x);
  else
    store_part<T, S>(p, x, count);
}

template <typename T, typename S, Kind K>
double run_long_rows(const Block& block, int64_t begin, int64_t end) {
  const int64_t C = block.num_classes;
  const T lowest = -static_cast<T>(INFINITY);
  const bool smooth = block.label_smoothing != 0;
  // exp(z - max) of the row in the type of the arithmetic: in the output itself where that has it.
  constexpr bool in_place = std::is_same_v<T, S>;
  const std::unique_ptr<T, decltype(&std::free)> buffer(
      has_output_v<K> && !in_place ? static_cast<T*>(std::malloc(C * sizeof(T))) : nullptr, &std::free);
  double loss_sum = 0;
  for (int64_t row = begin; row < end; ++row) {
    const S* z = at<T, S>(block.logits, row, 0);
    const int64_t label = block.labels[row];
    if (label == block.ignore_index) {
      if (block.row_loss != nullptr) static_cast<S*>(block.row_loss)[row] = S{};
      if (has_output_v<K>) std::memset(at<T, S>(block.out, row, 0), 0, C * sizeof(S));
      continue;
    }
    const TargetWeights<T> q(block.weights[label], block.weights_sum, block.label_smoothing, C);
    const T top = row_max<T, S>(z, C);
    T* e = nullptr;
    if constexpr (has_output_v<K>) {
      if constexpr (in_place)
        e = at<T, S>(block.out, row, 0);
      else
        e = buffer.get();
    }
    Vec<T> sums{}, linears{};
    for_vectors<T>(C, [&](int64_t i, int count) {
      const Vec<T> shifted = load_some<T, S>(z + i, count, lowest) - top;
      if (has_loss_v<K> && smooth) {
        Vec<T> gamma{};
        for (int k = 0; k < count; ++k) gamma[k] = static_cast<T>(block.weights[i + k]);
        linears += count == width<T> ? gamma * shifted : (gamma != T(0) ? gamma * shifted : Vec<T>{});
      }
      const Vec<T> exps = exp_nonpositive(shifted);
      sums += exps;
      if constexpr (has_output_v<K>) store_some<T, T>(e + i, exps, count);
    });
    const T sum = horizontal_sum<T>(sums);
    if constexpr (has_loss_v<K>) {
      const T picked = load_part<T, S>(z + label, 1, T(0))[0] - top;
      T linear = q.on_label * picked;
      if (smooth) linear += q.spread * horizontal_sum<T>(linears);
      const T loss = q.total * std::log(sum) - linear;
      loss_sum += static_cast<double>(loss);
      if (block.row_loss != nullptr)
        store_part<T, S>(static_cast<S*>(block.row_loss) + row, broadcast(loss), 1);
    }
    if constexpr (has_output_v<K>) {
      T scale = static_cast<T>(block.scale);
      if (block.row_scale != nullptr) scale *= static_cast<const T*>(block.row_scale)[row];
      const T scaled_total = scale * q.total / sum;
      S* out = at<T, S>(block.out, row, 0);
      if constexpr (K == Kind::gradient || K == Kind::loss_and_gradient) {
        for_vectors<T>(C, [&](int64_t i, int count) {
          Vec<T> x = load_some<T, T>(e + i, count) * scaled_total;
          if (smooth)
            for (int k = 0; k < count; ++k) x[k] -= scale * (q.spread * static_cast<T>(block.weights[i + k]));
          if (!in_place && label >= i && label < i + count) x[label - i] -= scale * q.on_label;
          store_some<T, S>(out + i, x, count);
        });
        if constexpr (in_place) out[label] -= scale * q.on_label;
      } else {
        const S* v = at<T, S>(block.v, row, 0);
        const S* u = K == Kind::third ? at<T, S>(block.u, row, 0) : v;
        Vec<T> pvs{}, pus{}, puvs{};
        for_vectors<T>(C, [&](int64_t i, int count) {
          const Vec<T> weighted = load_some<T, T>(e + i, count) * load_some<T, S>(v + i, count);
          pvs += weighted;
          if constexpr (K == Kind::third) {
            const Vec<T> ui = load_some<T, S>(u + i, count);
            pus += load_some<T, T>(e + i, count) * ui;
            puvs += weighted * ui;
          }
        });
        const T pv = horizontal_sum<T>(pvs) / sum;
        const T pu = horizontal_sum<T>(pus) / sum, puv = horizontal_sum<T>(puvs) / sum;
        for_vectors<T>(C, [&](int64_t i, int count) {
          const Vec<T> vi = load_some<T, S>(v + i, count);
          Vec<T> factor;
          if constexpr (K == Kind::hessian)
            factor = hessian_factor(vi, broadcast(pv));
          else
            factor = third_factor(load_some<T, S>(u + i, count), vi, broadcast(pu), broadcast(pv), broadcast(puv));
          store_some<T, S>(out + i, load_some<T, T>(e + i, count) * scaled_total * factor, count);
        });
      }
    }
  }
  return loss_sum;
}

// ---- dispatch over kind, storage and shape

template <typename T, typename S, Kind K>
double run_kind(const Block& block, int64_t begin, int64_t end) {
  const bool planes = block.logits.class_stride != 1;
  if (planes || block.num_classes <= max_tile_classes) return run_tiles<T, S, K>(block, begin, end);
  return run_long_rows<T, S, K>(block, begin, end);
}

template <typename T, typename S>
double run_storage(const Block& block, int64_t begin, int64_t end) {
  switch (block.kind) {
    case Kind::loss:
      return run_kind<T, S, Kind::loss>(block, begin, end);
    case Kind::loss_and_gradient:
      return run_kind<T, S, Kind::loss_and_gradient>(block, begin, end);
    case Kind::gradient:
      return run_kind<T, S, Kind::gradient>(block, begin, end);
    case Kind::hessian:
      return run_kind<T, S, Kind::hessian>(block, begin, end);
    default:
      return run_kind<T, S, Kind::third>(block, begin, end);
  }
}

double run_rows(const Block& block, int64_t begin, int64_t end) {
  switch (block.storage) {
    case Storage::float32:
      return run_storage<float, float>(block, begin, end);
    case Storage::float64:
      return run_storage<double, double>(block, begin, end);
    case Storage::float16:
      return run_storage<float, Half>(block, begin, end);
    default:
      return run_storage<float, BFloat16>(block, begin, end);
  }
}

}  // namespace dynloss::cpu::INSTRUCTION_SET
