// The perceptron kernels for one instruction set, included like rows.h after vector.h. A vector holds as many
// samples; the tiles of planes below are sized so that their sums stay in registers.

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

// ---- a block of samples of one member

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

  // The logits become their gradient, of the mean over all samples; along a direction of the logits, too.
  template <int Classes, bool along>
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
      Vec<T> gamma{}, picked{}, along_top{};
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
        if constexpr (along)
          along_top = is_top ? load(member.logits_along + c * member.block + n) : along_top;
        seen |= is_top;
        store(at(c), e);
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
      if constexpr (along) {
        InnerProducts<Vec<T>> products;
        products.v_top = along_top;
        T* y = member.logits_along + n;
        for_classes<Classes>(classes, [&](int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
          products.add(load(at(c)), load(y + c * member.block));
        });
        products.divide(sum.all());
        for_classes<Classes>(classes, [&](int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
          const Vec<T> x = gradient.factor * load(at(c)) * products.factor(load(y + c * member.block));
          store(y + c * member.block, labels.counted ? x : Vec<T>{});
        });
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

// ---- few inputs and classes
//
// Where a unit's weights and sums, and what a sample has of inputs and classes, fit into registers, hidden
// values are computed on the way back a second time: that is less than to bring them from the second cache.

template <typename T, Activation A, int D, int C, bool along>
struct FewPlanes {
  static constexpr int units = VECTOR_BYTES == 64 && !along ? 2 : 1;
  // With 16 registers a product's weights would be read from memory for every vector of samples, too.
  static constexpr bool sums_in_registers = VECTOR_BYTES == 64 || !along;
  using Block = Perceptron<T, A>;

  // A hidden unit by the parameters or a direction.
  struct Unit {
    T input[D], bias, output[C];

    DYNLOSS_ALWAYS_INLINE_MEMBER Unit(const PerceptronShape& shape, const T* flat, int64_t h) {
      unrolled<D>([&](int d) DYNLOSS_ALWAYS_INLINE_LAMBDA { input[d] = flat[d * shape.hidden + h]; });
      bias = flat[shape.b1() + h];
      unrolled<C>([&](int c) DYNLOSS_ALWAYS_INLINE_LAMBDA { output[c] = flat[shape.w2() + h * C + c]; });
    }
    DYNLOSS_ALWAYS_INLINE_MEMBER Vec<T> before(const Vec<T>* x) const {
      Vec<T> sum = broadcast(bias);
      unrolled<D>([&](int d) DYNLOSS_ALWAYS_INLINE_LAMBDA { sum += input[d] * x[d]; });
      return sum;
    }
    DYNLOSS_ALWAYS_INLINE_MEMBER Vec<T> back(const Vec<T>* g) const {
      Vec<T> sum = output[0] * g[0];
      unrolled<C - 1>([&](int c) DYNLOSS_ALWAYS_INLINE_LAMBDA { sum += output[c + 1] * g[c + 1]; });
      return sum;
    }
  };

  static void forward(const Block& block, const T* v) {
    const PerceptronMember<T>& member = block.member;
    const PerceptronShape& shape = block.shape;
    const T* p = member.parameters;
    constexpr int most = along ? tile_vectors / 2 : tile_vectors;
    in_tiles<most>(block.vectors, [&]<int V>(int64_t vector) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      const int64_t n = vector * width<T>;
      Vec<T> x[V][D], z[V][C], y[V][C];
      unrolled<V>([&](int k) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        unrolled<D>([&](int d) DYNLOSS_ALWAYS_INLINE_LAMBDA {
          x[k][d] = load(block.inputs()[d] + n + k * width<T>);
        });
        unrolled<C>([&](int c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
          z[k][c] = broadcast(p[shape.b2() + c]);
          if constexpr (along) y[k][c] = broadcast(v[shape.b2() + c]);
        });
      });
      for (int64_t h = 0; h < shape.hidden; ++h) {
        const Unit unit(shape, p, h), change(shape, along ? v : p, h);
        unrolled<V>([&](int k) DYNLOSS_ALWAYS_INLINE_LAMBDA {
          const Vec<T> value = activated<A, T>(unit.before(x[k]));
          unrolled<C>([&](int c) DYNLOSS_ALWAYS_INLINE_LAMBDA { z[k][c] += value * unit.output[c]; });
          if constexpr (along) {
            const Vec<T> moved = times_slope<A, T>(change.before(x[k]), value);
            unrolled<C>([&](int c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
              y[k][c] += value * change.output[c];
              y[k][c] += moved * unit.output[c];
            });
          }
        });
      }
      unrolled<V>([&](int k) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        unrolled<C>([&](int c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
          store(member.logits + c * member.block + n + k * width<T>, z[k][c]);
          if constexpr (along) store(member.logits_along + c * member.block + n + k * width<T>, y[k][c]);
        });
      });
    });
  }

  // What a vector of samples has: inputs, gradients of the logits and, along a direction, their derivatives.
  struct Samples {
    Vec<T> x[D], g[C], r[C];

    DYNLOSS_ALWAYS_INLINE_MEMBER Samples(const Block& block, int64_t n) {
      unrolled<D>([&](int d) DYNLOSS_ALWAYS_INLINE_LAMBDA { x[d] = load(block.inputs()[d] + n); });
      unrolled<C>([&](int c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        g[c] = load(block.logits()[c] + n);
        if constexpr (along) r[c] = load(block.logits_along()[c] + n);
      });
    }
  };

  // The derivatives by a unit's parameters: of its inputs' weights, of its bias, of its outputs' weights.
  static constexpr int of_unit = D + 1 + C;

  DYNLOSS_ALWAYS_INLINE_MEMBER static void add_derivatives(const Samples& at, const Unit& unit,
                                                           const Unit& change, Vec<T>* sum) {
    const Vec<T> value = activated<A, T>(unit.before(at.x));
    Vec<T> back = unit.back(along ? at.r : at.g), moved{};
    if constexpr (along) {
      moved = times_slope<A, T>(change.before(at.x), value);
      back += change.back(at.g);
    }
    back = times_slope<A, T>(back, value);
    if constexpr (along && A == Activation::tanh) back -= T(2) * value * moved * unit.back(at.g);
    unrolled<D>([&](int d) DYNLOSS_ALWAYS_INLINE_LAMBDA { sum[d] += back * at.x[d]; });
    sum[D] += back;
    unrolled<C>([&](int c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      sum[D + 1 + c] += value * (along ? at.r[c] : at.g[c]);
      if constexpr (along) sum[D + 1 + c] += moved * at.g[c];
    });
  }

  // Of I units from h on.
  template <int I>
  DYNLOSS_ALWAYS_INLINE_MEMBER static void write_sums(const PerceptronShape& shape, const Vec<T>* sums,
                                                      int64_t h, T* out) {
    add_lanes<T, I * of_unit>(sums, [&](int k) {
      const int64_t unit = h + k / of_unit, place = k % of_unit;
      return out + (place < D    ? place * shape.hidden + unit
                    : place == D ? shape.b1() + unit
                                 : shape.w2() + unit * C + place - D - 1);
    });
  }

  static void backward(const Block& block, const T* v, T* out) {
    const PerceptronShape& shape = block.shape;
    const T* p = block.member.parameters;
    const auto unit_of = [&](const T* flat, int64_t h)
                             DYNLOSS_ALWAYS_INLINE_LAMBDA { return Unit(shape, along ? flat : p, h); };
    if constexpr (sums_in_registers) {
      in_tiles<units>(shape.hidden, [&]<int I>(int64_t h) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        Vec<T> sums[I * of_unit] = {};
        for (int64_t n = 0; n < block.samples; n += width<T>) {
          const Samples at(block, n);
          unrolled<I>([&](int i) DYNLOSS_ALWAYS_INLINE_LAMBDA {
            add_derivatives(at, Unit(shape, p, h + i), unit_of(v, h + i), sums + i * of_unit);
          });
        }
        write_sums<I>(shape, sums, h, out);
      });
    } else {
      constexpr int most = 64;
      Vec<T> sums[most * of_unit];
      for (int64_t first = 0; first < shape.hidden; first += most) {
        const int64_t count = std::min<int64_t>(most, shape.hidden - first);
        std::fill(sums, sums + count * of_unit, Vec<T>{});
        for (int64_t n = 0; n < block.samples; n += width<T>) {
          const Samples at(block, n);
          for (int64_t i = 0; i < count; ++i)
            add_derivatives(at, Unit(shape, p, first + i), unit_of(v, first + i), sums + i * of_unit);
        }
        for (int64_t i = 0; i < count; ++i) write_sums<1>(shape, sums + i * of_unit, first + i, out);
      }
    }
    block.template backward_biases<along>(out);
  }
};

