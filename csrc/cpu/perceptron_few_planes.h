// A block of samples of a perceptron with few inputs and classes and relu, included after perceptron_block.h.
//
// A hidden unit is linear in the samples that activate it. So all that its derivatives need of them are its
// moments: sums of (1, x) ⊗ g over these samples, g the gradients of their logits, which stay in registers.
// And as only differences of logits count, and the gradients of a sample's logits add up to 0, the last class
// needs none: logits are less its own.

#if VECTOR_BYTES == 64
// Which of a vector's samples activate a unit: a bit each, kept from the way there for the way back.
template <typename T>
using Active = std::conditional_t<std::is_same_v<T, float>, __mmask16, __mmask8>;

DYNLOSS_ALWAYS_INLINE __mmask16 activates(Vec<float> x) {
  return _mm512_cmp_ps_mask(x, Vec<float>{}, _CMP_NLE_UQ);  // NaN stays
}
DYNLOSS_ALWAYS_INLINE __mmask8 activates(Vec<double> x) {
  return _mm512_cmp_pd_mask(x, Vec<double>{}, _CMP_NLE_UQ);
}
DYNLOSS_ALWAYS_INLINE Vec<float> where(__mmask16 active, Vec<float> x) {
  return _mm512_maskz_mov_ps(active, x);
}
DYNLOSS_ALWAYS_INLINE Vec<double> where(__mmask8 active, Vec<double> x) {
  return _mm512_maskz_mov_pd(active, x);
}
DYNLOSS_ALWAYS_INLINE void add_where(__mmask16 active, Vec<float>& sum, Vec<float> x) {
  sum = _mm512_mask_add_ps(sum, active, sum, x);
}
DYNLOSS_ALWAYS_INLINE void add_where(__mmask8 active, Vec<double>& sum, Vec<double> x) {
  sum = _mm512_mask_add_pd(sum, active, sum, x);
}
DYNLOSS_ALWAYS_INLINE void add_product_where(__mmask16 active, Vec<float>& sum, Vec<float> x, Vec<float> y) {
  sum = _mm512_mask3_fmadd_ps(x, y, sum, active);
}
DYNLOSS_ALWAYS_INLINE void add_product_where(__mmask8 active, Vec<double>& sum, Vec<double> x,
                                             Vec<double> y) {
  sum = _mm512_mask3_fmadd_pd(x, y, sum, active);
}
#else
// Without mask registers they are found again on the way back: that is less than to bring them from memory.
template <typename T>
using Active = Mask<T>;

template <typename V>
DYNLOSS_ALWAYS_INLINE auto activates(V x) {
  return ~(x <= 0);  // NaN stays
}
template <typename M, typename V>
DYNLOSS_ALWAYS_INLINE V where(M active, V x) {
  return (V)(active & (M)x);
}
template <typename M, typename V>
DYNLOSS_ALWAYS_INLINE void add_where(M active, V& sum, V x) {
  sum += where(active, x);
}
template <typename M, typename V>
DYNLOSS_ALWAYS_INLINE void add_product_where(M active, V& sum, V x, V y) {
  sum += x * where(active, y);
}
#endif

template <typename T, int D, int C>
struct FewPlanes {
  // What fits the registers: vectors of samples on the way there along a direction, units on the way back.
  static constexpr int along_vectors = VECTOR_BYTES == 64 ? 3 : VECTOR_BYTES == 32 ? 1 : 2;
  static constexpr int units = VECTOR_BYTES == 64 ? 2 : 1;
  static constexpr int outputs = C - 1;  // of a unit: its weights to the classes less that to the last
  static constexpr int moments = (D + 1) * outputs;
  using Block = Perceptron<T, Activation::relu>;

  // What a hidden unit is made of, by the parameters or a direction.
  struct Unit {
    T input[D], bias;

    DYNLOSS_ALWAYS_INLINE_MEMBER Unit(const PerceptronShape& shape, const T* flat, int64_t h) {
      unrolled<D>([&](int d) DYNLOSS_ALWAYS_INLINE_LAMBDA { input[d] = flat[d * shape.hidden + h]; });
      bias = flat[shape.b1() + h];
    }
    DYNLOSS_ALWAYS_INLINE_MEMBER Vec<T> before(const Vec<T>* x) const {
      Vec<T> sum = broadcast(bias);
      unrolled<D>([&](int d) DYNLOSS_ALWAYS_INLINE_LAMBDA { sum += input[d] * x[d]; });
      return sum;
    }
  };

