// A block of samples of one perceptron, of any shape: the way there and back, and along a direction. Included
// once per instruction set after vector.h, as rows.h is. A vector holds as many samples; the tiles of planes
// below are sized so that their sums stay in registers.

constexpr int tile_planes = VECTOR_BYTES == 64 ? perceptron_tile_planes : 2;
constexpr int tile_vectors = VECTOR_BYTES == 64 ? 4 : 2;

// f<limit>(0), f<limit>(limit), ... and f of how many indices are left.
template <int limit, typename F>
DYNLOSS_ALWAYS_INLINE void in_tiles(int64_t count, F&& f) {
  int64_t first = 0;
  for (; first + limit <= count; first += limit) f.template operator()<limit>(first);
  const auto rest = [&]<int n>(const auto& self) DYNLOSS_ALWAYS_INLINE_LAMBDA {
    if constexpr (n > 0) {
      if (count - first == n)
        f.template operator()<n>(first);
      else
        self.template operator()<n - 1>(self);
    }
  };
  rest.template operator()<limit - 1>(rest);
}

// Planes of samples, one below the other.
template <typename T>
struct Planes {
  const T* data;
  int64_t stride;

  const T* operator[](int64_t i) const { return data + i * stride; }
};

// A matrix of weights, either way up.
template <typename T>
struct Weights {
  const T* data;
  int64_t row_stride, column_stride;

  Weights from_row(int64_t row) const { return {data + row * row_stride, row_stride, column_stride}; }
};

// Some planes by some vectors of samples.
template <typename T, int I, int V>
using Tile = Vec<T>[I][V];

template <typename T, int I, int V>
DYNLOSS_ALWAYS_INLINE void fill(Tile<T, I, V>& tile, const T* values) {
  unrolled<I>([&](int i) DYNLOSS_ALWAYS_INLINE_LAMBDA {
    unrolled<V>([&](int v) DYNLOSS_ALWAYS_INLINE_LAMBDA { tile[i][v] = broadcast(values[i]); });
  });
}

template <typename T, int I, int V>
DYNLOSS_ALWAYS_INLINE void clear(Tile<T, I, V>& tile) {
  unrolled<I>([&](int i) DYNLOSS_ALWAYS_INLINE_LAMBDA {
    unrolled<V>([&](int v) DYNLOSS_ALWAYS_INLINE_LAMBDA { tile[i][v] = Vec<T>{}; });
  });
}

// tile += weights @ planes, at the vectors of samples from `first`; weights has `count` columns.
template <typename T, int I, int V>
DYNLOSS_ALWAYS_INLINE void add_product(Tile<T, I, V>& tile, const Weights<T>& weights,
                                       const Planes<T>& planes, int64_t count, int64_t first) {
  const T* x = planes.data + first;
  const T* w = weights.data;
  for (int64_t j = 0; j < count; ++j, x += planes.stride, w += weights.column_stride) {
    Vec<T> vectors[V];
    unrolled<V>([&](int v) DYNLOSS_ALWAYS_INLINE_LAMBDA { vectors[v] = load(x + v * width<T>); });
    unrolled<I>([&](int i) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      const Vec<T> weight = broadcast(w[i * weights.row_stride]);
      unrolled<V>([&](int v) DYNLOSS_ALWAYS_INLINE_LAMBDA { tile[i][v] += weight * vectors[v]; });
    });
  }
}

// *out(i) += the sum of the lanes of sums[i].
template <typename T, int n, typename F>
DYNLOSS_ALWAYS_INLINE void add_lanes(const Vec<T>* sums, F&& out) {
  constexpr int all = (n + width<T> - 1) / width<T> * width<T>;
  Vec<T> padded[all] = {};
  unrolled<n>([&](int i) DYNLOSS_ALWAYS_INLINE_LAMBDA { padded[i] = sums[i]; });
  T lanes[all];
  unrolled<all / width<T>>([&](int i) DYNLOSS_ALWAYS_INLINE_LAMBDA {
    store(lanes + i * width<T>, horizontal_sums<T>(padded + i * width<T>));
  });
  unrolled<n>([&](int i) DYNLOSS_ALWAYS_INLINE_LAMBDA { *out(i) += lanes[i]; });
}

