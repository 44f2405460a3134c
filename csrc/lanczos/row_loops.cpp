#include "row_loops.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cpu/instruction_set.h"

namespace dynloss {
namespace {

// Products of floats that are summed as floats, before the sum goes on in double precision.
template <typename T>
constexpr int64_t kSummedInDtype = std::is_same_v<T, float> ? 512 : std::numeric_limits<int64_t>::max();

// Four rows side by side: b is read once for them, and no addition waits for the last.
template <typename T>
[[gnu::always_inline]] inline void four_dots_of(const T* const* a, const T* b, int64_t length, double* out) {
  const T *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3];
  std::fill_n(out, 4, 0.0);
  for (int64_t begin = 0, end; begin < length; begin = end) {
    end = begin + std::min(kSummedInDtype<T>, length - begin);
    T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = begin; i < end; ++i) {
      s0 += a0[i] * b[i];
      s1 += a1[i] * b[i];
      s2 += a2[i] * b[i];
      s3 += a3[i] * b[i];
    }
    out[0] += static_cast<double>(s0);
    out[1] += static_cast<double>(s1);
    out[2] += static_cast<double>(s2);
    out[3] += static_cast<double>(s3);
  }
}

template <typename T>
[[gnu::always_inline]] inline double dot_of(const T* a, const T* b, int64_t length) {
  double out = 0;
  for (int64_t begin = 0, end; begin < length; begin = end) {
    end = begin + std::min(kSummedInDtype<T>, length - begin);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += a[i] * b[i];
    out += static_cast<double>(sum);
  }
  return out;
}

// Four at a time: `out` is read and written once for them.
template <typename T>
[[gnu::always_inline]] inline void add_combination_of(T* out, const T* factors, const T* const* x,
                                                      int64_t count, int64_t length) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const T f0 = factors[j], f1 = factors[j + 1], f2 = factors[j + 2], f3 = factors[j + 3];
    const T *x0 = x[j], *x1 = x[j + 1], *x2 = x[j + 2], *x3 = x[j + 3];
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      out[i] = (((out[i] + f0 * x0[i]) + f1 * x1[i]) + f2 * x2[i]) + f3 * x3[i];
    }
  }
  for (; j < count; ++j) {
    const T f = factors[j];
    const T* from = x[j];
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) out[i] += f * from[i];
  }
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
void dots(const T* const* a, int64_t count, const T* b, int64_t length, double* out) {
  run([=]() __attribute__((always_inline)) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) four_dots_of(a + j, b, length, out + j);
    for (; j < count; ++j) out[j] = dot_of(a[j], b, length);
  });
}

template <typename T>
void subtract(T* out, const T* x, const T* y, int64_t length) {
  run([=]() __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) out[i] = x[i] - y[i];
  });
}

template <typename T>
void add_combination(T* out, const T* factors, const T* const* x, int64_t count, int64_t length) {
  run([=]() __attribute__((always_inline)) { add_combination_of(out, factors, x, count, length); });
}

int64_t integer_dot(const int32_t* a, const int32_t* b, int64_t length) {
  return run([=]() __attribute__((always_inline)) { return integer_dot_of(a, b, length); });
}

template void dots(const float* const*, int64_t, const float*, int64_t, double*);
template void dots(const double* const*, int64_t, const double*, int64_t, double*);
template void subtract(float*, const float*, const float*, int64_t);
template void subtract(double*, const double*, const double*, int64_t);
template void add_combination(float*, const float*, const float* const*, int64_t, int64_t);
template void add_combination(double*, const double*, const double* const*, int64_t, int64_t);

}  // namespace dynloss