  // Gradients of the logits, and what products need of them.
  static void evaluate(const Block& block, PerceptronSums* sums) {
    forward(block);
    block.template rows<C, Along::never>(sums);
  }
  static void prepare(const Block& block) {
    forward(block);
    block.template rows<C, Along::later>(nullptr);
    sum_moments(block, block.logits(), block.member.moments);
  }

  static void backward(const Block& block, T* out) {
    const PerceptronMember<T>& member = block.member;
    sum_moments(block, block.logits(), member.moments);
    add_derivatives(block.shape, member.parameters, member.outputs, member.moments, out);
    block.template backward_biases<false>(out);
  }

  // After `prepare`, for as many directions as there are.
  static void multiply(const Block& block, const T* v, T* out) {
    const PerceptronMember<T>& member = block.member;
    forward_along(block, v);
    block.template rows_along<C>();
    sum_moments(block, block.logits_along(), member.moments_along);
    add_derivatives(block.shape, member.parameters, member.outputs, member.moments_along, out);
    add_derivatives(block.shape, v, member.outputs_along, member.moments, out);
    block.template backward_biases<true>(out);
  }

 private:
  DYNLOSS_ALWAYS_INLINE_MEMBER static void load_inputs(const Block& block, int64_t n, Vec<T>* x) {
    unrolled<D>([&](int d) DYNLOSS_ALWAYS_INLINE_LAMBDA { x[d] = load(block.inputs()[d] + n); });
  }

  DYNLOSS_ALWAYS_INLINE_MEMBER static Active<T>* kept(const Block& block, int64_t h, int64_t n) {
    return static_cast<Active<T>*>(block.member.active) +
           static_cast<uint64_t>(h * block.member.block + n) / width<T>;
  }

  // Of the unit h at the vector of samples x from n on, after `forward`.
  DYNLOSS_ALWAYS_INLINE_MEMBER static Active<T> active(const Block& block, const Vec<T>* x, int64_t h,
                                                       int64_t n) {
    if constexpr (VECTOR_BYTES == 64)
      return *kept(block, h, n);
    else
      return activates(Unit(block.shape, block.member.parameters, h).before(x));
  }