// out (strided) += a @ bᵀ: the inner products of every plane of a with every one of b over `samples`.
template <typename T, int I, int J>
DYNLOSS_ALWAYS_INLINE void add_inner_products(const Planes<T>& a, const Planes<T>& b, int64_t samples, T* out,
                                              int64_t row_stride, int64_t column_stride) {
  Vec<T> sums[I * J] = {};
  for (int64_t n = 0; n < samples; n += width<T>) {
    Vec<T> vectors[J];
    unrolled<J>([&](int j) DYNLOSS_ALWAYS_INLINE_LAMBDA { vectors[j] = load(b[j] + n); });
    unrolled<I>([&](int i) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      const Vec<T> x = load(a[i] + n);
      unrolled<J>([&](int j) DYNLOSS_ALWAYS_INLINE_LAMBDA { sums[i * J + j] += x * vectors[j]; });
    });
  }
  add_lanes<T, I * J>(sums, [&](int k) { return out + k / J * row_stride + k % J * column_stride; });
}

// ---- the activation: its value, and its derivatives by that value

template <Activation A, typename T>
DYNLOSS_ALWAYS_INLINE Vec<T> activated(Vec<T> x) {
  if constexpr (A == Activation::relu)
    return x < T(0) ? Vec<T>{} : x;  // NaN stays
  else
    return hyperbolic_tangent<T>(x);
}

// x · act'
template <Activation A, typename T>
DYNLOSS_ALWAYS_INLINE Vec<T> times_slope(Vec<T> x, Vec<T> value) {
  if constexpr (A == Activation::relu)
    return value > T(0) ? x : Vec<T>{};
  else
    return x - x * value * value;
}

// ---- the block

// When a direction of the logits is wanted: not, with the rows, or any number of them later.
enum class Along { never, now, later };

template <typename T, Activation A>
struct Perceptron {
  const PerceptronMember<T>& member;
  int64_t first, samples;  // of the block

  const PerceptronShape& shape = member.shape;
  const int64_t D = shape.inputs, H = shape.hidden, C = shape.classes;
  const int64_t vectors = samples / width<T>;

  Planes<T> inputs() const { return {member.inputs + first, member.padded}; }
  Planes<T> hidden() const { return {member.hidden, member.block}; }
  Planes<T> hidden_along() const { return {member.hidden_along, member.block}; }
  Planes<T> logits() const { return {member.logits, member.block}; }
  Planes<T> logits_along() const { return {member.logits_along, member.block}; }
  Planes<T> tile() const { return {member.tile, member.block}; }
  // Of `flat`, which is the parameters or a direction: rows are what is computed.
  Weights<T> to_hidden(const T* flat) const { return {flat, 1, H}; }
  Weights<T> to_logits(const T* flat) const { return {flat + shape.w2(), 1, C}; }
  Weights<T> from_logits(const T* flat) const { return {flat + shape.w2(), C, 1}; }

