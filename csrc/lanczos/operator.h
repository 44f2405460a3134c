#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/TensorOptions.h>

#include <cstdint>

#include "shards.h"

namespace dynloss {

// A real symmetric linear map on flat vectors, known only through its products.
class SymmetricOperator {
 public:
  virtual ~SymmetricOperator() = default;

  // Entries of its vectors: of a shard, where there are shards.
  virtual int64_t size() const = 0;
  virtual at::TensorOptions options() const = 0;

  // Where processes hold shards of the vectors; null where each holds whole ones.
  virtual const Shards* shards() const { return nullptr; }

  // P: H is a P x P matrix.
  int64_t dimension() const { return shards() ? shards()->dimension() : size(); }

  // H v for a contiguous v of shape (size(),). The result may alias nothing that the operator keeps.
  virtual at::Tensor apply(const at::Tensor& v) = 0;

  // The same with every rounding inside it at random, where the operator knows how: what differs is noise.
  virtual at::Tensor apply_noisily(const at::Tensor& v) { return apply(v); }

  // Whether products are second derivatives by autograd, which nothing but rounding makes inexact, unless
  // that of a layer is wrong.
  virtual bool is_differentiated() const { return false; }

  // How far a product with a unit vector may be from H v, in length, where the operator knows more of that
  // than its asymmetry says: the larger of what the products so far had.
  virtual double noise() const { return 0.0; }

  // Throws where H has changed since it was made. One reading of the device, before products, not for each.
  virtual void check_values() const {}
};

// Random vectors for an operator, of normal numbers and of 1 and -1. The generator is on the CPU whatever the
// device, so that a seed stands for the same vectors everywhere.
at::Tensor random_normal(const SymmetricOperator& op, const at::Generator& generator);
at::Tensor random_signs(const SymmetricOperator& op, const at::Generator& generator);

}  // namespace dynloss
