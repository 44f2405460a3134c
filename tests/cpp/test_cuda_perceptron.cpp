// The perceptron kernels in the emulator against the definition in double precision, one loop a formula.
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/oscillation.h"
#include "core/perceptron.h"
#include "cuda/perceptron.h"

namespace {

using dynloss::Activation;
using dynloss::Clock;
using dynloss::PerceptronShape;
using Numbers = std::vector<double>;

std::mt19937_64 generator(0);

Numbers normal(int64_t count, double scale = 1.0) {
  std::normal_distribution<double> draw;
  Numbers x(count);
  for (double& value : x) value = scale * draw(generator);
  return x;
}

// One member at one set of parameters.
struct Definition {
  PerceptronShape shape;
  const double* inputs;  // (N, D)
  const int64_t* target;
  Numbers gamma;

  struct Row {
    Numbers hidden, slope, hidden_along, p, gradient, gradient_along;
    double loss;
    bool right;
  };

  static double at(const Numbers& flat, int64_t place) { return flat[place]; }

  Row row(const Numbers& flat, const Numbers& v, int64_t n) const {
    const auto [N, D, H, C, activation] = shape;
    Row r;
    Numbers z(C), y(C);
    for (int64_t c = 0; c < C; ++c) {
      z[c] = flat[shape.b2() + c];
      y[c] = v[shape.b2() + c];
    }
    for (int64_t h = 0; h < H; ++h) {
      double x = flat[shape.b1() + h], along = v[shape.b1() + h];
      for (int64_t d = 0; d < D; ++d) {
        x += inputs[n * D + d] * flat[d * H + h];
        along += inputs[n * D + d] * v[d * H + h];
      }
      const bool relu = activation == Activation::relu;
      const double value = relu ? std::max(x, 0.0) : std::tanh(x);
      const double slope = relu ? (x > 0 ? 1.0 : 0.0) : 1 - value * value;
      r.hidden.push_back(value);
      r.slope.push_back(slope);
      r.hidden_along.push_back(slope * along);
      for (int64_t c = 0; c < C; ++c) {
        z[c] += value * flat[shape.w2() + h * C + c];
        y[c] += value * v[shape.w2() + h * C + c] + slope * along * flat[shape.w2() + h * C + c];
      }
    }
    double top = z[0], sum = 0, mean = 0;
    int64_t answer = 0;
    for (int64_t c = 1; c < C; ++c)
      if (z[c] > top) top = z[answer = c];
    for (int64_t c = 0; c < C; ++c) sum += std::exp(z[c] - top);
    for (int64_t c = 0; c < C; ++c) {
      r.p.push_back(std::exp(z[c] - top) / sum);
      mean += r.p[c] * y[c];
    }
    const int64_t label = target[n];
    for (int64_t c = 0; c < C; ++c) {
      r.gradient.push_back(gamma[label] * (r.p[c] - (c == label)) / static_cast<double>(N));
      r.gradient_along.push_back(gamma[label] * r.p[c] * (y[c] - mean) / static_cast<double>(N));
    }
    r.loss = std::log(sum) - (z[label] - top);
    r.right = answer == label;
    return r;
  }

  // The gradient, and its derivative along v, of the mean loss; and the means of what is measured.
  void evaluate(const Numbers& flat, const Numbers& v, Numbers& gradient, Numbers& product,
                double (&means)[3]) const {
    const auto [N, D, H, C, activation] = shape;
    gradient.assign(shape.size(), 0.0);
    product.assign(shape.size(), 0.0);
    means[0] = means[1] = means[2] = 0;
    for (int64_t n = 0; n < N; ++n) {
      const Row r = row(flat, v, n);
      means[0] += gamma[target[n]] * r.loss / static_cast<double>(N);
      means[1] += r.loss / static_cast<double>(N);
      means[2] += r.right / static_cast<double>(N);
      for (int64_t c = 0; c < C; ++c) {
        gradient[shape.b2() + c] += r.gradient[c];
        product[shape.b2() + c] += r.gradient_along[c];
      }
      for (int64_t h = 0; h < H; ++h) {
        double back = 0, back_along = 0;
        for (int64_t c = 0; c < C; ++c) {
          const int64_t place = shape.w2() + h * C + c;
          back += r.gradient[c] * flat[place];
          back_along += r.gradient_along[c] * flat[place] + r.gradient[c] * v[place];
          gradient[place] += r.hidden[h] * r.gradient[c];
          product[place] += r.hidden[h] * r.gradient_along[c] + r.hidden_along[h] * r.gradient[c];
        }
        const double curved =
            activation == Activation::tanh ? -2 * r.hidden[h] * r.hidden_along[h] * back : 0.0;
        back *= r.slope[h];
        back_along = back_along * r.slope[h] + curved;
        gradient[shape.b1() + h] += back;
        product[shape.b1() + h] += back_along;
        for (int64_t d = 0; d < D; ++d) {
          gradient[d * H + h] += back * inputs[n * D + d];
          product[d * H + h] += back_along * inputs[n * D + d];
        }
      }
    }
  }
};

// Whether two lists of numbers are the same up to rounding, relative to the length of the second.
bool close(const Numbers& a, const Numbers& b, double tolerance) {
  double error = 0, length = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    length += b[i] * b[i];
  }
  return std::sqrt(error) <= tolerance * std::sqrt(length) + 1e-30;
}

