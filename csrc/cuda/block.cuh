// What the threads of a block do together: shared memory and sums in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstring>

#include "core/cross_entropy_row.h"
#include "core/oscillation.h"

namespace dynloss::cuda {

constexpr int warp_size = 32;
constexpr unsigned all_lanes = 0xffffffffu;
constexpr int max_warps = 32;

// The kernels were measured on sm_90, and have the registers there that they were measured with. Other
// architectures need more, and get them at the price of fewer threads rather than keep variables in memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr bool is_sm_90 = false;
#else
constexpr bool is_sm_90 = true;
#endif
constexpr int registers_for(int blocks, bool sm_90 = is_sm_90) {
  return sm_90 || blocks == 1 ? blocks : blocks - 1;
}

// The dynamic shared memory of a block, 16-byte aligned.
__device__ inline unsigned char* block_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
#else
  return emulator::block_memory();
#endif
}

// Its beginning, in every kernel.
struct alignas(16) Scratch {
  ClassWeights weights;
  double counted;  // what the loss is divided by, if one block can tell
  double divisor;  // what the gradient is divided by as it is written
  double parts[3][max_warps];
  bool last;
};

__device__ inline Scratch& scratch() { return *reinterpret_cast<Scratch*>(block_memory()); }
__device__ inline unsigned char* memory_after_scratch() { return block_memory() + sizeof(Scratch); }

__device__ inline int lane_index() { return threadIdx.x % warp_size; }
__device__ inline int warp_index() { return threadIdx.x / warp_size; }
__device__ inline int num_warps() { return blockDim.x / warp_size; }

// x, which the compiler is to keep instead of what it was computed from.
__device__ inline float kept(float x) {
#if defined(__CUDACC__)
  asm volatile("" : "+f"(x));
#endif
  return x;
}
__device__ inline double kept(double x) { return x; }

// x; what depends on it is computed where it is used, and not ahead of a loop in registers that are not
// there.
__device__ inline int not_ahead(int x) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// x as it was loaded, not looked at before the barriers that come before this: it may still be under way.
template <typename X>
__device__ inline X awaited(X x) {
#if defined(__CUDACC__)
  // By value: a reference would bring x into memory.
  if constexpr (sizeof(X) == 2) {
    unsigned short bits;
    memcpy(&bits, &x, sizeof(X));
    asm volatile("" : "+h"(bits));
    memcpy(&x, &bits, sizeof(X));
  } else if constexpr (sizeof(X) == 4) {
    unsigned bits;
    memcpy(&bits, &x, sizeof(X));
    asm volatile("" : "+r"(bits));
    memcpy(&x, &bits, sizeof(X));
  } else {
    unsigned long long bits;
    memcpy(&bits, &x, sizeof(X));
    asm volatile("" : "+l"(bits));
    memcpy(&x, &bits, sizeof(X));
  }
#endif
  return x;
}

template <typename T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int offset = warp_size / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(all_lanes, x, offset);
  return x;
}

// A NaN is passed over.
__device__ inline float larger(float x, float y) { return fmaxf(x, y); }
__device__ inline double larger(double x, double y) { return fmax(x, y); }
__device__ inline int larger(int x, int y) { return x > y ? x : y; }

template <typename T>
__device__ inline T warp_max(T x) {
#pragma unroll
  for (int offset = warp_size / 2; offset > 0; offset /= 2)
    x = larger(__shfl_xor_sync(all_lanes, x, offset), x);
  return x;
}

// Every thread gets the sums over the block.
template <int n, typename T>
__device__ inline void block_sum(T (&x)[n]) {
  Scratch& shared = scratch();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    x[i] = warp_sum(x[i]);
    if (lane_index() == 0) shared.parts[i][warp_index()] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i)
    x[i] = warp_sum(lane_index() < num_warps() ? static_cast<T>(shared.parts[i][lane_index()]) : T(0));
  __syncthreads();
}

// One exponential instead of one per merge; symmetric, so that all lanes get the same bits.
template <typename T>
__device__ inline MaxSum<T> warp_merge(const MaxSum<T>& part) {
  const T top = warp_max(part.max);
  return {top, warp_sum(part.sum_at(top))};
}

template <typename T>
__device__ inline MaxSum<T> block_merge(MaxSum<T> part) {
  Scratch& shared = scratch();
  part = warp_merge(part);
  if (lane_index() == 0) {
    shared.parts[0][warp_index()] = part.max;
    shared.parts[1][warp_index()] = part.sum;
  }
  __syncthreads();
  part = lane_index() < num_warps() ? MaxSum<T>{static_cast<T>(shared.parts[0][lane_index()]),
                                                static_cast<T>(shared.parts[1][lane_index()])}
                                    : MaxSum<T>::empty();
  part = warp_merge(part);
  __syncthreads();
  return part;
}

}  // namespace dynloss::cuda
