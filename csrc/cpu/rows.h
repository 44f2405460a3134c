// The cross-entropy kernels for one instruction set. The including file sets INSTRUCTION_SET (a namespace),
// VECTOR_BYTES and the compiler's target, and includes every standard header before: inline functions of
// theirs must not be compiled for a machine that the program may not run on.

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

// W x W in place, by exchanging ever smaller blocks.
template <typename T, int B, size_t... Lane>
DYNLOSS_ALWAYS_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::index_sequence<Lane...>) {
  const Vec<T> low = __builtin_shufflevector(a, b, ((Lane & B) ? width<T> + Lane - B : Lane)...);
  const Vec<T> high = __builtin_shufflevector(a, b, ((Lane & B) ? width<T> + Lane : Lane + B)...);
  a = low;
  b = high;
}

template <typename T, int B = width<T> / 2>
DYNLOSS_ALWAYS_INLINE void transpose_square(Vec<T>* x) {
  if constexpr (B > 0) {
    for (int i = 0; i < width<T>; ++i)
      if ((i & B) == 0) exchange<T, B>(x[i], x[i + B], std::make_index_sequence<width<T>>());
    transpose_square<T, B / 2>(x);
  }
}

template <typename T>
constexpr int64_t padded(int64_t num_classes) {
  return (num_classes + width<T> - 1) / width<T> * width<T>;
}

// `tile` has room for padded(num_classes) vectors. Where rows are contiguous, whole vectors are moved from
// the start of each; what they hold beyond the row is ignored, or, stored in ascending order, overwritten by
// the next rows. Only vectors that would reach beyond row `end` of the chunk are moved in part.
template <typename T, typename S>
inline void load_tile(const Operand& operand, int64_t row, int64_t end, int64_t num_classes, Vec<T>* tile) {
  const int lanes = static_cast<int>(std::min<int64_t>(width<T>, end - row));
  if (operand.row_stride == 1) {
    for (int64_t c = 0; c < num_classes; ++c) {
      const S* p = at<T, S>(operand, row, c);
      tile[c] = lanes == width<T> ? Vec<T>(load(p)) : load_part<T, S>(p, lanes, T(0));
    }
    return;
  }
  const S* last = at<T, S>(operand, end - 1, num_classes);
  for (int64_t c = 0; c < num_classes; c += width<T>) {
    Vec<T> rows[width<T>];
    for (int i = 0; i < width<T>; ++i) {
      const S* p = at<T, S>(operand, row + std::min(i, lanes - 1), c);
      rows[i] = last - p >= width<T> ? Vec<T>(load(p)) : load_part<T, S>(p, static_cast<int>(last - p), T(0));
    }
    transpose_square<T>(rows);
    for (int i = 0; i < width<T>; ++i) tile[c + i] = rows[i];
  }
}

template <typename T, typename S>
inline void store_tile(const Operand& operand, int64_t row, int64_t end, int64_t num_classes, Vec<T>* tile,
                       bool into_logits) {
  const int lanes = static_cast<int>(std::min<int64_t>(width<T>, end - row));
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
  for (int64_t c = 0; c < num_classes; c += width<T>) transpose_square<T>(tile + c);
  const S* last = at<T, S>(operand, end - 1, num_classes);
  // The logits of later rows are still to be read.
  const bool may_overlap = operand.row_stride == num_classes && !into_logits;
  for (int i = 0; i < lanes; ++i)
    for (int64_t c = 0; c < num_classes; c += width<T>) {
      S* p = at<T, S>(operand, row + i, c);
      if (num_classes - c >= width<T> || (may_overlap && last - p >= width<T>))
        store(p, tile[c + i]);
      else
        store_part<T, S>(p, tile[c + i], static_cast<int>(num_classes - c));
    }
}

