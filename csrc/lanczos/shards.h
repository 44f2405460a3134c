#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace dynloss {

// What is to be known of vectors of which every process holds some of the entries, its shard. All processes
// make the same calls.
class Shards {
 public:
  virtual ~Shards() = default;

  // Entries of a whole vector.
  virtual int64_t dimension() const = 0;

  // Of numbers in double precision, on the device of the vectors, over all processes, in place: the same bits
  // in each of them.
  virtual void sum(const at::Tensor& numbers) const = 0;
  virtual void max(const at::Tensor& numbers) const = 0;

  // The shard of a vector of normal numbers that depends on the seed, and not on the number of processes.
  virtual at::Tensor normal(uint64_t seed) const = 0;

  // The shard of the vector of 1 and -1 that a generator gives where vectors are whole.
  virtual at::Tensor signs(const at::Generator& generator) const = 0;
};

}  // namespace dynloss
