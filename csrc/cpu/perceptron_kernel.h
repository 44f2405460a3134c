// The interface between the perceptron ops on CPU and their kernels, which are compiled once per instruction
// set. T is float or double.
#pragma once

#include <cstdint>

#include "core/perceptron.h"

namespace dynloss::cpu {

// Samples lie in planes: one per input, hidden unit or class, padded to whole vectors of every instruction
// set.
template <typename T>
constexpr int64_t plane_quantum = 64 / static_cast<int64_t>(sizeof(T));

// What the label of a padded sample is: no class, and it counts for nothing.
constexpr int64_t no_label = -1;

constexpr int perceptron_tile_planes = 4;

// Networks for which the kernels keep no hidden values, as the spirals' is.
constexpr int few_inputs = 2, few_classes = 3;
inline bool has_few_planes(const PerceptronShape& shape) {
  return shape.activation == Activation::relu && shape.inputs == few_inputs && shape.classes == few_classes;
}

// One member's data and the planes that its evaluation needs; all planes are aligned to 64 bytes.
template <typename T>
struct PerceptronMember {
  PerceptronShape shape;
  int64_t padded;   // samples of `inputs` and `labels`, a multiple of the quantum
  int64_t block;    // samples that are processed at a time, so that their planes stay in the cache; likewise
  const T* inputs;  // (D, padded)
  const int64_t* labels;     // (padded,)
  const T* parameters;       // (P,)
  const double* gamma;       // (C,)
  T *logits, *logits_along;  // (C, block); they become gradients. All `along` is for products alone
  // With few planes:
  T* softmax;                  // (C + 2, block), for products: exp(z - max), its sum, the gradient's factor
  void* active;                // (H, block) bits: which samples activate a unit; for AVX-512
  T *outputs, *outputs_along;  // (H + 1, C - 1)
  T *moments, *moments_along;  // (H, D + 1, C - 1), H rounded up to the quantum
  bool prepared;  // an earlier product has filled all of these but `along`: only if all samples are one block
  // Else:
  T *hidden, *hidden_along;  // (H, block)
  T* tile;                   // (perceptron_tile_planes, block)
};

// Sums over the samples of a member.
struct PerceptronSums {
  double weighted_loss = 0, loss = 0, correct = 0;
};

template <typename T>
struct PerceptronKernels {
  // Adds to the sums, if given, and to the gradient of the mean loss, if given.
  void (*evaluate)(const PerceptronMember<T>& member, PerceptronSums* sums, T* gradient);
  // Adds the product of the Hessian of the mean loss with v.
  void (*multiply)(const PerceptronMember<T>& member, const T* v, T* product);
  // One step of gradient descent into `next`, with momentum where there is velocity (then into
  // next_velocity); returns whether all of it is finite. All are padded to the quantum.
  bool (*descend)(int64_t padded, T learning_rate, T momentum, const T* parameters, const T* gradient,
                  const T* velocity, T* next, T* next_velocity);
};

// Those of the instruction set that this machine runs.
template <typename T>
const PerceptronKernels<T>& perceptron_kernels();

extern const PerceptronKernels<float> default_perceptron_f32;
extern const PerceptronKernels<double> default_perceptron_f64;
#if defined(__x86_64__)
extern const PerceptronKernels<float> avx2_perceptron_f32, avx512_perceptron_f32;
extern const PerceptronKernels<double> avx2_perceptron_f64, avx512_perceptron_f64;
#endif

}  // namespace dynloss::cpu