  static void forward(const Block& block) {
    const PerceptronMember<T>& member = block.member;
    const PerceptronShape& shape = block.shape;
    const T* p = member.parameters;
    const T* const bias = take_outputs(shape, p, member.outputs);
    in_tiles<tile_vectors>(block.vectors, [&]<int V>(int64_t vector) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      Vec<T> x[V][D], z[V][outputs];
      unrolled<V>([&](int k) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        load_inputs(block, (vector + k) * width<T>, x[k]);
        unrolled<outputs>([&](int c) DYNLOSS_ALWAYS_INLINE_LAMBDA { z[k][c] = broadcast(bias[c]); });
      });
      for (int64_t h = 0; h < shape.hidden; ++h) {
        const Unit unit(shape, p, h);
        const T* const output = member.outputs + h * outputs;
        unrolled<V>([&](int k) DYNLOSS_ALWAYS_INLINE_LAMBDA {
          const Vec<T> before = unit.before(x[k]);
          const Active<T> now = activates(before);
          if constexpr (VECTOR_BYTES == 64) *kept(block, h, (vector + k) * width<T>) = now;
          const Vec<T> value = where(now, before);
          unrolled<outputs>([&](int c) DYNLOSS_ALWAYS_INLINE_LAMBDA { z[k][c] += value * output[c]; });
        });
      }
      write<V>(member.logits, member.block, vector, z);
    });
  }

  static void forward_along(const Block& block, const T* v) {
    const PerceptronMember<T>& member = block.member;
    const PerceptronShape& shape = block.shape;
    const T* const bias = take_outputs(shape, v, member.outputs_along);
    in_tiles<along_vectors>(block.vectors, [&]<int V>(int64_t vector) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      Vec<T> x[V][D], y[V][outputs];
      unrolled<V>([&](int k) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        load_inputs(block, (vector + k) * width<T>, x[k]);
        unrolled<outputs>([&](int c) DYNLOSS_ALWAYS_INLINE_LAMBDA { y[k][c] = broadcast(bias[c]); });
      });
      for (int64_t h = 0; h < shape.hidden; ++h) {
        const Unit unit(shape, member.parameters, h), change(shape, v, h);
        const T* const output = member.outputs + h * outputs;
        const T* const output_change = member.outputs_along + h * outputs;
        unrolled<V>([&](int k) DYNLOSS_ALWAYS_INLINE_LAMBDA {
          const Active<T> now = active(block, x[k], h, (vector + k) * width<T>);
          const Vec<T> value = where(now, unit.before(x[k])), moved = where(now, change.before(x[k]));
          unrolled<outputs>([&](int c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
            y[k][c] += value * output_change[c];
            y[k][c] += moved * output[c];
          });
        });
      }
      write<V>(member.logits_along, member.block, vector, y);
    });
  }

  // The outputs of every unit, (H, outputs), and after them those of the biases, which are returned.
  static const T* take_outputs(const PerceptronShape& shape, const T* flat, T* out) {
    const T* weights = flat + shape.w2();  // b2 follows
    for (int64_t h = 0; h <= shape.hidden; ++h, weights += C)
      for (int c = 0; c < outputs; ++c) out[h * outputs + c] = weights[c] - weights[outputs];
    return out + shape.hidden * outputs;
  }

  template <int V>
  DYNLOSS_ALWAYS_INLINE_MEMBER static void write(T* planes, int64_t stride, int64_t vector,
                                                 const Vec<T> (&x)[V][outputs]) {
    unrolled<V>([&](int k) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      T* const at = planes + (vector + k) * width<T>;
      Vec<T> last{};  // of the last class: 0, or NaN where any class is beyond the range of numbers
      unrolled<outputs>([&](int c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        store(at + c * stride, x[k][c]);
        last += x[k][c] - x[k][c];
      });
      store(at + outputs * stride, last);
    });
  }

  // The moments of every unit, (H, D + 1, outputs). Lanes are summed over of as many units at once as a
  // vector has.
  static void sum_moments(const Block& block, const Planes<T>& g, T* out) {
    constexpr int most = width<T>;
    for (int64_t first = 0; first < block.shape.hidden; first += most, out += most * moments) {
      Vec<T> lanes[most * moments];
      const int64_t count = std::min<int64_t>(most, block.shape.hidden - first);
      std::fill(lanes + count * moments, lanes + most * moments, Vec<T>{});
      in_tiles<units>(count, [&]<int I>(int64_t unit) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        Vec<T> sums[I][D + 1][outputs] = {};
        for (int64_t n = 0; n < block.samples; n += width<T>) add_moments<I>(block, g, first + unit, n, sums);
        std::memcpy(lanes + unit * moments, sums, sizeof(sums));
      });
      for (int i = 0; i < moments; ++i) store(out + i * most, horizontal_sums<T>(lanes + i * most));
    }
  }

  // Of I units from h on, at the samples from n on.
  template <int I>
  DYNLOSS_ALWAYS_INLINE_MEMBER static void add_moments(const Block& block, const Planes<T>& g, int64_t h,
                                                       int64_t n, Vec<T> (&sums)[I][D + 1][outputs]) {
    Vec<T> x[D];
    load_inputs(block, n, x);
    unrolled<I>([&](int i) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      const Active<T> now = active(block, x, h + i, n);
      unrolled<outputs>([&](int c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        const Vec<T> at = load(g[c] + n);
        add_where(now, sums[i][0][c], at);
        unrolled<D>(
            [&](int d) DYNLOSS_ALWAYS_INLINE_LAMBDA { add_product_where(now, sums[i][d + 1][c], x[d], at); });
      });
    });
  }

  // out += the derivatives by every unit's parameters, from its moments and its weights in `flat`.
  static void add_derivatives(const PerceptronShape& shape, const T* flat, const T* outputs_of_units,
                              const T* moments_of_units, T* out) {
    for (int64_t h = 0; h < shape.hidden; ++h) {
      const Unit unit(shape, flat, h);
      const T* const m = moments_of_units + h * moments;
      const T* const output = outputs_of_units + h * outputs;
      T* const by_output = out + shape.w2() + h * C;
      unrolled<outputs>([&](int c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
        out[shape.b1() + h] += output[c] * m[c];
        T sum = unit.bias * m[c];
        unrolled<D>([&](int d) DYNLOSS_ALWAYS_INLINE_LAMBDA {
          const T moment = m[(d + 1) * outputs + c];
          out[d * shape.hidden + h] += output[c] * moment;
          sum += unit.input[d] * moment;
        });
        by_output[c] += sum;
        by_output[outputs] -= sum;
      });
    }
  }
};
