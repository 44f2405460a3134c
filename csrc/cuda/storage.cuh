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

template <typename S>
__device__ inline Piece<S> load_piece(const Piece<S>* from) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  return *reinterpret_cast<const Piece<S>*>(&raw);
}

template <typename S>
__device__ inline Piece<S> filled_piece(Arithmetic<S> value) {
  Piece<S> piece;
#pragma unroll
  for (int j = 0; j < piece_size<S>; ++j) piece.values[j] = narrow<S>(value);
  return piece;
}

// Both elements of a register at once, which the compiler does not find by itself.
template <typename S>
__device__ inline Piece<S> narrow_piece(const Arithmetic<S> (&x)[piece_size<S>]) {
  Piece<S> piece;
#pragma unroll
  for (int j = 0; j < piece_size<S>; ++j) piece.values[j] = narrow<S>(x[j]);
  return piece;
}
#if defined(__CUDACC__)
template <>
__device__ inline Piece<__nv_bfloat16> narrow_piece<__nv_bfloat16>(const float (&x)[8]) {
  Piece<__nv_bfloat16> piece;
#pragma unroll
  for (int j = 0; j < 8; j += 2)
    *reinterpret_cast<__nv_bfloat162*>(piece.values + j) = __floats2bfloat162_rn(x[j], x[j + 1]);
  return piece;
}
template <>
__device__ inline Piece<__half> narrow_piece<__half>(const float (&x)[8]) {
  Piece<__half> piece;
#pragma unroll
  for (int j = 0; j < 8; j += 2)
    *reinterpret_cast<__half2*>(piece.values + j) = __floats2half2_rn(x[j], x[j + 1]);
  return piece;
}
#endif

// exp(x) for x <= 0, as exactly as the arithmetic; for half types, whose results are rounded to 11 bits at
// most, in two instructions instead of eight.
template <typename S>
__device__ inline Arithmetic<S> exponential(Arithmetic<S> x) {
#if defined(__CUDACC__)
  if constexpr (sizeof(S) == 2) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504088896340736f));
    return y;
  }
#endif
  return std::exp(x);
}

// ---- copies to shared memory that the thread does not wait for

// 4, 8 or 16 bytes, at a multiple of as many.
template <int bytes>
__device__ inline void start_copy(void* shared, const void* global) {
#if defined(__CUDACC__)
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(bytes) : "memory");
#else
  emulator::start_copy(shared, global, bytes);
#endif
}
__device__ inline void commit_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::commit_copies();
#endif
}
// Until all but the last `n` groups that this thread has committed are there.
template <int n>
__device__ inline void wait_for_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#else
  emulator::wait_for_copies(n);
#endif
}

// An assignment would be merged with those to single elements beside it, into stores of single elements.
__device__ inline void store_piece(void* to, const uint4& x) {
#if defined(__CUDACC__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
#else
  *static_cast<uint4*>(to) = x;
#endif
}

template <typename S>
__device__ inline int misalignment(const S* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(S));
}

// A contiguous run of `size` elements cut into pieces at multiples of 16 bytes; the first and the last piece
// may be incomplete. Two runs that go together are cut alike, at the places that suit the first; if the
// other lies differently it is accessed element by element.
template <typename S, typename Index = int>
class Run {
 public:
  __device__ Run(S* first, Index size) : Run(first, size, misalignment(first)) {}
  __device__ Run(S* first, Index size, int shift)
      : first_(first), size_(size), shift_(shift), wide_(misalignment(first) == shift) {}

  __device__ int shift() const { return shift_; }
  __device__ Index pieces() const { return (size_ + shift_ + piece_size<S> - 1) / piece_size<S>; }

  // Which element piece k begins with: negative for an incomplete first one.
  __device__ Index begin(Index k) const { return k * piece_size<S> - shift_; }

  // Elements outside of the run become `fill`.
  __device__ Piece<S> load(Index k, S fill) const {
    const Index i = begin(k);
    if (is_wide(i)) return load_piece(reinterpret_cast<const Piece<S>*>(first_ + i));
    Piece<S> piece;
#pragma unroll
    for (int j = 0; j < piece_size<S>; ++j)
      piece.values[j] = i + j >= 0 && i + j < size_ ? first_[i + j] : fill;
    return piece;
  }

  // The same to shared memory; there when the thread has waited for its copies.
  __device__ void fetch(Index k, Piece<S>* to, S fill) const {
    const Index i = begin(k);
    if (is_wide(i))
      start_copy<16>(to, first_ + i);
    else
      *to = load(k, fill);
  }

  __device__ void store(Index k, const Piece<S>& piece) const {
    const Index i = begin(k);
    if (is_wide(i)) {
      store_piece(first_ + i, *reinterpret_cast<const uint4*>(&piece));
      return;
    }
#pragma unroll
    for (int j = 0; j < piece_size<S>; ++j)
      if (i + j >= 0 && i + j < size_) first_[i + j] = piece.values[j];
  }

 private:
  __device__ bool is_wide(Index i) const { return wide_ && i >= 0 && i + piece_size<S> <= size_; }

  S* first_;
  Index size_;
  int shift_;
  bool wide_;
};

}  // namespace dynloss::cuda
