#include "spectrum.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "row_algebra.h"
#include "small_eigen.h"
#include "symmetry.h"

namespace dynloss {
namespace {

void check_finite(double x) {
  if (!std::isfinite(x)) throw std::runtime_error("H: expected finite products, got one that is not finite");
}

// H v, which may be interrupted.
struct Multiply {
  SymmetricOperator& op;
  const std::function<void()>& poll;
  bool noisily = false;

  at::Tensor operator()(const at::Tensor& v) const {
    poll();
    return noisily ? op.apply_noisily(v) : op.apply(v);
  }
};

// The row becomes H v in a unit in which no square overflows or vanishes, which is returned.
double multiply_into(const Rows& row, const Multiply& multiply, const at::Tensor& v) {
  assign(row, multiply(v));
  const double unit = scale_into_range(row);
  check_finite(unit);
  return unit;
}

// What is less than this share of what it is left of is mere rounding.
double negligible_share(const SymmetricOperator& op) { return 10.0 * rounding_of(op.options()); }

// Nodes and weights from the Lanczos matrix.
Quadrature quadrature_of(const std::vector<double>& alpha, const std::vector<double>& beta) {
  const EigenPairs pairs = tridiagonal_eigen(alpha, beta, 1);
  std::vector<size_t> order(alpha.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return pairs.values[a] < pairs.values[b]; });
  Quadrature out;
  for (const size_t i : order) {
    out.nodes.push_back(pairs.values[i]);
    out.weights.push_back(pairs.vectors[i] * pairs.vectors[i]);
  }
  return out;
}

}  // namespace

Quadrature gauss_quadrature(SymmetricOperator& op, const at::Tensor& start, int64_t steps,
                            const std::function<void()>& poll) {
  const at::NoGradGuard no_grad;
  const OnShards on_shards(op.shards());
  const Multiply multiply{op, poll}, noisily{op, poll, true};
  const int64_t limit = std::min(steps, op.dimension());
  // One row more than there are Lanczos vectors, for the last product.
  const at::Tensor rows = at::empty({limit + 1, op.size()}, op.options());
  const Rows first(rows, 0, 1);
  assign(first, start);
  normalise(first, 0.0);
  std::vector<double> alpha, beta;
  std::vector<std::vector<double>> columns;  // of V H Vᵀ, as far as they are not zero for a symmetric H
  double unit = 1.0, largest = 0.0;
  for (int64_t j = 0; j < limit; ++j) {
    const Rows known(rows, 0, j + 1), slot(rows, j + 1, 1);
    const at::Tensor v = Rows(rows, j, 1).vector();
    if (j == 0) {
      unit = multiply_into(slot, multiply, v);
    } else {
      assign(slot, multiply(v), unit);
    }
    columns.push_back(to_host({orthogonalise(slot, slot, known)}));
    const double diagonal = columns[j][j], next = columns[j][j + 1];
    check_finite(diagonal);
    check_finite(next);
    alpha.push_back(diagonal / unit);
    largest = std::max({largest, std::abs(diagonal), next});
    // Where nothing is left of the product, the space is invariant, and its spectrum is known exactly.
    if (j + 1 == limit || next <= negligible_share(op) * largest) break;
    beta.push_back(next / unit);
    assign(slot, slot, 1.0 / next);
  }
  const auto m = static_cast<int64_t>(alpha.size());
  std::vector<double> projection(m * m);
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t i = 0; i < std::min(j + 2, m); ++i) projection[i * m + j] = columns[j][i];
  }
  Quadrature out = quadrature_of(alpha, beta);
  const double norm = unit * std::max(std::abs(out.nodes.front()), std::abs(out.nodes.back()));
  const Rows v(rows, 0, m);
  const Projection seen{v, projection, unit};
  const double asymmetry = seen.asymmetry();
  if (SymmetryCheck(op, 1.0).fails(asymmetry, norm, seen, noisily)) out.asymmetry = asymmetry / norm;
  return out;
}

TraceSamples sample_trace(SymmetricOperator& op, int64_t range, int64_t samples,
                          const at::Generator& generator, const std::function<void()>& poll) {
  const at::NoGradGuard no_grad;
  const OnShards on_shards(op.shards());
  const Multiply multiply{op, poll}, noisily{op, poll, true};
  TraceSamples out;
  // Q, and the last two vectors and their products.
  const at::Tensor rows = at::empty({range + 4, op.size()}, op.options());
  SymmetryCheck symmetry(op, 1.0);
  double units[2], norm = 0.0;
  int64_t forms = 0;
  const auto quadratic_form = [&](const at::Tensor& v) {
    const int64_t now = forms++ % 2;
    const Rows pair(rows, range, 2), products(rows, range + 2, 2), product(rows, range + 2 + now, 1);
    assign(Rows(rows, range + now, 1), v);
    units[now] = multiply_into(product, multiply, v);
    std::vector<double> entries = to_host({inner_products(pair, products), lengths(product)});
    norm = std::max(norm, entries.back() / units[now]);
    entries.pop_back();
    for (size_t i = 0; i < entries.size(); ++i) entries[i] /= units[i % 2];
    const Projection seen{pair, entries, 1.0};
    const double asymmetry = forms > 1 ? seen.asymmetry() : 0.0;
    if (symmetry.fails(asymmetry, norm, seen, noisily)) out.asymmetry = asymmetry / norm;
    return entries[3 * now];
  };
  for (int64_t i = 0; i < range; ++i) {
    const Rows known(rows, 0, i), slot(rows, i, 1);
    const auto extend = [&] {  // by the slot; false where Q has all of it but mere rounding
      const at::Tensor before = lengths(slot);
      if (i > 0) orthogonalise(slot, slot, known);
      const std::vector<double> read = to_host({before, lengths(slot)});
      if (!(read[1] > negligible_share(op) * read[0])) return false;
      assign(slot, slot, 1.0 / read[1]);
      return true;
    };
    multiply_into(slot, multiply, random_signs(op, generator));
    // Where Q holds the whole range of H, any direction will do.
    while (!extend()) assign(slot, random_normal(op, generator));
  }
  for (int64_t i = 0; i < range && out.asymmetry == 0.0; ++i) {
    out.on_range += quadratic_form(Rows(rows, i, 1).vector());
  }
  if (range == op.dimension()) return out;
  for (int64_t i = 0; i < samples && out.asymmetry == 0.0; ++i) {
    const at::Tensor z = random_signs(op, generator);
    if (range > 0) orthogonalise(z, z, Rows(rows, 0, range));
    out.beside_it.push_back(quadratic_form(z));
  }
  return out;
}

}  // namespace dynloss
