#include "row_loops.h"

#include <algorithm>
#include <type_traits>

#include "cpu/instruction_set.h"

namespace dynloss {
namespace {

// Products of floats that are summed as floats, before the sum goes on in double precision.
constexpr int64_t kSummedAsFloats = 512;

// A quarter of the sum at a time: one addition would wait for the last.
template <typename T>
[[gnu::always_inline]] inline T dot_in_dtype(const T* a, const T* b, int64_t length) {
  const int64_t q = length / 4;
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < q; ++i) {
    s0 += a[i] * b[i];
    s1 += a[i + q] * b[i + q];
    s2 += a[i + 2 * q] * b[i + 2 * q];
    s3 += a[i + 3 * q] * b[i + 3 * q];
  }
  for (int64_t i = 4 * q; i < length; ++i) s0 += a[i] * b[i];
  return (s0 + s1) + (s2 + s3);
}

template <typename T>
[[gnu::always_inline]] inline double dot_of(const T* a, const T* b, int64_t length) {
  if constexpr (std::is_same_v<T, double>) return dot_in_dtype(a, b, length);
  double sum = 0;
  for (int64_t i = 0; i < length; i += kSummedAsFloats) {
    sum += static_cast<double>(dot_in_dtype(a + i, b + i, std::min(kSummedAsFloats, length - i)));
  }
  return sum;
}

template <typename T>
[[gnu::always_inline]] inline void add_scaled_of(T* out, T factor, const T* x, int64_t length) {
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) out[i] += factor * x[i];
}

[[gnu::always_inline]] inline int64_t integer_dot_of(const int32_t* a, const int32_t* b, int64_t length) {
  uint64_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < length; ++i) sum += static_cast<uint64_t>(static_cast<int64_t>(a[i]) * b[i]);
  return static_cast<int64_t>(sum);
}

#if defined(__x86_64__)
template <typename Loop>
__attribute__((target("avx2"))) auto run_with_avx2(Loop loop) {
  return loop();
}
template <typename Loop>
__attribute__((target("avx512f"))) auto run_with_avx512(Loop loop) {
  return loop();
}
#endif

// Runs a loop, which must be inlined, compiled for the instruction set of this machine.
template <typename Loop>
auto run(Loop loop) {
#if defined(__x86_64__)
  if (cpu::instruction_set() == cpu::InstructionSet::avx512) return run_with_avx512(loop);
  if (cpu::instruction_set() == cpu::InstructionSet::avx2) return run_with_avx2(loop);
#endif
  return loop();
}

}  // namespace

template <typename T>
double dot(const T* a, const T* b, int64_t length) {
  return run([=]() __attribute__((always_inline)) { return dot_of(a, b, length); });
}

template <typename T>
void add_scaled(T* out, T factor, const T* x, int64_t length) {
  run([=]() __attribute__((always_inline)) { add_scaled_of(out, factor, x, length); });
}

int64_t integer_dot(const int32_t* a, const int32_t* b, int64_t length) {
  return run([=]() __attribute__((always_inline)) { return integer_dot_of(a, b, length); });
}

template double dot(const float*, const float*, int64_t);
template double dot(const double*, const double*, int64_t);
template void add_scaled(float*, float, const float*, int64_t);
template void add_scaled(double*, double, const double*, int64_t);

}  // namespace dynloss
