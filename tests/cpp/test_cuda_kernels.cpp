// The CUDA kernels under the emulator, against long double: every regime, element type and memory layout.
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "check.h"
#include "cuda/cross_entropy.h"
#include "cuda/storage.cuh"
#include "twin.h"

namespace {

using namespace dynloss;
using namespace dynloss::cuda;
using twin::Real;

std::mt19937_64 random_bits(11);
double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(random_bits);
}
int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}

// ---- element types

template <typename S>
constexpr Storage storage_v = std::is_same_v<S, float>    ? Storage::float32
                              : std::is_same_v<S, double> ? Storage::float64
                              : std::is_same_v<S, __half> ? Storage::float16
                                                          : Storage::bfloat16;
template <typename S>
Real precision = std::is_same_v<S, float>    ? 0x1p-24L
                 : std::is_same_v<S, double> ? 0x1p-53L
                 : std::is_same_v<S, __half> ? 0x1p-11L
                                             : 0x1p-8L;
template <typename S>
Real arithmetic_precision = std::is_same_v<S, double> ? 0x1p-53L : 0x1p-24L;
template <typename S>
Real smallest = std::is_same_v<S, __half> ? 0x1p-24L : 0x1p-120L;

// ---- operands in memory

enum class Layout { rows, padded, planes, far };

struct Shape {
  int64_t members, rows, classes;
  int64_t inner = 0;  // rows of an outer dimension; 0: all
  Layout layout = Layout::rows;
  int offset = 0;      // of the logits and directions from a multiple of 16 bytes, in elements
  int out_offset = 0;  // of the result

  int64_t inner_rows() const { return inner == 0 ? rows : inner; }
};

// An operand in an allocation without a byte to spare; what lies between its elements is watched.
template <typename S>
class Array {
 public:
  Array(const Shape& shape, int offset) : shape_(shape), offset_(offset) {
    const int64_t C = shape.classes, inner = shape.inner_rows();
    switch (shape.layout) {
      case Layout::rows:
        operand_ = {nullptr, shape.rows * C, inner * C, C, 1};
        break;
      case Layout::padded:
        operand_ = {nullptr, shape.rows * (C + 3) + 1, inner * (C + 3), C + 3, 1};
        break;
      case Layout::planes:
        operand_ = {nullptr, shape.rows * C, inner * C, 1, inner};
        break;
      case Layout::far:
        operand_ = {nullptr, 0, 0, far_stride, 1};
        break;
    }
    int64_t size = 0;
    for_each([&](int64_t e, int64_t r, int64_t c) { size = std::max(size, index(e, r, c) + 1); });
    bytes_ = (offset + size) * sizeof(S);
    // Memory that is never touched costs nothing, but AddressSanitizer would mark all of it.
    memory_ = shape.layout == Layout::far ? far_memory(bytes_) : std::malloc(std::max<size_t>(bytes_, 1));
    operand_.data = static_cast<S*>(memory_) + offset;
    if (shape.layout != Layout::far) std::memset(memory_, poison, bytes_);
  }
  Array(const Array&) = delete;
  ~Array() {
    if (shape_.layout == Layout::far)
      munmap(memory_, bytes_);
    else
      std::free(memory_);
  }

  const Operand& operand() const { return operand_; }
  S& at(int64_t e, int64_t r, int64_t c) { return static_cast<S*>(operand_.data)[index(e, r, c)]; }
  Real value(int64_t e, int64_t r, int64_t c) { return widen(at(e, r, c)); }
  void set(int64_t e, int64_t r, int64_t c, double x) {
    at(e, r, c) = narrow<S>(static_cast<Arithmetic<S>>(x));
  }
  std::vector<Real> row(int64_t e, int64_t r) {
    std::vector<Real> x;
    for (int64_t c = 0; c < shape_.classes; ++c) x.push_back(value(e, r, c));
    return x;
  }
  void erase() {
    if (shape_.layout != Layout::far) std::memset(memory_, poison, bytes_);
  }
  std::vector<unsigned char> contents() const {
    const auto* p = static_cast<const unsigned char*>(memory_);
    return {p, p + bytes_};
  }
  void restore(const std::vector<unsigned char>& bytes) {
    std::copy(bytes.begin(), bytes.end(), static_cast<unsigned char*>(memory_));
  }
  bool surroundings_untouched() {
    if (shape_.layout == Layout::far) return true;
    std::vector<bool> own(bytes_ / sizeof(S), false);
    for_each([&](int64_t e, int64_t r, int64_t c) { own[offset_ + index(e, r, c)] = true; });
    for (size_t i = 0; i < own.size() * sizeof(S); ++i)
      if (!own[i / sizeof(S)] && static_cast<unsigned char*>(memory_)[i] != poison) return false;
    return true;
  }
  std::vector<unsigned char> snapshot() {
    std::vector<unsigned char> bytes;
    for_each([&](int64_t e, int64_t r, int64_t c) {
      const auto* p = reinterpret_cast<const unsigned char*>(&at(e, r, c));
      bytes.insert(bytes.end(), p, p + sizeof(S));
    });
    return bytes;
  }

