#pragma once

#include <cstdint>

namespace dynloss {

// The inner loops of row_algebra.h for float and double and of fingerprint.h, for the instruction set of
// cpu/instruction_set.h.

// out[j] = Σ a[j]ᵢ bᵢ.
template <typename T>
void dots(const T* const* a, int64_t count, const T* b, int64_t length, double* out);

// out += Σ factors[j] x[j], one j after the other.
template <typename T>
void add_combination(T* out, const T* factors, const T* const* x, int64_t count, int64_t length);

// out = x - y.
template <typename T>
void subtract(T* out, const T* x, const T* y, int64_t length);

// Σ aᵢ bᵢ of integers, modulo 2⁶⁴.
int64_t integer_dot(const int32_t* a, const int32_t* b, int64_t length);

}  // namespace dynloss
