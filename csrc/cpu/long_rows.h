// Rows of many classes: one row at a time, along its classes.

template <typename S>
inline S* row_of(const Operand& operand, int64_t row) {
  return static_cast<S*>(operand.data) + row * operand.row_stride;
}

// Calls f(i, k, count) for the vectors of a row; count < width only for the last. Each k = 0, ..., 3 is to
// have sums of its own: additions to one of them would wait for each other.
template <typename T, typename F>
DYNLOSS_ALWAYS_INLINE void for_vectors(int64_t C, F&& f) {
  int64_t i = 0;
  for (; i + 4 * width<T> <= C; i += 4 * width<T>)
    unrolled<4>([&](int k) DYNLOSS_ALWAYS_INLINE_LAMBDA { f(i + k * width<T>, k, width<T>); });
  for (; i + width<T> <= C; i += width<T>) f(i, 0, width<T>);
  if (i < C) f(i, 1, static_cast<int>(C - i));
}

template <typename T>
inline T horizontal_sum(const Vec<T> (&x)[4]) {
  return horizontal_sum<T>((x[0] + x[1]) + (x[2] + x[3]));
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

template <typename T, typename S>
inline T row_max(const S* z, int64_t C) {
  const T lowest = -static_cast<T>(INFINITY);
  Vec<T> tops[4];
  for (auto& top : tops) top = broadcast(lowest);
  for_vectors<T>(C, [&](int64_t i, int k, int count) DYNLOSS_ALWAYS_INLINE_LAMBDA {
    tops[k] = maximum(load_some<T, S>(z + i, count, lowest), tops[k]);
  });
  return horizontal_max<T>(maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3])));
}

// std::vector would fill it, and is code that other instruction sets may share.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(std::malloc(size * sizeof(T)))) {}
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

template <typename T, typename S, Kind K>
double run_long_rows(const Block& block, int64_t begin, int64_t end) {
  const int64_t C = block.num_classes;
  const T lowest = -static_cast<T>(INFINITY);
  const bool smooth = block.label_smoothing != 0;
  // exp(z - max) of the row in the type of the arithmetic: in the output itself where that has it.
  constexpr bool in_place = std::is_same_v<T, S>;
  const Buffer<T> buffer(has_output_v<K> && !in_place ? C : 0), weights(smooth ? C : 0);
  for (int64_t c = 0; smooth && c < C; ++c) weights.data()[c] = static_cast<T>(block.weights[c]);
  double loss_sum = 0;
  for (int64_t row = begin; row < end; ++row) {
    const S* z = row_of<S>(block.logits, row);
    const int64_t label = block.labels[row];
    if (label == block.ignore_index) {
      if (block.row_loss != nullptr) static_cast<S*>(block.row_loss)[row] = S{};
      if (has_output_v<K>) std::memset(row_of<S>(block.out, row), 0, C * sizeof(S));
      continue;
    }
    const TargetWeights<T> q(block.weights[label], block.weights_sum, block.label_smoothing, C);
    const T top = row_max<T, S>(z, C);
    T* e = nullptr;
    if constexpr (has_output_v<K>) {
      if constexpr (in_place)
        e = row_of<S>(block.out, row);
      else
        e = buffer.data();
    }
    // Read before the output is written: it may be the same row.
    const T picked = load_part<T, S>(z + label, 1, T(0))[0] - top;
    Vec<T> sums[4] = {}, linears[4] = {};
    for_vectors<T>(C, [&](int64_t i, int k, int count) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      const Vec<T> shifted = load_some<T, S>(z + i, count, lowest) - top;
      if (has_loss_v<K> && smooth) {
        const Vec<T> gamma = load_some<T, T>(weights.data() + i, count);
        linears[k] += count == width<T> ? gamma * shifted : (gamma != T(0) ? gamma * shifted : Vec<T>{});
      }
      const Vec<T> exps = exp_nonpositive(shifted);
      sums[k] += exps;
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
      S* out = row_of<S>(block.out, row);
      if constexpr (K == Kind::gradient || K == Kind::loss_and_gradient) {
        const T at_all = scale * q.spread;
        for_vectors<T>(C, [&](int64_t i, int k, int count) DYNLOSS_ALWAYS_INLINE_LAMBDA {
          Vec<T> x = load_some<T, T>(e + i, count) * scaled_total;
          if (smooth) x -= at_all * load_some<T, T>(weights.data() + i, count);
          store_some<T, S>(out + i, x, count);
        });
        const T here = in_place ? static_cast<T>(e[label])
                                : e[label] * scaled_total - (smooth ? at_all * weights.data()[label] : T(0));
        store_part<T, S>(out + label, broadcast(here - scale * q.on_label), 1);
      } else {
        const S* v = row_of<S>(block.v, row);
        const S* u = K == Kind::third ? row_of<S>(block.u, row) : v;
        Vec<T> pvs[4] = {}, pus[4] = {}, puvs[4] = {};
        for_vectors<T>(C, [&](int64_t i, int k, int count) DYNLOSS_ALWAYS_INLINE_LAMBDA {
          const Vec<T> weighted = load_some<T, T>(e + i, count) * load_some<T, S>(v + i, count);
          pvs[k] += weighted;
          if constexpr (K == Kind::third) {
            const Vec<T> ui = load_some<T, S>(u + i, count);
            pus[k] += load_some<T, T>(e + i, count) * ui;
            puvs[k] += weighted * ui;
          }
        });
        const T pv = horizontal_sum<T>(pvs) / sum;
        const T pu = horizontal_sum<T>(pus) / sum, puv = horizontal_sum<T>(puvs) / sum;
        for_vectors<T>(C, [&](int64_t i, int k, int count) DYNLOSS_ALWAYS_INLINE_LAMBDA {
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
