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
    const auto& row = o.table[static_cast<size_t>(elapsed) % o.table.size()];
    return {row.begin(), row.end()};
  }
  const Real turns = std::floor(elapsed / o.turn), t = elapsed - turns * o.turn;
  const auto place = static_cast<int64_t>(turns) % classes;
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
  Real total = 0, loss = 0;
  Real size = 0;  // of the terms that make up the loss: what its rounding error is relative to
};

inline Row row(const std::vector<Real>& z, const std::vector<Real>& gamma, int64_t label, Real smoothing) {
  const auto classes = static_cast<int64_t>(z.size());
  Row r;
  Real top = -INFINITY, sum = 0;
  for (const Real x : z) top = std::fmax(top, x);
  for (const Real x : z) sum += std::exp(x - top);
  for (int64_t c = 0; c < classes; ++c) {
    r.p.push_back(std::exp(z[c] - top) / sum);
    r.q.push_back(gamma[c] * ((c == label ? 1 - smoothing : 0) + smoothing / classes));
    r.total += r.q[c];
    if (r.q[c] == 0) continue;
    r.loss += r.q[c] * (std::log(sum) - (z[c] - top));
    r.size += r.q[c] * (1 + std::log(sum) + std::fabs(z[c] - top));
  }
  if (std::isnan(sum)) r.loss = NAN;
  return r;
}

inline Real dot(const std::vector<Real>& a, const std::vector<Real>& b) {
  Real sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// Order 1: Q p - q; 2: the derivative of that along v; 3: and of that along u, from p' = p (u - p·u).
inline std::vector<Real> derivative(const Row& r, int order, const std::vector<Real>& u,
                                    const std::vector<Real>& v) {
  std::vector<Real> x(r.p.size());
  const Real pv = dot(r.p, v), pu = dot(r.p, u);
  Real pv_along_u = 0;  // d(p·v)
  for (size_t c = 0; c < x.size(); ++c) pv_along_u += r.p[c] * (u[c] - pu) * v[c];
  for (size_t c = 0; c < x.size(); ++c) {
    if (order == 1) x[c] = r.total * r.p[c] - r.q[c];
    if (order == 2) x[c] = r.total * r.p[c] * (v[c] - pv);
    if (order == 3) x[c] = r.total * (r.p[c] * (u[c] - pu) * (v[c] - pv) - r.p[c] * pv_along_u);
  }
  return x;
}

}  // namespace twin
