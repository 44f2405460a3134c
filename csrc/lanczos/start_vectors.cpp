#include "start_vectors.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

namespace dynloss {
namespace {

// A vector with less than this share of its squared length in the basis is lost.
constexpr double kSquaredShareKept = 0.75;
// Old and new eigenvectors that overlap by less are not the same.
constexpr double kOverlapOfTheSame = 0.5;

}  // namespace

StartVectors::StartVectors(const at::Tensor& rows) : rows_(rows) {
  if (rows_.defined()) lengths_ = to_host({dynloss::lengths(rows_)});
  for (size_t i = 0; i < lengths_.size(); ++i) {
    if (lengths_[i] > 0.0) unseen_.push_back(static_cast<int64_t>(i));
  }
}

at::Tensor StartVectors::sum() const {
  if (unseen_.empty()) return {};
  std::vector<double> weights;  // unequal ones, as v and -v may be there
  for (const double length : lengths_) {
    const double i = static_cast<double>(weights.size());
    weights.push_back(length > 0.0 ? (1.0 + 0.5 * i) / length : 0.0);
  }
  return combinations(to_device(weights, rows_.size(0), rows_), rows_);
}

std::optional<int64_t> StartVectors::lost(const RitzBasis& basis) {
  while (!unseen_.empty()) {
    const int64_t i = unseen_.back();
    unseen_.pop_back();
    const double* begin = overlaps(i, basis);
    const double inside = std::inner_product(begin, begin + basis.size(), begin, 0.0);
    if (inside < kSquaredShareKept * lengths_[i] * lengths_[i]) return i;
  }
  return std::nullopt;
}

std::vector<int64_t> StartVectors::follow(const RitzBasis& basis, std::vector<double>& coefficients) {
  const int64_t m = basis.size(), count = static_cast<int64_t>(coefficients.size()) / m;
  std::vector<int64_t> origins(count, -1);
  std::vector<bool> taken(lengths_.size());
  while (true) {
    double best = kOverlapOfTheSame, overlap = 0.0;
    int64_t from = -1, to = -1;
    for (int64_t i = 0; i < static_cast<int64_t>(lengths_.size()); ++i) {
      for (int64_t j = 0; j < count; ++j) {
        if (taken[i] || lengths_[i] == 0.0 || origins[j] >= 0) continue;
        const double* old = overlaps(i, basis);
        const double inner = std::inner_product(old, old + m, &coefficients[j * m], 0.0);
        if (std::abs(inner) < best * lengths_[i]) continue;
        best = std::abs(inner) / lengths_[i];
        overlap = inner;
        from = i;
        to = j;
      }
    }
    if (from < 0) return origins;
    taken[from] = true;
    origins[to] = from;
    double* found = &coefficients[to * m];
    if (overlap < 0.0) std::transform(found, found + m, found, std::negate<>());
  }
}

const double* StartVectors::overlaps(int64_t i, const RitzBasis& basis) {
  if (overlaps_.empty()) overlaps_ = basis.overlaps(rows_);
  return &overlaps_[i * basis.size()];
}

}  // namespace dynloss
