// csrc/core on the host: Γ(step) and the maths of a row against long double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "core/cross_entropy_row.h"
#include "core/oscillation.h"
#include "twin.h"

namespace {

using namespace dynloss;
using twin::Real;

std::mt19937_64 random_bits(7);

double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(random_bits);
}
int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}

bool close(Real x, Real expected, Real tolerance) {
  if (std::isnan(expected)) return std::isnan(x);
  return x == expected || std::fabs(x - expected) <= tolerance;
}

struct Case {
  Clock clock;
  twin::Oscillation oscillation;
  int64_t classes;
  std::vector<int64_t> order;
  std::vector<double> table;
  int64_t table_rows = 0;

  Schedule schedule() const {
    return {&clock, order.empty() ? nullptr : order.data(), table.empty() ? nullptr : table.data(),
            table_rows, classes};
  }
};

// Periods are multiples of 1/8, so that both sides know exactly which turn a step belongs to; closed turns
// are for whole periods.
Case random_case(int waveform) {
  Case x;
  x.classes = integer(1, 12);
  const bool closed = integer(0, 1) == 1;
  const double period =
      closed ? static_cast<double>(integer(1, 10000)) : static_cast<double>(integer(8, 80000)) / 8;
  const double start = static_cast<double>(integer(-5, 50));
  const double stop = integer(0, 2) == 0 ? INFINITY : start + static_cast<double>(integer(0, 100000));
  x.clock = {uniform(1, 100), period, closed ? period + 1 : period,
             start,           stop,   static_cast<double>(waveform)};
  x.oscillation = {x.clock.amplitude, x.clock.period, x.clock.turn, start, stop, waveform, {}, {}};
  if (integer(0, 1) == 1) {
    for (int64_t c = 0; c < x.classes; ++c) x.order.push_back(c);
    std::shuffle(x.order.begin(), x.order.end(), random_bits);
    x.oscillation.class_order = x.order;
  }
  return x;
}

void compare_weights(const Case& x, int64_t step) {
  context = "step " + std::to_string(step) + ", period " + std::to_string(x.clock.period) + ", turn " +
            std::to_string(x.clock.turn) + ", amplitude " + std::to_string(x.clock.amplitude) + ", classes " +
            std::to_string(x.classes);
  const ClassWeights weights = weights_at(x.schedule(), step);
  const auto expected = twin::weights(x.oscillation, x.classes, step);
  Real sum = 0;
  for (int64_t c = 0; c < x.classes; ++c) {
    // Near the end of a turn g is the small difference of numbers as large as 2 A.
    CHECK(close(weights[c], expected[c], 2e-15L * (1 + x.clock.amplitude) * (1 + expected[c])));
    sum += weights[c];
  }
  if (x.table.empty()) CHECK(close(sum, x.classes, 1e-13L * x.classes));
}

void test_weights() {
  for (int i = 0; i < 3000; ++i) {
    const Case x = random_case(i % 3);
    compare_weights(x, integer(-10, 200000));
    // Far out, where float32 cannot tell neighbours apart, and at the ends of turns.
    compare_weights(x, (int64_t{1} << 40) + integer(0, 1000));
    // Where doubles are whole numbers, or every second, or every 1024th.
    for (const int bits : {52, 53, 60, 62}) compare_weights(x, (int64_t{1} << bits) + integer(-1000, 1000));
    compare_weights(x, INT64_MAX - integer(0, 1000));
    const auto turn = static_cast<int64_t>(std::ceil(x.clock.turn * static_cast<double>(integer(0, 40))));
    for (int64_t d = -1; d <= 1; ++d) compare_weights(x, static_cast<int64_t>(x.clock.start_step) + turn + d);
  }
}

void test_tables() {
  for (int i = 0; i < 300; ++i) {
    Case x = random_case(0);
    x.order.clear();
    x.table_rows = integer(1, 7);
    for (int64_t s = 0; s < x.table_rows; ++s) {
      x.oscillation.table.emplace_back();
      for (int64_t c = 0; c < x.classes; ++c) {
        x.table.push_back(uniform(0, 5));
        x.oscillation.table.back().push_back(x.table.back());
      }
    }
    for (int j = 0; j < 10; ++j) compare_weights(x, integer(-10, 100000));
    for (int j = 0; j < 10; ++j) compare_weights(x, INT64_MAX - j);  // where doubles are 1024 apart
  }
}