// M members as the kernels take them, all in T.
template <typename T>
struct Problem {
  PerceptronShape shape;
  int64_t members;
  bool own_inputs;
  std::vector<T> inputs, parameters, v;
  std::vector<int64_t> target;
  std::vector<Clock> clocks;
  int64_t step;

  Problem(PerceptronShape shape, int64_t members, bool own_inputs, int64_t step)
      : shape(shape), members(members), own_inputs(own_inputs), step(step) {
    const auto narrow = [](const Numbers& x) { return std::vector<T>(x.begin(), x.end()); };
    inputs = narrow(normal((own_inputs ? members : 1) * shape.samples * shape.inputs));
    parameters = narrow(normal(members * shape.size(), 0.5));
    v = narrow(normal(members * shape.size()));
    std::uniform_int_distribution<int64_t> label(0, shape.classes - 1);
    for (int64_t n = 0; n < shape.samples; ++n) target.push_back(label(generator));
    for (int64_t m = 0; m < members; ++m)
      clocks.push_back({1.0 + 10.0 * static_cast<double>(m), 7.0, 7.0, 0.0, INFINITY, 0.0});
  }

  void describe(dynloss::cuda::Perceptrons& x) {
    x.is_double = sizeof(T) == 8;
    x.members = members;
    x.shape = shape;
    x.inputs = inputs.data();
    x.inputs_member_stride = own_inputs ? shape.samples * shape.inputs : 0;
    x.inputs_row_stride = shape.inputs;
    x.inputs_column_stride = 1;
    x.target = target.data();
    x.target_row_stride = 1;
    x.parameters = parameters.data();
    x.clock = clocks.data();
    x.clock_member_stride = 1;
    x.step = step;
  }

  Definition definition(int64_t m, int64_t at_step, Numbers& own_inputs_as_double) const {
    const T* from = inputs.data() + (own_inputs ? m * shape.samples * shape.inputs : 0);
    own_inputs_as_double.assign(from, from + shape.samples * shape.inputs);
    const auto weights = dynloss::weights_at({&clocks[m], nullptr, nullptr, 0, shape.classes}, at_step);
    Definition made{shape, own_inputs_as_double.data(), target.data(), {}};
    for (int64_t c = 0; c < shape.classes; ++c) made.gamma.push_back(weights[c]);
    return made;
  }

  Numbers row_of(const std::vector<T>& all, int64_t m) const {
    return {all.begin() + m * shape.size(), all.begin() + (m + 1) * shape.size()};
  }
};

// A launch with a workspace of exactly the size that it asks for.
template <typename T, typename P>
void run(P& x) {
  int64_t size = 0;
  CHECK(workspace_size(x, &size) == cudaSuccess);
  std::vector<T> workspace(size * x.members, static_cast<T>(NAN));
  x.workspace = workspace.data();
  CHECK(launch(x, nullptr) == cudaSuccess);
}

template <typename T>
constexpr double tolerance = sizeof(T) == 8 ? 1e-12 : 3e-5;

template <typename T>
void test_derivatives(Problem<T>& problem) {
  for (const bool along : {false, true}) {
    std::vector<T> out(problem.parameters.size(), static_cast<T>(NAN));
    Numbers loss(problem.members, NAN);
    dynloss::cuda::PerceptronDerivative x{};
    problem.describe(x);
    x.v = along ? problem.v.data() : nullptr;
    x.loss = along ? nullptr : loss.data();
    x.out = out.data();
    run<T>(x);
    for (int64_t m = 0; m < problem.members; ++m) {
      Numbers inputs, gradient, product;
      double means[3];
      problem.definition(m, problem.step, inputs)
          .evaluate(problem.row_of(problem.parameters, m), problem.row_of(problem.v, m), gradient, product,
                    means);
      CHECK(close(problem.row_of(out, m), along ? product : gradient, tolerance<T>));
      if (!along) CHECK(std::abs(loss[m] - means[0]) <= tolerance<T> * means[0]);
    }
  }
}