template <typename T, typename S, Kind K>
double run_tiles(const Block& block, int64_t begin, int64_t end) {
  using Index = typename LaneIndex<T>::type;
  const int64_t C = block.num_classes;
  const T keep_label = static_cast<T>(1.0 - block.label_smoothing);
  const T spread = static_cast<T>(block.label_smoothing / static_cast<double>(C));
  const T spread_total = static_cast<T>(block.weights_sum) * spread;
  const bool smooth = block.label_smoothing != 0;
  constexpr bool has_v = K == Kind::hessian || K == Kind::third;
  Vec<T> z[max_plane_classes], u[K == Kind::third ? max_plane_classes : 1], v[has_v ? max_plane_classes : 1];
  T weights[max_plane_classes];
  for (int64_t c = 0; c < C; ++c) weights[c] = static_cast<T>(block.weights[c]);
  Wide<T> loss_sums{};
  for (int64_t row = begin; row < end; row += width<T>) {
    const int lanes = static_cast<int>(std::min<int64_t>(width<T>, end - row));
    Index labels[width<T>] = {}, used[width<T>] = {};
    for (int i = 0; i < lanes; ++i) {
      labels[i] = static_cast<Index>(block.labels[row + i]);
      used[i] = block.labels[row + i] == block.ignore_index ? 0 : -1;
    }
    Mask<T> label, counted;
    std::memcpy(&label, labels, sizeof(label));
    std::memcpy(&counted, used, sizeof(counted));

    load_tile<T, S>(block.logits, row, end, C, z);
    Vec<T> top = z[0];
    for (int64_t c = 1; c < C; ++c) top = maximum(z[c], top);

    Vec<T> on_label{}, picked{}, smoothed{}, sum{};
    for (int64_t c = 0; c < C; ++c) {
      const Mask<T> here = label == static_cast<Index>(c);
      const Vec<T> shifted = z[c] - top;
      on_label = here ? broadcast(weights[c]) : on_label;
      if constexpr (has_loss_v<K>) {
        picked = here ? shifted : picked;
        if (smooth) smoothed += weights[c] * shifted;
      }
      z[c] = exp_nonpositive(shifted);
      sum += z[c];
    }
    on_label *= keep_label;
    const Vec<T> total = on_label + spread_total;
    if constexpr (has_loss_v<K>) {
      Vec<T> linear = on_label * picked;
      if (smooth) linear += spread * smoothed;
      Vec<T> loss = total * log_of_sum(sum) - linear;
      loss = counted ? loss : Vec<T>{};
      if (block.row_loss != nullptr) store_part<T, S>(static_cast<S*>(block.row_loss) + row, loss, lanes);
      loss_sums += __builtin_convertvector(loss, Wide<T>);
    }
    if constexpr (has_output_v<K>) {
      Vec<T> scale = broadcast(static_cast<T>(block.scale));
      if (block.row_scale != nullptr)
        scale *= load_part<T, T>(static_cast<const T*>(block.row_scale) + row, lanes, T(0));
      const Vec<T> scaled_total = scale * total / sum;  // times exp(z - top): scale·Q·p
      if constexpr (!has_v) {
        const Vec<T> at_label = scale * on_label, at_all = scale * spread;
        for (int64_t c = 0; c < C; ++c) {
          Vec<T> x = z[c] * scaled_total;
          if (smooth) x -= at_all * weights[c];
          x = label == static_cast<Index>(c) ? x - at_label : x;
          z[c] = counted ? x : Vec<T>{};
        }
      } else {
        Vec<T> pv{}, pu{}, puv{};
        load_tile<T, S>(block.v, row, end, C, v);
        if constexpr (K == Kind::third) load_tile<T, S>(block.u, row, end, C, u);
        for (int64_t c = 0; c < C; ++c) {
          pv += z[c] * v[c];
          if constexpr (K == Kind::third) {
            pu += z[c] * u[c];
            puv += z[c] * u[c] * v[c];
          }
        }
        pv /= sum;
        pu /= sum;
        puv /= sum;
        for (int64_t c = 0; c < C; ++c) {
          if constexpr (K == Kind::hessian)
            z[c] *= scaled_total * hessian_factor(v[c], pv);
          else
            z[c] *= scaled_total * third_factor(u[c], v[c], pu, pv, puv);
          z[c] = counted ? z[c] : Vec<T>{};
        }
      }
      store_tile<T, S>(block.out, row, end, C, z, block.into_logits);
    }
  }
  double loss_sum = 0;
  for (int i = 0; i < width<T>; ++i) loss_sum += loss_sums[i];
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
    // Read before the output is written: it may be the same row.
    const T picked = load_part<T, S>(z + label, 1, T(0))[0] - top;
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
            factor =
                third_factor(load_some<T, S>(u + i, count), vi, broadcast(pu), broadcast(pv), broadcast(puv));
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
