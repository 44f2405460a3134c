// Rows of many classes: one row at a time, along its classes.

template <typename S>
inline S* row_of(const Operand& operand, int64_t row) {
  return static_cast<S*>(operand.data) + row * operand.row_stride;
}

// Calls f(i, k, count) for the vectors of a row; count < width only for the last. Each k = 0, ..., 3 is to
// have sums of its own: additions to one of them would wait for each other. Calls f_near instead for vectors
// that may hold element `at`.
template <typename T, typename F, typename G>
DYNLOSS_ALWAYS_INLINE void for_vectors(int64_t C, int64_t at, F&& f, G&& f_near) {
  int64_t i = 0;
  for (; i + 4 * width<T> <= C; i += 4 * width<T>)
    if (at - i < 0 || at - i >= 4 * width<T>)
      unrolled<4>([&](int k) DYNLOSS_ALWAYS_INLINE_LAMBDA { f(i + k * width<T>, k, width<T>); });
    else
      unrolled<4>([&](int k) DYNLOSS_ALWAYS_INLINE_LAMBDA { f_near(i + k * width<T>, k, width<T>); });
  for (; i + width<T> <= C; i += width<T>) f_near(i, 0, width<T>);
  if (i < C) f_near(i, 1, static_cast<int>(C - i));
}
template <typename T, typename F>
DYNLOSS_ALWAYS_INLINE void for_vectors(int64_t C, F&& f) {
  for_vectors<T>(C, -1 - C, f, f);
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

// What the rows of a block share.
template <typename T>
struct LongRows {
  explicit LongRows(const Block& block, int64_t exponentials)
      : num_classes(block.num_classes),
        smooth(block.label_smoothing != 0),
        target(block.weights_sum, block.label_smoothing, block.num_classes),
        weights(smooth ? block.num_classes : 0),
        buffer(exponentials) {
    for (int64_t c = 0; smooth && c < num_classes; ++c) weights.data()[c] = static_cast<T>(block.weights[c]);
  }
  int64_t num_classes;
  bool smooth;
  SharedTargetWeights<T> target;
  Buffer<T> weights;
  Buffer<T> buffer;  // exp(z - max) of a row, where the output cannot hold it
};

// What a pass over a row tells, e = exp(z - max).
template <typename T>
struct LongSums {
  RowSum<T> e;     // along directions, all of it as others
  T smoothed;      // Σ Γ_c (z_c - max)
  T v_top, u_top;  // the directions at a class with e = 1
};

// Writes e where K needs it.
template <typename T, typename S, Kind K>
DYNLOSS_ALWAYS_INLINE LongSums<T> exponentials(const LongRows<T>& shared, const S* z, int64_t label, T top,
                                               T* e, const S* u, const S* v) {
  const T lowest = -static_cast<T>(INFINITY);
  Mask<T> lane{};
  for (int j = 0; j < width<T>; ++j) lane[j] = j;
  Vec<T> sums[4] = {}, smoothed[4] = {}, of_label{}, v_top = broadcast(lowest), u_top = broadcast(lowest);
  const auto exponentials_at = [&](int64_t i, int k, int count) DYNLOSS_ALWAYS_INLINE_LAMBDA {
    const Vec<T> shifted = load_some<T, S>(z + i, count, lowest) - top;
    if (has_loss_v<K> && shared.smooth) {
      const Vec<T> gamma = load_some<T, T>(shared.weights.data() + i, count);
      smoothed[k] += count == width<T> ? gamma * shifted : (gamma != T(0) ? gamma * shifted : Vec<T>{});
    }
    const Vec<T> exps = exp_nonpositive(shifted);
    if constexpr (has_v_v<K>) v_top = exps < 1.0f ? v_top : load_some<T, S>(v + i, count);
    if constexpr (K == Kind::third) u_top = exps < 1.0f ? u_top : load_some<T, S>(u + i, count);
    if constexpr (has_output_v<K>) store_some<T, T>(e + i, exps, count);
    return exps;
  };
  for_vectors<T>(
      shared.num_classes, has_v_v<K> ? -1 - shared.num_classes : label,
      [&](int64_t i, int k, int count)
          DYNLOSS_ALWAYS_INLINE_LAMBDA { sums[k] += exponentials_at(i, k, count); },
      [&](int64_t i, int k, int count) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        const Vec<T> exps = exponentials_at(i, k, count);
        const Mask<T> here = lane == static_cast<Lane<T>>(has_v_v<K> ? -1 : label - i);
        of_label = here ? exps : of_label;
        sums[k] = here ? sums[k] : sums[k] + exps;
      });
  return {{horizontal_sum<T>(of_label), horizontal_sum<T>(sums)},
          horizontal_sum<T>(smoothed),
          horizontal_max<T>(v_top),
          horizontal_max<T>(u_top)};
}

