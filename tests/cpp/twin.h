// The definitions in plain long double, written without a look at csrc/core: what the kernels are compared
// with.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace twin {

using Real = long double;

struct Oscillation {
  Real amplitude = 1, period = 1, turn = 1, start = 0, stop = INFINITY;
  int waveform = 0;  // triangle, sine, square
  std::vector<int64_t> class_order;
  std::vector<std::vector<double>> table;
};

inline std::vector<Real> weights(const Oscillation& o, int64_t classes, int64_t step) {
  std::vector<Real> g(classes, 1);
  if (step < o.start || step >= o.stop) return g;
  const Real elapsed = step - o.start;
  if (!o.table.empty()) {
    const auto& row = o.table[static_cast<uint64_t>(elapsed) % o.table.size()];
    return {row.begin(), row.end()};
  }
  // Remainders are exact, also of numbers with all 64 bits.
  const Real t = std::isinf(o.turn) ? elapsed : std::fmod(elapsed, o.turn);
  const Real steps = std::isinf(o.turn) ? 0 : std::fmod(elapsed, o.turn * classes) - t;
  const auto place = static_cast<int64_t>(std::nearbyint(steps / o.turn));
  const int64_t active = o.class_order.empty() ? place : o.class_order[place];
  Real raised = o.amplitude;
  if (o.waveform == 1) raised = 1 + (o.amplitude - 1) * std::sin(std::acos(Real(-1)) * t / o.period);
  if (o.waveform == 0)
    raised = t < o.period / 2 ? 1 + 2 * (o.amplitude - 1) * t / o.period
                              : 2 * o.amplitude - 1 - 2 * (o.amplitude - 1) * t / o.period;
  g[active] = raised;
  const Real sum = raised + (classes - 1);
  for (Real& x : g) x *= classes / sum;
  return g;
}

struct Row {
  std::vector<Real> p, q;
  std::vector<Real> others;  // 1 - p, with all its digits
  Real total = 0, loss = 0;
  // Of the terms that make up the loss, and of those of a gradient's element that smoothing adds: what
  // rounding errors are relative to.
  Real size = 0, smoothed = 0;
};

inline Row row(const std::vector<Real>& z, const std::vector<Real>& gamma, int64_t label, Real smoothing) {
  const auto classes = static_cast<int64_t>(z.size());
  Row r;
  int64_t first = 0;
  for (int64_t c = 0; c < classes; ++c)
    if (z[c] > z[first] || std::isnan(z[first])) first = c;
  const Real top = z.empty() ? 0 : z[first];
  Real rest = 0;  // Σ exp(z - top) but for the first maximum
  for (int64_t c = 0; c < classes; ++c) rest += c == first ? 0 : std::exp(z[c] - top);
  if (!std::isfinite(top)) rest = NAN;
  for (int64_t c = 0; c < classes; ++c) {
    r.p.push_back(std::exp(z[c] - top) / (1 + rest));
    r.others.push_back((c == first ? rest : rest + 1 - std::exp(z[c] - top)) / (1 + rest));
    r.q.push_back(gamma[c] * ((c == label ? 1 - smoothing : 0) + smoothing / classes));
    r.total += r.q[c];
    r.smoothed += gamma[c] * smoothing / classes;
    if (r.q[c] == 0) continue;
    r.loss += r.q[c] * (std::log1p(rest) - (z[c] - top));
    r.size += r.q[c] * (std::log1p(rest) + std::fabs(z[c] - top));
  }
  if (std::isnan(rest)) r.loss = NAN;
  return r;
}

// Order 1: Q p - q; 2: the derivative of that along v; 3: and of that along u; from the differences to the
// other classes, p' = p Σ_j p_j (u - u_j).
inline std::vector<Real> derivative(const Row& r, int order, const std::vector<Real>& u,
                                    const std::vector<Real>& v) {
  const size_t classes = r.p.size();
  std::vector<Real> x(classes);
  Real pu = 0, pv = 0, covariance = 0;
  for (size_t c = 0; c < classes; ++c) pu += r.p[c] * u[c], pv += r.p[c] * v[c];
  for (size_t c = 0; c < classes; ++c) covariance += r.p[c] * (u[c] - pu) * (v[c] - pv);
  for (size_t c = 0; c < classes; ++c) {
    // Of a class that outweighs the others, the sums over these.
    Real du = u[c] - pu, dv = v[c] - pv, of_class = covariance, elsewhere = r.total - r.q[c];
    if (!(r.p[c] <= 0.5L)) {
      du = dv = of_class = 0;
      for (size_t j = 0; j < classes; ++j) {
        du += r.p[j] * (u[c] - u[j]);
        dv += r.p[j] * (v[c] - v[j]);
        of_class += r.p[j] * (u[c] - u[j]) * (v[c] - v[j]);
      }
      of_class -= du * dv;
    }
    if (order == 1) x[c] = elsewhere * r.p[c] - r.q[c] * r.others[c];
    if (order == 2) x[c] = r.total * r.p[c] * dv;
    if (order == 3) x[c] = r.total * r.p[c] * (du * dv - of_class);
  }
  return x;
}

}  // namespace twin
