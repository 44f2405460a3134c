#pragma once

#include <cstdint>

namespace dynloss {

// The inner loops of row_algebra.h, for the instruction set of cpu/instruction_set.h.

// Σ aᵢ bᵢ.
double dot(const float* a, const float* b, int64_t length);
double dot(const double* a, const double* b, int64_t length);

// out += factor x.
void add_scaled(float* out, float factor, const float* x, int64_t length);
void add_scaled(double* out, double factor, const double* x, int64_t length);

}  // namespace dynloss