// As exact as fmod, for turns of any length, at their ends, too.
void test_turns() {
  for (int i = 0; i < 200000; ++i) {
    const double turn = i % 3 == 0   ? static_cast<double>(integer(1, 5000))
                        : i % 3 == 1 ? uniform(1, 5000)
                                     : std::pow(10.0, uniform(-300, 18));
    double elapsed = static_cast<double>(integer(0, int64_t(1) << integer(1, 53)));
    if (i % 5 == 0) elapsed = std::floor(elapsed / turn) * turn;
    if (!(elapsed / turn < 0x1p53)) continue;
    context = "turns of " + std::to_string(turn) + " in " + std::to_string(elapsed);
    double turns = -1;
    const double t = split_turns(elapsed, turn, &turns);
    const double expected = std::fmod(elapsed, turn);
    CHECK(t == expected);
    CHECK(turns == static_cast<double>(std::nearbyint((Real(elapsed) - expected) / turn)));
  }
}

// The two ways to a phase agree where both are exact, and beyond with long double.
void test_phases() {
  for (int i = 0; i < 20000; ++i) {
    const int64_t classes = integer(1, 300);
    double turn = i % 3 == 0 ? static_cast<double>(integer(1, 5000)) : std::pow(10.0, uniform(-9, 18));
    if (i % 3 == 1) turn = static_cast<double>(static_cast<float>(turn));
    auto elapsed = static_cast<uint64_t>(random_bits()) >> integer(0, 63);
    if (i % 4 == 0) {  // a step that a turn begins with
      turn = static_cast<double>(integer(1, 40000)) / 8;
      elapsed -= elapsed % static_cast<uint64_t>(8 * turn);
    }
    context = std::to_string(elapsed) + " steps in turns of " + std::to_string(turn);
    const Phase far = far_phase(elapsed, turn, classes);
    const Real t = std::fmod(Real(elapsed), Real(turn));
    CHECK(far.t == static_cast<double>(t));
    CHECK(far.place == std::nearbyint((std::fmod(Real(elapsed), Real(turn) * classes) - t) / turn));
    const double steps = static_cast<double>(elapsed);
    if (steps >= 0x1p53 || steps / turn >= 0x1p53) continue;
    const Phase near = phase_of(steps, turn, classes);
    CHECK(near.place == far.place && near.t == far.t);
  }
}

void test_endless_turn() {
  context = "a turn without end";
  double turns = -1;
  CHECK(split_turns(123.0, INFINITY, &turns) == 123.0 && turns == 0.0);
}

// Parts of a row brought together in any order give the whole.
template <typename T>
void test_max_sum(Real epsilon) {
  for (int i = 0; i < 2000; ++i) {
    std::vector<T> z(integer(1, 60) * 4);
    const double scale = std::pow(10.0, uniform(-2, 2.5));
    for (T& x : z)
      x = integer(0, 9) == 0 ? -static_cast<T>(INFINITY) : static_cast<T>(uniform(-scale, scale));
    if (i % 50 == 0)
      for (T& x : z) x = -static_cast<T>(INFINITY);
    if (i % 50 == 1) z[0] = static_cast<T>(NAN);
    if (i % 50 == 2) z[0] = static_cast<T>(INFINITY);
    context = "MaxSum of " + std::to_string(z.size()) + " elements, scale " + std::to_string(scale);
    std::vector<MaxSum<T>> parts(integer(1, 5), MaxSum<T>::empty());
    for (size_t k = 0; k < z.size(); k += 4) {
      const T four[4] = {z[k], z[k + 1], z[k + 2], z[k + 3]};
      parts[random_bits() % parts.size()].add(four, [](T x) { return std::exp(x); });
    }
    T top = -static_cast<T>(INFINITY), sum = 0;
    for (const auto& part : parts) top = part.max > top ? part.max : top;
    for (const auto& part : parts) sum += part.sum_at(top);
    Real expected_top = -INFINITY, expected = 0;
    for (const T x : z) expected_top = std::fmax(expected_top, static_cast<Real>(x));
    for (const T x : z)
      expected += x == -static_cast<T>(INFINITY) ? 0 : std::exp(static_cast<Real>(x) - expected_top);
    CHECK(close(sum, expected, 64 * epsilon * (1 + scale) * expected));
    if (!std::isnan(expected)) CHECK(top == static_cast<T>(expected_top));
  }
}