  template <typename F>
  void for_each(F&& f) const {
    for (int64_t e = 0; e < shape_.members; ++e)
      for (int64_t r = 0; r < shape_.rows; ++r)
        for (int64_t c = 0; c < shape_.classes; ++c) f(e, r, c);
  }

 private:
  static constexpr unsigned char poison = 0xa5;
  static constexpr int64_t far_stride = (int64_t{1} << 31) + 64;

  int64_t index(int64_t e, int64_t r, int64_t c) const {
    const int64_t inner = shape_.inner_rows();
    return e * operand_.member_stride + r / inner * operand_.outer_stride + r % inner * operand_.row_stride +
           c * operand_.class_stride;
  }
  static void* far_memory(size_t bytes) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }

  Shape shape_;
  int offset_;
  Operand operand_;
  size_t bytes_ = 0;
  void* memory_ = nullptr;
};

// ---- a problem and what it should give

enum class Reduction { none, mean, sum };

struct Options {
  Label label = Label::int64;
  double smoothing = 0;
  Reduction reduction = Reduction::mean;
  bool by_weights = false;
  Division division = Division::estimated;
  bool shared_target = false;
  bool table = false;
  bool class_order = false;
  bool step_tensor = false;
  int waveform = 0;
  int ignore_every = 0;   // of so many rows one is ignored, on average
  int invalid_every = 0;  // and one has a label that is no class
  bool extremes = false;  // rows with infinities
};

template <typename S>
struct Problem {
  using T = Arithmetic<S>;

  Shape shape;
  Options options;
  int64_t ignore_index;
  Array<S> logits, u, v, out;
  std::vector<int64_t> labels;        // of (members, rows) or (rows,)
  std::vector<unsigned char> target;  // the same in the label type
  std::vector<twin::Oscillation> oscillations;
  std::vector<Clock> clocks;
  std::vector<int64_t> order, steps;
  std::vector<double> table;
  int64_t table_rows = 3, step = 1234;
  std::vector<std::vector<Real>> gamma;  // per member
  std::vector<twin::Row> rows;           // computed when first asked for

  Problem(const Shape& shape, const Options& options)
      : shape(shape),
        options(options),
        ignore_index(options.label == Label::uint8 ? 255 : -100),
        logits(shape, shape.offset),
        u(shape, shape.offset),
        v(shape, shape.out_offset),
        out(shape, shape.out_offset) {
    make_oscillations();
    make_labels();
    make_logits();
  }

  int64_t label(int64_t e, int64_t r) const {
    return labels[(options.shared_target ? 0 : e * shape.rows) + r];
  }
  bool ignored(int64_t e, int64_t r) const { return label(e, r) == ignore_index; }
  bool valid(int64_t e, int64_t r) const { return label(e, r) >= 0 && label(e, r) < shape.classes; }

  const twin::Row& row(int64_t e, int64_t r) {
    if (rows.empty()) rows.resize(shape.members * shape.rows);
    twin::Row& x = rows[e * shape.rows + r];
    if (x.p.empty()) x = twin::row(logits.row(e, r), gamma[e], label(e, r), options.smoothing);
    return x;
  }

  Real normalizer(int64_t e) const {
    if (options.reduction != Reduction::mean) return 1;
    Real sum = 0;
    for (int64_t r = 0; r < shape.rows; ++r) {
      if (ignored(e, r)) continue;
      sum += !options.by_weights ? 1 : valid(e, r) ? gamma[e][label(e, r)] : 0;
    }
    return sum;
  }

  template <typename P>
  void describe(P& p) {
    p.storage = storage_v<S>;
    p.label = options.label;
    p.members = shape.members;
    p.rows = shape.rows;
    p.inner_rows = shape.inner_rows();
    p.classes = shape.classes;
    p.logits = logits.operand();
    p.target = target.data();
    p.target_member_stride = options.shared_target ? 0 : shape.rows;
    p.ignore_index = ignore_index;
    p.label_smoothing = options.smoothing;
  }

