// Elements as they lie in memory and as the arithmetic sees them, and their transfer 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/cross_entropy.h"

namespace dynloss::cuda {

template <typename S>
struct ArithmeticOf {
  using Type = float;
};
template <>
struct ArithmeticOf<double> {
  using Type = double;
};
template <typename S>
using Arithmetic = typename ArithmeticOf<S>::Type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename S>
__device__ inline S narrow(Arithmetic<S> x) {
  return x;
}
template <>
__device__ inline __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Element `index` of an array whose type is known at run time only.
template <typename T>
__device__ inline T load_as(const void* data, Storage storage, int64_t index) {
  switch (storage) {
    case Storage::float32:
      return static_cast<T>(static_cast<const float*>(data)[index]);
    case Storage::float64:
      return static_cast<T>(static_cast<const double*>(data)[index]);
    case Storage::float16:
      return static_cast<T>(widen(static_cast<const __half*>(data)[index]));
    default:
      return static_cast<T>(widen(static_cast<const __nv_bfloat16*>(data)[index]));
  }
}

__device__ inline int64_t load_label(const void* target, Label label, int64_t index) {
  switch (label) {
    case Label::int64:
      return static_cast<const int64_t*>(target)[index];
    case Label::int32:
      return static_cast<const int32_t*>(target)[index];
    default:
      return static_cast<const uint8_t*>(target)[index];
  }
}

template <typename S>
constexpr int piece_size = 16 / sizeof(S);

// 16 bytes of neighbouring elements.
template <typename S>
struct alignas(16) Piece {
  S values[piece_size<S>];
};

// An assignment would be merged with those to single elements beside it, into stores of single elements.
__device__ inline void store_piece(void* to, const uint4& x) {
#if defined(__CUDACC__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
#else
  *static_cast<uint4*>(to) = x;
#endif
}

// A contiguous run of `size` elements cut into pieces at multiples of 16 bytes; the first and the last piece
// may be incomplete. Two runs that go together are cut alike, at the places that suit the first; if the
// other lies differently it is accessed element by element.
template <typename S>
class Run {
 public:
  __device__ Run(const void* first, int64_t size) : Run(first, size, misalignment(first)) {}
  __device__ Run(const void* first, int64_t size, int shift)
      : first_(static_cast<S*>(const_cast<void*>(first))),
        size_(size),
        shift_(shift),
        wide_(misalignment(first) == shift) {}

  __device__ int shift() const { return shift_; }
  __device__ int64_t pieces() const { return (size_ + shift_ + piece_size<S> - 1) / piece_size<S>; }

  // Which element piece k begins with: negative for an incomplete first one.
  __device__ int64_t begin(int64_t k) const { return k * piece_size<S> - shift_; }

  // Elements outside of the run become `fill`.
  __device__ Piece<S> load(int64_t k, S fill) const {
    const int64_t i = begin(k);
    if (wide_ && i >= 0 && i + piece_size<S> <= size_) {
      const uint4 raw = *reinterpret_cast<const uint4*>(first_ + i);
      return *reinterpret_cast<const Piece<S>*>(&raw);
    }
    Piece<S> piece;
#pragma unroll
    for (int j = 0; j < piece_size<S>; ++j)
      piece.values[j] = i + j >= 0 && i + j < size_ ? first_[i + j] : fill;
    return piece;
  }

  __device__ void store(int64_t k, const Piece<S>& piece) const {
    const int64_t i = begin(k);
    if (wide_ && i >= 0 && i + piece_size<S> <= size_) {
      store_piece(first_ + i, *reinterpret_cast<const uint4*>(&piece));
      return;
    }
#pragma unroll
    for (int j = 0; j < piece_size<S>; ++j)
      if (i + j >= 0 && i + j < size_) first_[i + j] = piece.values[j];
  }

 private:
  __device__ static int misalignment(const void* p) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(S));
  }

  S* first_;
  int64_t size_;
  int shift_;
  bool wide_;
};

}  // namespace dynloss::cuda
