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

template <typename T>
struct Loops {
  double (*dot)(const T* a, const T* b, int64_t length);
  void (*add_scaled)(T* out, T factor, const T* x, int64_t length);
};

#define COMPILE_LOOPS(NAME, ...)                                                     \
  template <typename T>                                                              \
  __VA_ARGS__ double dot_##NAME(const T* a, const T* b, int64_t length) {            \
    return dot_of(a, b, length);                                                     \
  }                                                                                  \
  template <typename T>                                                              \
  __VA_ARGS__ void add_scaled_##NAME(T* out, T factor, const T* x, int64_t length) { \
    add_scaled_of(out, factor, x, length);                                           \
  }                                                                                  \
  template <typename T>                                                              \
  constexpr Loops<T> NAME##_loops = {&dot_##NAME<T>, &add_scaled_##NAME<T>};

COMPILE_LOOPS(portable)
#if defined(__x86_64__)
COMPILE_LOOPS(avx2, __attribute__((target("avx2"))))
COMPILE_LOOPS(avx512, __attribute__((target("avx512f"))))
#endif

template <typename T>
const Loops<T>& choose() {
#if defined(__x86_64__)
  if (cpu::instruction_set() == cpu::InstructionSet::avx512) return avx512_loops<T>;
  if (cpu::instruction_set() == cpu::InstructionSet::avx2) return avx2_loops<T>;
#endif
  return portable_loops<T>;
}

template <typename T>
const Loops<T>& selected() {
  static const Loops<T>& chosen = choose<T>();
  return chosen;
}

}  // namespace

double dot(const float* a, const float* b, int64_t length) { return selected<float>().dot(a, b, length); }
double dot(const double* a, const double* b, int64_t length) { return selected<double>().dot(a, b, length); }
void add_scaled(float* out, float factor, const float* x, int64_t length) {
  selected<float>().add_scaled(out, factor, x, length);
}
void add_scaled(double* out, double factor, const double* x, int64_t length) {
  selected<double>().add_scaled(out, factor, x, length);
}

}  // namespace dynloss