// A row as the kernels go through it, also if it is sure of one class, rightly or wrongly.
template <typename T>
void test_row(Real epsilon) {
  for (int i = 0; i < 4000; ++i) {
    const int64_t classes = integer(1, 40), label = integer(0, classes - 1);
    const double smoothing = i % 2 == 0 ? 0 : uniform(0, 1);
    std::vector<Real> z, gamma, u, v;
    for (int64_t c = 0; c < classes; ++c) {
      z.push_back(static_cast<T>(uniform(-5, 5)));
      u.push_back(static_cast<T>(uniform(-1, 1)));
      v.push_back(static_cast<T>(uniform(-1, 1)));
      gamma.push_back(static_cast<T>(uniform(0, 3)));
    }
    const int64_t sure = i % 3 == 0 ? label : integer(0, classes - 1);
    if (i % 4 > 0) z[sure] = static_cast<T>(uniform(0, 80));
    if (i % 5 == 0) z[integer(0, classes - 1)] = z[sure];
    context = "row of " + std::to_string(classes) + ", label " + std::to_string(label) + ", sure of " +
              std::to_string(sure);
    const twin::Row expected = twin::row(z, gamma, label, smoothing);
    const Real gamma_sum = std::accumulate(gamma.begin(), gamma.end(), Real(0));
    const auto q = SharedTargetWeights<T>(static_cast<double>(gamma_sum), smoothing, classes)
                       .at(static_cast<T>(gamma[label]));
    const Real tolerance = 200 * epsilon;
    CHECK(close(q.total, expected.total, tolerance * expected.total));
    const T top = static_cast<T>(*std::max_element(z.begin(), z.end()));
    RowSum<T> sum{};
    InnerProducts<T> products;
    T linear = 0;
    std::vector<T> e;
    for (int64_t c = 0; c < classes; ++c) {
      const T shifted = static_cast<T>(z[c]) - top;
      e.push_back(std::exp(shifted));
      (c == label ? sum.label : sum.others) += e[c];
      linear += (q.spread * static_cast<T>(gamma[c]) + (c == label ? q.on_label : 0)) * shifted;
      if (e[c] == 1) products.u_top = static_cast<T>(u[c]), products.v_top = static_cast<T>(v[c]);
    }
    CHECK(close(q.loss(sum, linear), expected.loss, tolerance * expected.size));
    const RowGradient<T> gradient(T(1), q, sum);
    for (int64_t c = 0; c < classes; ++c) products.add(e[c], static_cast<T>(u[c]), static_cast<T>(v[c]));
    products.divide(sum.all());
    const auto first = twin::derivative(expected, 1, u, v), second = twin::derivative(expected, 2, u, v),
               third = twin::derivative(expected, 3, u, v);
    for (int64_t c = 0; c < classes; ++c) {
      const T of_class = gradient.of_softmax(e[c]) - gradient.of_smoothing(static_cast<T>(gamma[c]));
      const Real size = (expected.total - expected.q[c]) * expected.p[c] + expected.q[c] * expected.others[c];
      CHECK(close(c == label ? gradient.at_label : of_class, first[c],
                  tolerance * (size + expected.smoothed) + 1e-36L));
      const T p = gradient.factor * e[c];
      const Real scale = tolerance * expected.total * expected.p[c] * expected.others[c] + 1e-36L;
      CHECK(close(p * products.factor(static_cast<T>(v[c])), second[c], scale));
      CHECK(close(p * products.factor(static_cast<T>(u[c]), static_cast<T>(v[c])), third[c], 4 * scale));
    }
  }
}

}  // namespace

int main() {
  test_weights();
  test_tables();
  test_turns();
  test_endless_turn();
  test_phases();
  test_max_sum<float>(6e-8L);
  test_max_sum<double>(1.2e-16L);
  test_row<float>(6e-8L);
  test_row<double>(1.2e-16L);
  return finish("csrc/core");
}