// f of every block of the member's samples, with the activation known.
template <typename T, typename F>
DYNLOSS_ALWAYS_INLINE void in_blocks(const PerceptronMember<T>& member, F&& f) {
  for (int64_t first = 0; first < member.padded; first += member.block) {
    const int64_t samples = std::min(member.block, member.padded - first);
    if (member.shape.activation == Activation::relu)
      f(Perceptron<T, Activation::relu>{member, first, samples});
    else
      f(Perceptron<T, Activation::tanh>{member, first, samples});
  }
}

// The way there and back of a block; only there, if `out` is null. The numbers of inputs and classes of the
// spirals are known to the compiler.
template <bool along, typename T, Activation A>
void run_block(const Perceptron<T, A>& block, const T* v, PerceptronSums* sums, T* out) {
  using Few = FewPlanes<T, A, 2, 3, along>;
  const bool few = A == Activation::relu && block.shape.inputs == 2 && block.shape.classes == 3;
  if (few)
    Few::forward(block, v);
  else
    block.template forward<along>(v);
  if (block.shape.classes == 3)
    block.template rows<3, along>(sums);
  else
    block.template rows<0, along>(sums);
  if (out == nullptr) return;
  if (few)
    Few::backward(block, v, out);
  else
    block.template backward<along>(v, out);
}

template <typename T>
void evaluate_perceptron(const PerceptronMember<T>& member, PerceptronSums* sums, T* gradient) {
  in_blocks(member, [&](const auto& block) { run_block<false, T>(block, nullptr, sums, gradient); });
}

template <typename T>
void multiply_perceptron(const PerceptronMember<T>& member, const T* v, T* product) {
  in_blocks(member, [&](const auto& block) { run_block<true, T>(block, v, nullptr, product); });
}

template <typename T>
bool descend(int64_t size, T learning_rate, T momentum, const T* parameters, const T* gradient,
             const T* velocity, T* next, T* next_velocity) {
  T not_finite = 0;  // x - x is 0 or NaN
  for (int64_t i = 0; i < size; ++i) {
    T step = gradient[i];
    if (velocity != nullptr) {
      step += momentum * velocity[i];
      next_velocity[i] = step;
    }
    next[i] = parameters[i] - learning_rate * step;
    not_finite += next[i] - next[i];
  }
  return not_finite == T(0);
}