  template <bool along>
  void forward(const T* v) const {
    const T* p = member.parameters;
    in_tiles<tile_vectors>(vectors, [&]<int V>(int64_t vector) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      const int64_t n = vector * width<T>;
      in_tiles<tile_planes>(H, [&]<int I>(int64_t h) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        Tile<T, I, V> x;
        fill<T, I, V>(x, p + shape.b1() + h);
        add_product<T, I, V>(x, to_hidden(p).from_row(h), inputs(), D, n);
        each<I, V>([&](int i, int k, int64_t at) DYNLOSS_ALWAYS_INLINE_LAMBDA {
          x[i][k] = activated<A, T>(x[i][k]);
          store(member.hidden + (h + i) * member.block + n + at, x[i][k]);
        });
        if constexpr (along) {
          Tile<T, I, V> y;
          fill<T, I, V>(y, v + shape.b1() + h);
          add_product<T, I, V>(y, to_hidden(v).from_row(h), inputs(), D, n);
          each<I, V>([&](int i, int k, int64_t at) DYNLOSS_ALWAYS_INLINE_LAMBDA {
            store(member.hidden_along + (h + i) * member.block + n + at, times_slope<A, T>(y[i][k], x[i][k]));
          });
        }
      });
      in_tiles<tile_planes>(C, [&]<int I>(int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        Tile<T, I, V> z;
        fill<T, I, V>(z, p + shape.b2() + c);
        add_product<T, I, V>(z, to_logits(p).from_row(c), hidden(), H, n);
        write<I, V>(member.logits, c, n, z);
        if constexpr (along) {
          fill<T, I, V>(z, v + shape.b2() + c);
          add_product<T, I, V>(z, to_logits(v).from_row(c), hidden(), H, n);
          add_product<T, I, V>(z, to_logits(p).from_row(c), hidden_along(), H, n);
          write<I, V>(member.logits_along, c, n, z);
        }
      });
    });
  }

  // The logits become their gradient, of the mean over all samples.
  template <int Classes, Along how>
  void rows(PerceptronSums* sums) const {
    const Lane<T> classes = static_cast<Lane<T>>(C);
    const SharedTargetWeights<T> shared(0.0, 0.0, C);
    const T mean = static_cast<T>(1.0 / static_cast<double>(shape.samples));
    Vec<double> weighted{}, plain{};
    Vec<double> correct{};
    for (int64_t n = 0; n < samples; n += width<T>) {
      const Labels<T> labels(member.labels + first + n, no_label);
      T* z = member.logits + n;
      const auto at = [&](int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA { return z + c * member.block; };
      Vec<T> top = load(at(0));
      for_classes<Classes>(classes,
                           [&](int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA { top = maximum(load(at(c)), top); });
      Vec<T> gamma{}, picked{};
      RowSum<Vec<T>> sum{};
      Mask<T> seen{}, right{};  // the first class that attains the maximum is the network's answer
      for_classes<Classes>(classes, [&](int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        const Mask<T> here = labels.index == static_cast<Lane<T>>(c);
        const Vec<T> shifted = load(at(c)) - top, e = exp_nonpositive(shifted);
        gamma = here ? broadcast(static_cast<T>(member.gamma[c])) : gamma;
        picked = here ? shifted : picked;
        sum.label = here ? e : sum.label;
        sum.others = here ? sum.others : sum.others + e;
        const Mask<T> is_top = shifted == T(0);
        right |= is_top & here & ~seen;
        seen |= is_top;
        store(at(c), e);
        if constexpr (how == Along::later) store(member.softmax + c * member.block + n, e);
      });
      const TargetWeights<Vec<T>> q = shared.at(gamma);
      if (sums != nullptr) {
        const Vec<T> log_sum = log_of_sum(sum.all(), sum.rest());
        const Vec<T> loss = labels.counted ? log_sum - picked : Vec<T>{};
        add_wide<T>(plain, loss);
        add_wide<T>(weighted, q.total * loss);
        add_wide<T>(correct, right ? broadcast(T(1)) : Vec<T>{});
      }
      const RowGradient<Vec<T>> gradient(broadcast(mean), q, sum);
      if constexpr (how == Along::now) row_along<Classes>(n, labels, at, sum.all(), gradient.factor);
      if constexpr (how == Along::later) {
        store(member.softmax + C * member.block + n, sum.all());
        store(member.softmax + (C + 1) * member.block + n, gradient.factor);
      }
      for_classes<Classes>(classes, [&](int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        const Mask<T> here = labels.index == static_cast<Lane<T>>(c);
        const Vec<T> x = here ? gradient.at_label : gradient.of_softmax(load(at(c)));
        store(at(c), labels.counted ? x : Vec<T>{});
      });
    }
    if (sums == nullptr) return;
    sums->weighted_loss += horizontal_sum<double>(weighted);
    sums->loss += horizontal_sum<double>(plain);
    sums->correct += horizontal_sum<double>(correct);
  }

  // A direction of the logits becomes the derivative of their gradient along it, after rows with
  // Along::later.
  template <int Classes>
  void rows_along() const {
    for (int64_t n = 0; n < samples; n += width<T>) {
      const auto kept = [&](int64_t i)
                            DYNLOSS_ALWAYS_INLINE_LAMBDA { return member.softmax + i * member.block + n; };
      row_along<Classes>(n, Labels<T>(member.labels + first + n, no_label), kept, load(kept(C)),
                         load(kept(C + 1)));
    }
  }

  // The same of the samples from n on. e(c): where exp(z_c - max) is.
  template <int Classes, typename E>
  DYNLOSS_ALWAYS_INLINE_MEMBER void row_along(int64_t n, const Labels<T>& labels, E&& e, Vec<T> sum,
                                              Vec<T> factor) const {
    const Lane<T> classes = static_cast<Lane<T>>(C);
    const auto y = [&](int64_t c)
                       DYNLOSS_ALWAYS_INLINE_LAMBDA { return member.logits_along + c * member.block + n; };
    InnerProducts<Vec<T>> products;
    for_classes<Classes>(classes, [&](int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      products.v_top = load(e(c)) == T(1) ? load(y(c)) : products.v_top;
    });
    for_classes<Classes>(
        classes, [&](int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA { products.add(load(e(c)), load(y(c))); });
    products.divide(sum);
    for_classes<Classes>(classes, [&](int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      const Vec<T> x = factor * load(e(c)) * products.factor(load(y(c)));
      store(y(c), labels.counted ? x : Vec<T>{});
    });
  }

  // From the gradients of the logits to those of the parameters; with `along`, to the derivatives of these.
  template <bool along>
  void backward(const T* v, T* out) const {
    const T* p = member.parameters;
    const Planes<T> from = along ? logits_along() : logits();
    in_tiles<tile_planes>(H, [&]<int I>(int64_t h) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      Vec<T> sums[I] = {};
      in_tiles<tile_vectors>(vectors, [&]<int V>(int64_t vector) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        const int64_t n = vector * width<T>;
        Tile<T, I, V> x, y;
        clear<T, I, V>(x);
        add_product<T, I, V>(x, from_logits(p).from_row(h), from, C, n);
        if constexpr (along) {
          add_product<T, I, V>(x, from_logits(v).from_row(h), logits(), C, n);
          if constexpr (A == Activation::tanh) {
            clear<T, I, V>(y);
            add_product<T, I, V>(y, from_logits(p).from_row(h), logits(), C, n);
          }
        }
        each<I, V>([&](int i, int k, int64_t at) DYNLOSS_ALWAYS_INLINE_LAMBDA {
          const Vec<T> value = load(hidden()[h + i] + n + at);
          Vec<T> result = times_slope<A, T>(x[i][k], value);
          if constexpr (along && A == Activation::tanh)
            result -= T(2) * value * load(hidden_along()[h + i] + n + at) * y[i][k];
          sums[i] += result;
          store(member.tile + i * member.block + n + at, result);
        });
      });
      add_lanes<T, I>(sums, [&](int i) { return out + shape.b1() + h + i; });
      in_tiles<4>(D, [&]<int J>(int64_t d) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        add_inner_products<T, I, J>(tile(), {inputs()[d], member.padded}, samples, out + d * H + h, 1, H);
      });
      in_tiles<4>(C, [&]<int J>(int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        T* to = out + shape.w2() + h * C + c;
        const Planes<T> values{hidden()[h], member.block};
        add_inner_products<T, I, J>(values, {from[c], member.block}, samples, to, C, 1);
        if constexpr (along)
          add_inner_products<T, I, J>({hidden_along()[h], member.block}, {logits()[c], member.block}, samples,
                                      to, C, 1);
      });
    });
    backward_biases<along>(out);
  }

  template <bool along>
  void backward_biases(T* out) const {
    const Planes<T> from = along ? logits_along() : logits();
    for (int64_t c = 0; c < C; ++c) {
      Vec<T> sum{};
      for (int64_t n = 0; n < samples; n += width<T>) sum += load(from[c] + n);
      out[shape.b2() + c] += horizontal_sum<T>(sum);
    }
  }

 private:
  template <int I, int V, typename F>
  DYNLOSS_ALWAYS_INLINE_MEMBER static void each(F&& f) {
    unrolled<I>([&](int i) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      unrolled<V>([&](int k) DYNLOSS_ALWAYS_INLINE_LAMBDA { f(i, k, k * width<T>); });
    });
  }

  template <int I, int V>
  DYNLOSS_ALWAYS_INLINE_MEMBER void write(T* planes, int64_t plane, int64_t n, const Tile<T, I, V>& x) const {
    each<I, V>([&](int i, int k, int64_t at) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      store(planes + (plane + i) * member.block + n + at, x[i][k]);
    });
  }
};