 private:
  void make_oscillations() {
    if (options.class_order) {
      for (int64_t c = 0; c < shape.classes; ++c) order.push_back(c);
      std::shuffle(order.begin(), order.end(), random_bits);
    }
    for (int64_t e = 0; e < shape.members; ++e) {
      const double amplitude = uniform(1, 70), period = static_cast<double>(integer(8, 800)) / 8;
      clocks.push_back({amplitude, period, period, 0, INFINITY, static_cast<double>(options.waveform)});
      twin::Oscillation o{amplitude, period, period, 0, INFINITY, options.waveform, order, {}};
      for (int64_t s = 0; options.table && s < table_rows; ++s) {
        o.table.emplace_back();
        for (int64_t c = 0; c < shape.classes; ++c) {
          table.push_back(c % 7 == 3 ? 0 : uniform(0, 3));
          o.table.back().push_back(table.back());
        }
      }
      steps.push_back(options.step_tensor ? integer(0, 5000) : 0);
      gamma.push_back(shape.classes > 0 ? twin::weights(o, shape.classes, step + steps[e])
                                        : std::vector<Real>());
      oscillations.push_back(o);
    }
  }

  void make_labels() {
    const int64_t count = options.shared_target ? shape.rows : shape.members * shape.rows;
    const size_t size = options.label == Label::int64 ? 8 : options.label == Label::int32 ? 4 : 1;
    target.resize(count * size);
    const int64_t most =
        options.label == Label::uint8 ? std::min<int64_t>(shape.classes, 255) : shape.classes;
    for (int64_t i = 0; i < count; ++i) {
      int64_t label = most > 0 ? integer(0, most - 1) : 0;
      if (i % 3 == 0 && most > 0) label = most - 1;
      if (options.ignore_every != 0 && integer(1, options.ignore_every) == 1) label = ignore_index;
      if (options.invalid_every != 0 && integer(1, options.invalid_every) == 1)
        label = options.label == Label::uint8 ? std::min<int64_t>(shape.classes, 254)
                : i % 2 == 0                  ? shape.classes
                                              : -7 - (options.label == Label::int64 ? int64_t{1} << 40 : 0);
      labels.push_back(label);
      std::memcpy(target.data() + i * size, &label, size);  // little-endian
    }
  }

  void make_logits() {
    logits.for_each([&](int64_t e, int64_t r, int64_t c) {
      logits.set(e, r, c, uniform(-6, 6));
      u.set(e, r, c, uniform(-2, 2));
      v.set(e, r, c, uniform(-2, 2));
      if (!ignored(e, r)) return;
      // An ignored row may hold anything.
      for (Array<S>* x : {&logits, &u, &v}) x->set(e, r, c, c % 2 == 0 ? NAN : INFINITY);
    });
    if (!options.extremes) return;
    for (int64_t r = 0; r < shape.rows; ++r)
      for (int64_t c = 0; c < shape.classes; ++c) {
        if (r % 5 == 1) logits.set(0, r, c, -INFINITY);                           // NaN
        if (r % 5 == 2 && c == shape.classes / 2) logits.set(0, r, c, INFINITY);  // NaN
        if (r % 5 == 3 && c == label(0, r)) logits.set(0, r, c, -INFINITY);       // loss +inf
        if (r % 5 == 4 && c == shape.classes - 1) logits.set(0, r, c, NAN);       // NaN
        if (r % 5 == 0 && c % 3 == 1 && c != label(0, r)) logits.set(0, r, c, -INFINITY);
      }
  }
};

bool close(Real x, Real expected, Real tolerance) {
  if (std::isnan(expected)) return std::isnan(x);
  return x == expected || std::fabs(x - expected) <= tolerance;
}

template <typename S>
std::string describe(const Shape& s, const Options& o, const char* what) {
  const char* names[] = {"float32", "float64", "float16", "bfloat16"};
  return std::string(what) + " " + names[static_cast<int>(storage_v<S>)] + " (" + std::to_string(s.members) +
         ", " + std::to_string(s.rows) + ", " + std::to_string(s.classes) + ") inner " +
         std::to_string(s.inner) + " layout " + std::to_string(static_cast<int>(s.layout)) + " offsets " +
         std::to_string(s.offset) + ", " + std::to_string(s.out_offset) + " smoothing " +
         std::to_string(o.smoothing) + " reduction " + std::to_string(static_cast<int>(o.reduction)) +
         " label " + std::to_string(static_cast<int>(o.label)) + " seed " +
         std::to_string(emulator::settings().seed);
}

