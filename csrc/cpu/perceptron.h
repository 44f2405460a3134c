// The perceptrons of an ensemble on CPU, one at a time: what the kernels need of each is laid out once and
// used for as many evaluations as there are.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "cpu/perceptron_kernel.h"
#include "layout.h"
#include "perceptron_arguments.h"

namespace dynloss::cpu {

// Memory aligned for vectors, not initialised.
template <typename T>
class Plane {
 public:
  Plane() = default;
  explicit Plane(int64_t size) : data_(allocate(size)) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  static T* allocate(int64_t size);

  std::unique_ptr<T[], Free> data_;
};

// One thread's place to work on one member after the other. The arguments outlive it.
template <typename T>
class PerceptronBench {
 public:
  // along: products are asked for.
  PerceptronBench(const PerceptronArguments& x, const ScheduleData& schedule, bool along);

  // What follows is of this member, from its row of the arguments' parameters.
  void take(int64_t index);
  void set_parameters(const T* parameters) {
    member_.parameters = parameters;
    member_.prepared = false;
  }
  void set_step(int64_t step);

  // Of the mean loss, written over `gradient`; without one, the sums alone. These are means over the samples.
  PerceptronSums evaluate(T* gradient) const;
  void gradient(T* gradient) const;
  // One after the other, with no other evaluation between them.
  void multiply(const T* v, T* product);

  const PerceptronShape& shape() const { return member_.shape; }

 private:
  const PerceptronArguments& x_;
  const ScheduleData& schedule_;
  PerceptronMember<T> member_;
  int64_t index_ = -1;
  Plane<T> inputs_, hidden_, hidden_along_, logits_, logits_along_, softmax_, tile_;
  Plane<T> outputs_, outputs_along_, moments_, moments_along_;
  Plane<uint8_t> active_;
  std::vector<int64_t> labels_;
  std::vector<double> gamma_;
};

extern template class PerceptronBench<float>;
extern template class PerceptronBench<double>;

// Products with the Hessian of the only member of `x`, laid out for the first of them: with few samples that
// and the call of an op take as long as a product itself.
class PerceptronProduct {
 public:
  // Checks the arguments as the op perceptron_hvp does.
  static std::unique_ptr<PerceptronProduct> of(const PerceptronArguments& x);
  virtual ~PerceptronProduct() = default;

  // H v for a contiguous v (P,). Of one thread at a time; others wait.
  virtual at::Tensor multiply(const at::Tensor& v) = 0;
};

}  // namespace dynloss::cpu