template <typename T, typename S>
DYNLOSS_ALWAYS_INLINE void write_gradient(const LongRows<T>& shared, const RowGradient<T>& gradient,
                                          const T* e, int64_t label, S* out) {
  for_vectors<T>(shared.num_classes, [&](int64_t i, int, int count) DYNLOSS_ALWAYS_INLINE_LAMBDA {
    Vec<T> x = gradient.of_softmax(load_some<T, T>(e + i, count));
    if (shared.smooth) x -= gradient.of_smoothing(load_some<T, T>(shared.weights.data() + i, count));
    store_some<T, S>(out + i, x, count);
  });
  store_part<T, S>(out + label, broadcast(gradient.at_label), 1);
}

// Q p∘f, the derivatives along directions.
template <typename T, typename S, Kind K>
DYNLOSS_ALWAYS_INLINE void write_along(int64_t C, T scaled_total, const LongSums<T>& sums, const T* e,
                                       const S* u, const S* v, S* out) {
  using Products = InnerProducts<Vec<T>>;
  const Products none{broadcast(sums.v_top), broadcast(sums.u_top)};
  Products parts[4] = {none, none, none, none};
  for_vectors<T>(C, [&](int64_t i, int k, int count) DYNLOSS_ALWAYS_INLINE_LAMBDA {
    const Vec<T> some = load_some<T, T>(e + i, count), vi = load_some<T, S>(v + i, count);
    if constexpr (K == Kind::third)
      parts[k].add(some, load_some<T, S>(u + i, count), vi);
    else
      parts[k].add(some, vi);
  });
  const auto whole = [&](Vec<T> Products::* part) DYNLOSS_ALWAYS_INLINE_LAMBDA {
    const Vec<T> four[4] = {parts[0].*part, parts[1].*part, parts[2].*part, parts[3].*part};
    return broadcast(horizontal_sum<T>(four) / sums.e.others);
  };
  Products products = none;
  products.pv = whole(&Products::pv);
  if constexpr (K == Kind::third) products.pu = whole(&Products::pu), products.puv = whole(&Products::puv);
  for_vectors<T>(C, [&](int64_t i, int, int count) DYNLOSS_ALWAYS_INLINE_LAMBDA {
    const Vec<T> vi = load_some<T, S>(v + i, count);
    Vec<T> factor;
    if constexpr (K == Kind::third)
      factor = products.factor(load_some<T, S>(u + i, count), vi);
    else
      factor = products.factor(vi);
    store_some<T, S>(out + i, load_some<T, T>(e + i, count) * scaled_total * factor, count);
  });
}

// Returns the loss.
template <typename T, typename S, Kind K>
DYNLOSS_ALWAYS_INLINE T run_long_row(const Block& block, const LongRows<T>& shared, int64_t row) {
  const int64_t C = shared.num_classes;
  const S* z = row_of<S>(block.logits, row);
  const S* v = row_of<S>(block.v, row);
  const S* u = row_of<S>(block.u, row);
  const int64_t label = block.labels[row];
  const TargetWeights<T> q = shared.target.at(static_cast<T>(block.weights[label]));
  const T top = row_max<T, S>(z, C);
  // In the output itself where that has the type of the arithmetic.
  T* e = nullptr;
  if constexpr (has_output_v<K>) {
    if constexpr (std::is_same_v<T, S>)
      e = row_of<S>(block.out, row);
    else
      e = shared.buffer.data();
  }
  // Read before the output is written: it may be the same row.
  const T picked = load_part<T, S>(z + label, 1, T(0))[0] - top;
  const LongSums<T> sums = exponentials<T, S, K>(shared, z, label, top, e, u, v);
  if constexpr (has_output_v<K>) {
    T scale = static_cast<T>(block.scale);
    if (block.row_scale != nullptr) scale *= static_cast<const T*>(block.row_scale)[row];
    S* out = row_of<S>(block.out, row);
    if constexpr (has_v_v<K>)
      write_along<T, S, K>(C, scale * q.total / sums.e.others, sums, e, u, v, out);
    else
      write_gradient<T, S>(shared, {scale, q, sums.e}, e, label, out);
  }
  if constexpr (has_loss_v<K>) {
    T linear = q.on_label * picked;
    if (shared.smooth) linear += q.spread * sums.smoothed;
    return q.loss(sums.e, linear);
  }
  return T(0);
}

template <typename T, typename S, Kind K>
double run_long_rows(const Block& block, int64_t begin, int64_t end) {
  const LongRows<T> shared(block, has_output_v<K> && !std::is_same_v<T, S> ? block.num_classes : 0);
  double loss_sum = 0;
  for (int64_t row = begin; row < end; ++row) {
    if (block.labels[row] == block.ignore_index) {
      if (block.row_loss != nullptr) static_cast<S*>(block.row_loss)[row] = S{};
      if (has_output_v<K>) std::memset(row_of<S>(block.out, row), 0, block.num_classes * sizeof(S));
      continue;
    }
    const T loss = run_long_row<T, S, K>(block, shared, row);
    if constexpr (has_loss_v<K>) {
      loss_sum += static_cast<double>(loss);
      if (block.row_loss != nullptr)
        store_part<T, S>(static_cast<S*>(block.row_loss) + row, broadcast(loss), 1);
    }
  }
  return loss_sum;
}