// Compares `out` with a derivative of the given order; `scale` is what a row's is multiplied by.
template <typename S, typename F>
void compare_derivative(Problem<S>& problem, int order, F&& scale) {
  const Shape& shape = problem.shape;
  for (int64_t e = 0; e < shape.members; ++e)
    for (int64_t r = 0; r < shape.rows; ++r) {
      if (problem.ignored(e, r) || !problem.valid(e, r)) {
        const Real expected = problem.ignored(e, r) ? 0 : NAN;
        for (int64_t c = 0; c < shape.classes; ++c) CHECK(close(problem.out.value(e, r, c), expected, 0));
        continue;
      }
      const twin::Row& row = problem.row(e, r);
      const auto expected = twin::derivative(row, order, problem.u.row(e, r), problem.v.row(e, r));
      const Real by = scale(e, r);
      for (int64_t c = 0; c < shape.classes; ++c) {
        const Real magnitude = std::fabs(by) * (row.total * row.p[c] * (order == 1 ? 1 : 16) + row.q[c]);
        const Real tolerance = 64 * arithmetic_precision<S> * magnitude +
                               1.01L * precision<S> * std::fabs(by * expected[c]) + smallest<S>;
        if (!CHECK(
                close(problem.out.value(e, r, c), by * expected[c], std::isnan(tolerance) ? 0 : tolerance)))
          std::printf("    order %d, row %ld, class %ld: %Lg, expected %Lg\n", order, static_cast<long>(r),
                      static_cast<long>(c), problem.out.value(e, r, c), by * expected[c]);
      }
    }
}

// ---- the forward kernels

template <typename S>
struct ForwardRun {
  using T = Arithmetic<S>;

  Problem<S>& problem;
  Forward p;
  std::vector<T> loss;
  std::vector<S> row_loss;
  std::vector<double> weights, normalizer, partials, counts;
  std::vector<unsigned> arrivals;

  ForwardRun(Problem<S>& problem, bool with_gradient) : problem(problem) {
    const Shape& shape = problem.shape;
    const Options& options = problem.options;
    problem.describe(p);
    if (with_gradient) p.out = problem.out.operand();
    p.clock = problem.clocks.data();
    p.class_order = options.class_order ? problem.order.data() : nullptr;
    p.table = options.table ? problem.table.data() : nullptr;
    p.table_rows = problem.table_rows;
    p.step = problem.step;
    p.step_tensor = options.step_tensor ? problem.steps.data() : nullptr;
    p.step_member_stride = 1;
    p.mean = options.reduction == Reduction::mean;
    p.by_weights = options.by_weights;
    p.division = options.division;
    loss.resize(shape.members);
    row_loss.resize(shape.members * shape.rows);
    weights.resize(shape.members * shape.classes);
    normalizer.resize(shape.members * 2);
    const bool reduced = options.reduction != Reduction::none;
    p.loss = reduced ? loss.data() : nullptr;
    p.row_loss = reduced ? nullptr : row_loss.data();
    p.weights = weights.data();
    p.normalizer = normalizer.data();
    p.partials = nullptr;
    p.arrivals = nullptr;
    p.counts = nullptr;
    ForwardPlan plan;
    CHECK(plan_forward(p, &plan) == cudaSuccess);
    if (reduced && plan.blocks > 1) {
      partials.resize(shape.members * plan.blocks * 2);
      arrivals.resize(shape.members, 0);
      p.partials = partials.data();
      p.arrivals = arrivals.data();
    }
    counts.resize(shape.members * plan.count_blocks);
    p.counts = counts.data();
  }

  // Everything written, as bytes.
  std::vector<unsigned char> launch() {
    problem.out.erase();
    std::fill(loss.begin(), loss.end(), T(-777));
    std::fill(row_loss.begin(), row_loss.end(), narrow<S>(-777));
    std::fill(weights.begin(), weights.end(), -777.0);
    std::fill(normalizer.begin(), normalizer.end(), -777.0);
    std::fill(partials.begin(), partials.end(), NAN);
    std::fill(counts.begin(), counts.end(), NAN);
    CHECK(launch_forward(p, nullptr) == cudaSuccess);
    for (const unsigned x : arrivals) CHECK(x == 0);
    CHECK(problem.out.surroundings_untouched());
    std::vector<unsigned char> bytes = problem.out.snapshot();
    const auto append = [&](const auto& x) {
      const auto* begin = reinterpret_cast<const unsigned char*>(x.data());
      bytes.insert(bytes.end(), begin, begin + x.size() * sizeof(x[0]));
    };
    append(loss), append(row_loss), append(weights), append(normalizer);
    return bytes;
  }

