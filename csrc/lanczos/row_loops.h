#pragma once

#include <cstdint>

namespace dynloss {

// The inner loops of row_algebra.h for float and double and of fingerprint.h, for the instruction set of
// cpu/instruction_set.h.

// Σ aᵢ bᵢ.
template <typename T>
double dot(const T* a, const T* b, int64_t length);

// out += factor x.
template <typename T>
void add_scaled(T* out, T factor, const T* x, int64_t length);

// Σ aᵢ bᵢ of integers, modulo 2⁶⁴.
int64_t integer_dot(const int32_t* a, const int32_t* b, int64_t length);

}  // namespace dynloss