template <typename T>
void test_training(Problem<T>& problem, bool with_momentum) {
  constexpr int64_t steps = 5, every = 2;
  std::vector<T> parameters = problem.parameters, velocity(with_momentum ? parameters.size() : 0);
  const int64_t first = (problem.step + every - 1) / every * every,
                count = (problem.step + steps - 1 - first) / every + 1;
  Numbers rates(problem.members, 0.1), momenta(problem.members, 0.8),
      records(count * problem.members * 3, NAN);
  const auto finite = std::make_unique<bool[]>(problem.members);
  // The last member goes to infinity at once, another is not trained.
  for (int64_t m = 0; m < problem.members; ++m) finite[m] = m != 1;
  if (problem.members > 2) rates.back() = INFINITY;
  dynloss::cuda::PerceptronDescent x{};
  problem.describe(x);
  x.parameters = parameters.data();
  x.velocity = with_momentum ? velocity.data() : nullptr;
  x.momentum = with_momentum ? momenta.data() : nullptr;
  x.finite = finite.get();
  x.learning_rate = rates.data();
  x.num_steps = steps;
  x.first_record = first;
  x.record_every = every;
  x.records = records.data();
  run<T>(x);
  for (int64_t m = 0; m < problem.members; ++m) {
    const bool diverges = m > 1 && m + 1 == problem.members;
    CHECK(finite[m] == (m != 1 && !diverges));
    Numbers flat = problem.row_of(problem.parameters, m), before(flat.size()), gradient, product, inputs;
    if (m == 1 || diverges) {
      CHECK(problem.row_of(parameters, m) == flat);
      for (int64_t row = 0; row < count; ++row) CHECK(std::isnan(records[(row * problem.members + m) * 3]));
      continue;
    }
    double means[3];
    for (int64_t step = problem.step; step < problem.step + steps; ++step) {
      problem.definition(m, step, inputs).evaluate(flat, flat, gradient, product, means);
      for (size_t i = 0; i < flat.size(); ++i) {
        before[i] = with_momentum ? momenta[m] * before[i] + gradient[i] : gradient[i];
        flat[i] -= rates[m] * before[i];
      }
      if (step % every != 0) continue;
      problem.definition(m, step + 1, inputs).evaluate(flat, flat, gradient, product, means);
      const double* row = &records[((step - first) / every * problem.members + m) * 3];
      for (int i = 0; i < 2; ++i) CHECK(std::abs(row[i] - means[i]) <= 10 * tolerance<T> * means[i]);
      CHECK(std::abs(row[2] - means[2]) < 1e-12);
    }
    CHECK(close(problem.row_of(parameters, m), flat, 10 * tolerance<T>));
    if (with_momentum) CHECK(close(problem.row_of(velocity, m), before, 10 * tolerance<T>));
  }
}

template <typename T>
void test_all(const char* name, const std::vector<PerceptronShape>& shapes) {
  for (const PerceptronShape& shape : shapes)
    for (const Activation activation : {Activation::relu, Activation::tanh}) {
      PerceptronShape own = shape;
      own.activation = activation;
      context = std::string(name) + ": N " + std::to_string(own.samples) + ", D " +
                std::to_string(own.inputs) + ", H " + std::to_string(own.hidden) + ", C " +
                std::to_string(own.classes) + (activation == Activation::relu ? ", relu" : ", tanh");
      Problem<T> problem(own, 3, own.samples % 2 == 1,
                         own.inputs % 2 == 0 ? 2 : 3);  // the last row is due or not
      test_derivatives(problem);
      test_training(problem, own.hidden % 2 == 0);
    }
}

}  // namespace

// "faults": enough to find planted ones.
int main(int argc, char** argv) {
  std::vector<PerceptronShape> shapes = {
      {40, 2, 10, 3, {}}, {7, 5, 3, 9, {}}, {300, 2, 31, 3, {}}, {9, 2, 260, 2, {}}};
  if (argc > 1 && std::string(argv[1]) == "faults") {
    stop_at_first = true;
    test_all<double>("double", shapes);
    return finish("perceptrons, faults");
  }
  shapes.insert(shapes.end(), {{1, 1, 1, 1, {}}, {1, 3, 2, 2, {}}, {65, 9, 300, 2, {}}, {33, 4, 8, 4, {}}});
  test_all<double>("double", shapes);
  test_all<float>("float", shapes);
  // Next to nothing, and then not even the parameters, fit into a block.
  for (const int bytes : {4096, 2048}) {
    emulator::settings().max_block_memory = bytes;
    test_all<double>("double in little memory", {{40, 2, 10, 3, {}}, {65, 9, 40, 2, {}}});
  }
  return finish("perceptrons");
}