  void compare() {
    const Shape& shape = problem.shape;
    const bool reduced = p.loss != nullptr;
    for (int64_t e = 0; e < shape.members; ++e) {
      for (int64_t c = 0; c < shape.classes; ++c)
        CHECK(close(weights[e * shape.classes + c], problem.gamma[e][c], 1e-13L * (1 + problem.gamma[e][c])));
      const Real expected_normalizer = problem.normalizer(e);
      CHECK(close(normalizer[2 * e], expected_normalizer, 1e-13L * expected_normalizer));
      const double divisor = normalizer[2 * e + 1];
      // Without a gradient nothing has been divided by it.
      const bool postponed = p.division == Division::postponed, estimated = p.division == Division::estimated;
      CHECK(p.out.data == nullptr || divisor == (!p.mean || postponed ? 1 : normalizer[2 * e]) ||
            (estimated && divisor == static_cast<double>(shape.rows)));
      Real sum = 0, tolerance = 0;
      for (int64_t r = 0; r < shape.rows; ++r) {
        Real expected = problem.ignored(e, r) ? 0 : NAN, size = 0;
        if (problem.valid(e, r) && !problem.ignored(e, r)) {
          const twin::Row& row = problem.row(e, r);
          expected = row.loss;
          size = row.size;
        }
        const Real row_tolerance = 64 * arithmetic_precision<S> * size;
        if (!reduced)
          CHECK(close(widen(row_loss[e * shape.rows + r]), expected,
                      row_tolerance + 1.01L * precision<S> * std::fabs(expected) + smallest<S>));
        sum += expected;
        tolerance += row_tolerance;
      }
      if (reduced) CHECK(close(loss[e], sum / expected_normalizer, tolerance / expected_normalizer + 1e-30L));
    }
    if (p.out.data != nullptr)
      compare_derivative(problem, 1, [&](int64_t e, int64_t) { return 1 / Real(normalizer[2 * e + 1]); });
  }
};

// With the gradient in the place of the logits, gradient and losses have the same bits.
template <typename S>
void test_into_logits(Problem<S>& problem, ForwardRun<S>& run) {
  if (problem.shape.layout == Layout::far || problem.shape.offset != problem.shape.out_offset) return;
  const auto expected = problem.out.snapshot();
  const auto logits = problem.logits.contents();
  const auto bytes = [](const auto& x) {
    const auto* begin = reinterpret_cast<const unsigned char*>(x.data());
    return std::vector<unsigned char>(begin, begin + x.size() * sizeof(x[0]));
  };
  const auto loss = bytes(run.loss), row_loss = bytes(run.row_loss);
  run.p.out = problem.logits.operand();
  emulator::settings().seed = random_bits();
  CHECK(launch_forward(run.p, nullptr) == cudaSuccess);
  CHECK(problem.logits.surroundings_untouched());
  CHECK(problem.logits.snapshot() == expected);
  CHECK(bytes(run.loss) == loss);
  CHECK(bytes(run.row_loss) == row_loss);
  problem.logits.restore(logits);
}

template <typename S>
void test_forward(Problem<S>& problem, bool with_gradient) {
  context = describe<S>(problem.shape, problem.options, with_gradient ? "loss and gradient" : "loss");
  ForwardRun<S> run(problem, with_gradient);
  emulator::settings().seed = random_bits();
  const auto first = run.launch();
  run.compare();
  // Again, in another order, on the counters that the first launch has left behind: the same bits.
  emulator::settings().seed = random_bits();
  context += ", second launch with seed " + std::to_string(emulator::settings().seed);
  CHECK(run.launch() == first);
  if (!with_gradient) return;
  test_into_logits(problem, run);

  std::vector<float> grad_output;
  for (int64_t e = 0; e < problem.shape.members; ++e)
    grad_output.push_back(static_cast<float>(run.normalizer[2 * e] / run.normalizer[2 * e + 1]) *
                          (e % 2 + 1.0f));
  const Shape& shape = problem.shape;
  if (shape.layout != Layout::rows || shape.rows * shape.classes == 0) return;
  Rescale rescale{storage_v<S>,
                  problem.out.operand().data,
                  shape.members,
                  shape.rows * shape.classes,
                  problem.out.operand().member_stride,
                  grad_output.data(),
                  Storage::float32,
                  1,
                  run.normalizer.data()};
  const bool once_rounded = std::is_same_v<S, float> || std::is_same_v<S, double>;
  CHECK(launch_rescale(rescale, nullptr) == cudaSuccess);
  CHECK(problem.out.surroundings_untouched());
  if (!once_rounded) return;  // a second rounding, which the tolerances do not know
  compare_derivative(problem, 1,
                     [&](int64_t e, int64_t) { return Real(grad_output[e]) / run.normalizer[2 * e]; });
}

