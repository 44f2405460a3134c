#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "operator.h"

namespace dynloss {

enum class Which { kLargest, kSmallest, kMagnitude };

struct EigshOptions {
  int64_t count = 1;  // k
  Which which = Which::kLargest;
  double tolerance = 1e-3;
  int64_t max_products = 1000;
  int64_t max_basis = 24;
  uint64_t seed = 0;
  bool audit = true;           // probe the complement of the basis before claiming convergence
  std::function<void()> poll;  // called before every product; may throw to interrupt
};

struct EigshResult {
  std::vector<double> values;      // descending; NaN, at the end, where no finite product was had
  std::vector<double> residuals;   // ‖H y - θ y‖
  std::vector<uint8_t> converged;  // flags
  // The start vector that each vector overlaps with by at least a half, each at most once; -1 for none.
  std::vector<int64_t> origins;
  // (k, op.size()), unit rows with the sign of their origin; zeros where the value is NaN.
  at::Tensor vectors;
  int64_t num_products = 0;
  // With which an eigenvector beyond the returned ones, if there is one, would have gone unnoticed by the
  // audit; NaN without one.
  double miss_probability = 0.0;
  std::string status;  // EigenResult in eigen.py says which there are
  // Where that is "not symmetric": max |u · H v - v · H u| of unit vectors, in units of ‖H‖.
  double asymmetry = 0.0;
};

// The wanted eigenpairs of a symmetric operator by Rayleigh-Ritz on a basis grown by residuals: thick-restart
// Lanczos (Wu & Simon 2000) when it starts from one vector, and as good from a block of old eigenvectors.
// start: (m, op.size()) rows, whose Krylov space is searched, or undefined for a random vector.
EigshResult eigsh(SymmetricOperator& op, const EigshOptions& options, const at::Tensor& start);

}  // namespace dynloss
