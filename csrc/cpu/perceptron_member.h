// The perceptron kernels for one instruction set: of all samples of one member, a block after the other, by
// the code for its shape; and a step of gradient descent.

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

// Those of the spirals, whose numbers of inputs and classes are known to the compiler.
template <typename T>
using Few = FewPlanes<T, few_inputs, few_classes>;

// f<Classes>() with the number of classes if the kernels are compiled for it, or else with 0.
template <typename F>
DYNLOSS_ALWAYS_INLINE void with_classes(int64_t classes, F&& f) {
  if (classes == few_classes)
    f.template operator()<few_classes>();
  else
    f.template operator()<0>();
}

// The way there and back of a block; only there, if `out` is null.
template <typename T, Activation A>
void evaluate_block(const Perceptron<T, A>& block, PerceptronSums* sums, T* out) {
  if constexpr (A == Activation::relu) {
    if (has_few_planes(block.shape)) {
      Few<T>::evaluate(block, sums);
      if (out != nullptr) Few<T>::backward(block, out);
      return;
    }
  }
  block.template forward<false>(nullptr);
  with_classes(block.shape.classes, [&]<int Classes>() { block.template rows<Classes, Along::never>(sums); });
  if (out != nullptr) block.template backward<false>(nullptr, out);
}

template <typename T, Activation A>
void multiply_block(const Perceptron<T, A>& block, const T* v, T* out) {
  if constexpr (A == Activation::relu) {
    if (has_few_planes(block.shape)) {
      if (!block.member.prepared) Few<T>::prepare(block);
      return Few<T>::multiply(block, v, out);
    }
  }
  block.template forward<true>(v);
  with_classes(block.shape.classes,
               [&]<int Classes>() { block.template rows<Classes, Along::now>(nullptr); });
  block.template backward<true>(v, out);
}

template <typename T>
void evaluate_perceptron(const PerceptronMember<T>& member, PerceptronSums* sums, T* gradient) {
  in_blocks(member, [&](const auto& block) { evaluate_block(block, sums, gradient); });
}

template <typename T>
void multiply_perceptron(const PerceptronMember<T>& member, const T* v, T* product) {
  in_blocks(member, [&](const auto& block) { multiply_block(block, v, product); });
}

template <typename T>
bool descend(int64_t padded, T learning_rate, T momentum, const T* parameters, const T* gradient,
             const T* velocity, T* next, T* next_velocity) {
  Vec<T> not_finite{};  // x - x is 0 or NaN
  for (int64_t i = 0; i < padded; i += width<T>) {
    Vec<T> step = load(gradient + i);
    if (velocity != nullptr) {
      step += momentum * load(velocity + i);
      store(next_velocity + i, step);
    }
    const Vec<T> moved = load(parameters + i) - learning_rate * step;
    store(next + i, moved);
    not_finite += moved - moved;
  }
  return horizontal_sum<T>(not_finite) == T(0);
}