// ---- the derivatives

template <typename S>
void test_derivative(Problem<S>& problem, int order, bool per_row) {
  context = describe<S>(problem.shape, problem.options, "derivative") + ", order " + std::to_string(order);
  const Shape& shape = problem.shape;
  std::vector<double> weights, normalizer, grad;
  for (int64_t e = 0; e < shape.members; ++e) {
    for (const Real x : problem.gamma[e]) weights.push_back(static_cast<double>(x));
    normalizer.push_back(uniform(1, 5));
    normalizer.push_back(NAN);
  }
  std::vector<S> grad_output;
  for (int64_t i = 0; i < shape.members * (per_row ? shape.rows : 1); ++i)
    grad_output.push_back(narrow<S>(static_cast<Arithmetic<S>>(uniform(-2, 2))));
  Derivative p;
  problem.describe(p);
  p.out = problem.out.operand();
  p.order = order;
  p.u = problem.u.operand();
  p.v = problem.v.operand();
  p.weights = weights.data();
  p.normalizer = normalizer.data();
  p.grad_output = grad_output.data();
  p.grad_storage = storage_v<S>;
  p.grad_member_stride = per_row ? shape.rows : 1;
  p.grad_row_stride = per_row ? 1 : 0;
  emulator::settings().seed = random_bits();
  problem.out.erase();
  CHECK(launch_derivative(p, nullptr) == cudaSuccess);
  CHECK(problem.out.surroundings_untouched());
  compare_derivative(problem, order, [&](int64_t e, int64_t r) {
    return Real(widen(grad_output[e * p.grad_member_stride + r * p.grad_row_stride])) / normalizer[2 * e];
  });
}

template <typename S>
void test_all(const Shape& shape, const Options& options) {
  Problem<S> problem(shape, options);
  test_forward(problem, false);
  test_forward(problem, true);
  for (int order = 1; order <= 3; ++order)
    test_derivative(problem, order, options.reduction == Reduction::none);
}

// ---- what is tested

Options varied(int i) {
  Options o;
  o.label = static_cast<Label>(i % 3);
  o.smoothing = i % 4 == 1 ? 0.1 : 0;
  o.reduction = static_cast<Reduction>(std::array{1, 1, 2, 0}[i % 4]);
  o.division = static_cast<Division>(i / 2 % 3);
  o.by_weights = i % 5 == 2;
  o.table = i % 7 == 3;
  o.class_order = i % 2 == 1;
  o.step_tensor = i % 3 == 1;
  o.waveform = i % 3;
  o.ignore_every = i % 3 == 0 ? 0 : 4;
  return o;
}

template <typename S>
void test_sizes() {
  int i = static_cast<int>(storage_v<S>);
  for (const int64_t classes : {1, 2, 3, 10, 31, 32, 33, 200, 400, 1000, 1025})
    for (const int64_t rows : {0, 1, 31, 1025}) {
      // Half types share all but the conversions with float32.
      if (sizeof(S) == 2 && (rows <= 1 || (rows == 1025 && classes > 10))) continue;
      if (rows == 1025 && classes > 200 && (classes != 1000 || !std::is_same_v<S, float>)) continue;
      ++i;
      // uint8 labels end at 255.
      Options options = varied(i);
      if (classes > 250 && options.label == Label::uint8) options.label = Label::int32;
      test_all<S>({1, rows, classes}, options);
    }
  // Longer than shared memory, with and without room for the row.
  for (const int64_t classes : {3000, 40000}) test_all<S>({1, 3, classes}, varied(1));
}

