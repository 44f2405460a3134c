// A network of one hidden layer: hidden = act(x @ w1 + b1), logits = hidden @ w2 + b2.
#pragma once

#include <cstdint>

namespace dynloss {

enum class Activation : int { relu = 0, tanh = 1 };

struct PerceptronShape {
  int64_t samples;  // N
  int64_t inputs;   // D
  int64_t hidden;   // H
  int64_t classes;  // C
  Activation activation;

  // Where the parameters lie in the flat vector: w1 (D, H), b1 (H,), w2 (H, C), b2 (C,).
  constexpr int64_t b1() const { return inputs * hidden; }
  constexpr int64_t w2() const { return b1() + hidden; }
  constexpr int64_t b2() const { return w2() + hidden * classes; }
  constexpr int64_t size() const { return b2() + classes; }
};

}  // namespace dynloss