template <typename S>
void test_layouts() {
  int i = 0;
  for (const int64_t classes : {2, 5, 10, 32, 33, 129, 1001, 1021, 1100})
    for (const int offset : {1, 3})
      for (const int out_offset : {0, offset, 2}) {
        Shape shape{1, classes < 1000 ? 37 : 7, classes, 0, Layout::rows, offset, out_offset};
        test_all<S>(shape, varied(++i * 4));  // label types and normalizations, no smoothing
        shape.layout = Layout::padded;
        if (classes < 1000) test_all<S>(shape, varied(++i));
      }
  for (const int64_t classes : {1, 3, 10, 32}) {
    test_all<S>({1, 300, classes, 60, Layout::planes}, varied(++i));
    test_all<S>({1, 2100, classes, 700, Layout::planes, 1}, varied(++i * 4));
    test_all<S>({1, 300, classes, 100, Layout::rows}, varied(++i));
  }
  test_all<S>({1, 60, 40, 20, Layout::padded}, varied(++i));
}

template <typename S>
void test_ensembles() {
  int i = 0;
  for (const int64_t classes : {3, 10, 40})
    for (const int64_t rows : {1, 70, 3000}) {
      if (rows == 3000 && classes == 40) continue;
      Options options = varied(++i);
      options.step_tensor = true;
      options.shared_target = i % 2 == 0;
      test_all<S>({3, rows, classes}, options);
      test_all<S>({2, rows, classes, 0, Layout::padded, 1}, options);
    }
  test_all<S>({0, 5, 3}, varied(0));
  test_all<S>({3, 4, 1100}, varied(1));
}

template <typename S>
void test_labels_and_extremes() {
  for (const int64_t classes : {1, 3, 10, 17, 50, 1000, 1100})
    for (int i = 0; i < 4; ++i) {
      Options options;
      options.label = static_cast<Label>(classes < 250 ? i % 3 : i % 2);
      options.reduction = static_cast<Reduction>(i % 3);
      options.by_weights = i == 3;
      options.ignore_every = 5;
      options.invalid_every = 4;
      if (classes < 300) test_all<S>({2, 600, classes}, options);
      test_all<S>({1, 9, classes}, options);
      options.ignore_every = 1;  // all ignored
      options.invalid_every = 0;
      test_all<S>({1, 40, classes}, options);
      if (classes < 300) test_all<S>({1, 1100, classes}, options);
      options.ignore_every = 0;
      options.extremes = true;
      options.reduction = Reduction::none;
      test_all<S>({1, 20, classes}, options);
    }
}

void test_far_rows() {
  for (const int64_t classes : {5, 40, 1100}) {
    test_all<float>({1, 3, classes, 0, Layout::far}, varied(0));
    test_all<__half>({1, 3, classes, 0, Layout::far}, varied(2));
  }
}

// More blocks than the emulated device holds at once, each with several tiles of several rows per thread.
void test_large() {
  Options options = varied(0);
  options.ignore_every = 9;
  test_all<float>({1, 70000, 3}, options);
  options.by_weights = true;
  test_all<float>({1, 40000, 2, 0, Layout::rows, 1, 3}, options);
  options.division = Division::exact;
  test_all<float>({2, 20000, 3}, options);
  test_all<__half>({1, 20000, 4}, options);
}

// One block where it takes all rows at once, else as many as the device has room for; labels are counted
// first where that is asked for or costs little.
void test_plans() {
  context = "plans";
  const emulator::Settings before = emulator::settings();
  emulator::settings().multiprocessors = 132;
  emulator::settings().max_block_memory = 227 * 1024;
  const auto plan = [](int64_t rows, int64_t classes, bool reduced, Division division) {
    static float some;
    Forward p{};
    p.storage = Storage::float32;
    p.members = 1;
    p.rows = p.inner_rows = rows;
    p.classes = classes;
    p.logits = p.out = {&some, 0, 0, classes, 1};
    p.mean = reduced;
    p.division = division;
    p.loss = reduced ? &some : nullptr;
    ForwardPlan result{};
    CHECK(plan_forward(p, &result) == cudaSuccess);
    return result;
  };
  for (const auto& [rows, classes, blocks] : std::vector<std::array<int64_t, 3>>{{300, 3, 1},
                                                                                 {512, 10, 1},
                                                                                 {513, 10, 5},
                                                                                 {8, 100, 1},
                                                                                 {9, 100, 3},
                                                                                 {128, 100, 32},
                                                                                 {1, 2000, 1},
                                                                                 {2, 2000, 2}}) {
    CHECK(plan(rows, classes, true, Division::estimated).blocks == blocks);
    CHECK(plan(rows, classes, true, Division::exact).count_blocks == (blocks == 1 ? 0 : 1));
  }
  CHECK(plan(300, 3, false, Division::exact).blocks == 3);
  CHECK(plan(128, 100, false, Division::exact).count_blocks == 0);
  CHECK(plan(1 << 18, 10, true, Division::estimated).count_blocks == 0);
  CHECK(plan(1 << 19, 10, true, Division::estimated).count_blocks == 128);
  CHECK(plan(1 << 19, 10, true, Division::postponed).count_blocks == 0);
  CHECK(plan(1 << 24, 10, true, Division::exact).count_blocks == 256);
  emulator::settings() = before;
}

void test_weights_kernel() {
  for (const int waveform : {0, 1, 2}) {
    context = "oscillation_weights";
    Options options;
    options.waveform = waveform;
    options.class_order = waveform == 1;
    options.table = waveform == 2;
    Problem<float> problem({3, 1, 7}, options);
    std::vector<int64_t> steps;
    for (int i = 0; i < 100; ++i) steps.push_back(integer(0, 10000));
    std::vector<double> out(steps.size() * 3 * 7, -777);
    Weights p{steps.data(),
              100,
              3,
              7,
              problem.clocks.data(),
              options.class_order ? problem.order.data() : nullptr,
              options.table ? problem.table.data() : nullptr,
              problem.table_rows,
              out.data()};
    CHECK(launch_weights(p, nullptr) == cudaSuccess);
    for (int64_t s = 0; s < 100; ++s)
      for (int64_t e = 0; e < 3; ++e) {
        const auto expected = twin::weights(problem.oscillations[e], 7, steps[s]);
        for (int64_t c = 0; c < 7; ++c)
          CHECK(close(out[(s * 3 + e) * 7 + c], expected[c], 1e-13L * (1 + expected[c])));
      }
  }
}

// A factor of exactly 1 must not touch the gradient.
void test_rescale_by_one() {
  context = "rescale by 1";
  std::vector<float> gradient(100, 3.0f);
  const float grad_output = 0.25f;
  const double normalizer[2] = {8, 32}, other[2] = {8, 8};
  Rescale p{Storage::float32, gradient.data(), 1, 100, 0, &grad_output, Storage::float32, 0, normalizer};
  CHECK(launch_rescale(p, nullptr) == cudaSuccess);
  for (const float x : gradient) CHECK(x == 3.0f);
  p.normalizer = other;
  CHECK(launch_rescale(p, nullptr) == cudaSuccess);
  for (const float x : gradient) CHECK(x == 0.75f);
}

void test_half_conversions() {
  for (int bits = 0; bits < 65536; ++bits) {
    context = "half " + std::to_string(bits);
    const __half x{static_cast<uint16_t>(bits)};
    const float value = __half2float(x);
    if (std::isnan(value)) continue;
    CHECK(__float2half_rn(value).bits == bits);
    const float next = __half2float({static_cast<uint16_t>(bits + 1)});
    if ((bits & 0x7fff) >= 0x7bff) continue;
    const float middle = (value + next) / 2;  // ties go to the even one
    CHECK(__float2half_rn(middle).bits == bits + bits % 2);
    CHECK(__float2half_rn(std::nextafter(middle, next)).bits == bits + 1);
    CHECK(__float2half_rn(std::nextafter(middle, value)).bits == bits);
  }
}

template <typename S>
void test_storage() {
  test_sizes<S>();
  if (!std::is_same_v<S, __nv_bfloat16>) test_layouts<S>();
  if (sizeof(S) == 2) return;
  test_ensembles<S>();
  test_labels_and_extremes<S>();
}

}  // namespace

// Without an argument everything; else one element type, "other", or "faults": enough to find planted ones.
int main(int argc, char** argv) {
  const std::string part = argc > 1 ? argv[1] : "";
  if (part == "faults") {
    stop_at_first = true;
    test_ensembles<float>();
    test_all<float>({1, 20000, 3, 0, Layout::rows, 1, 2}, varied(0));
    test_all<float>({1, 60, 1100}, varied(1));
    for (const int64_t classes : {1, 3, 10, 17, 40, 1000, 1100})
      for (int i = 0; i < 4; ++i) test_all<float>({1, classes < 1000 ? 1100 : 9, classes}, varied(i));
  }
  if (part.empty() || part == "float32") test_storage<float>();
  if (part.empty() || part == "float64") test_storage<double>();
  if (part.empty() || part == "float16") test_storage<__half>();
  if (part.empty() || part == "bfloat16") test_storage<__nv_bfloat16>();
  if (part.empty() || part == "other") {
    test_half_conversions();
    test_plans();
    test_weights_kernel();
    test_rescale_by_one();
    test_far_rows();
    test_large();
  }
  return finish(("kernels " + part).c_str());
}
