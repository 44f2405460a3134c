// Problems for the CUDA kernels, and what must come out of them: what the test in the emulator and the one on
// a device (gpu_guard.cu) have in common. A run describes a launch with pointers to host memory; the test
// that includes this says how it is carried out.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "check.h"
#include "cuda/cross_entropy.h"
#include "twin.h"

namespace problems {

using namespace dynloss;
using namespace dynloss::cuda;
using twin::Real;

// Memory on the host that a launch uses.
struct Memory {
  void* begin;
  size_t bytes;
};
template <typename T>
Memory memory_of(std::vector<T>& x) {
  return {x.data(), x.size() * sizeof(T)};
}

// What a launch may do to it.
enum class Access { read, write };

// Defined by each test: calls run.start(), here or, with run.p led to copies of what run.for_memory() tells
// of, on a device.
template <typename Run>
void carry_out(Run& run);

inline std::mt19937_64 random_bits(11);
inline double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(random_bits);
}
inline int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}

// The emulator goes through the threads of a launch in an order of its own.
inline void next_schedule() {
#if !defined(__CUDACC__)
  emulator::settings().seed = random_bits();
#endif
}
inline std::string schedule() {
#if defined(__CUDACC__)
  return "";
#else
  return " seed " + std::to_string(emulator::settings().seed);
#endif
}

// ---- element types

template <typename S>
using Arithmetic = std::conditional_t<std::is_same_v<S, double>, double, float>;

inline Real value_of(float x) { return x; }
inline Real value_of(double x) { return x; }
inline Real value_of(__half x) { return __half2float(x); }
inline Real value_of(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename S>
S stored(double x) {
  if constexpr (std::is_same_v<S, __half>)
    return __float2half_rn(static_cast<float>(x));
  else if constexpr (std::is_same_v<S, __nv_bfloat16>)
    return __float2bfloat16_rn(static_cast<float>(x));
  else
    return static_cast<S>(x);
}

template <typename S>
constexpr Storage storage_v = std::is_same_v<S, float>    ? Storage::float32
                              : std::is_same_v<S, double> ? Storage::float64
                              : std::is_same_v<S, __half> ? Storage::float16
                                                          : Storage::bfloat16;
template <typename S>
constexpr Real precision = std::is_same_v<S, float>    ? 0x1p-24L
                           : std::is_same_v<S, double> ? 0x1p-53L
                           : std::is_same_v<S, __half> ? 0x1p-11L
                                                       : 0x1p-8L;
template <typename S>
constexpr Real arithmetic_precision = std::is_same_v<S, double> ? 0x1p-53L : 0x1p-24L;
template <typename S>
constexpr Real smallest = std::is_same_v<S, __half> ? 0x1p-24L : 0x1p-120L;

// ---- operands in memory

// apart: members with something in between; interleaved: between each other's rows; same_members, same_rows:
// one stands for all.
enum class Layout { rows, padded, planes, far, apart, interleaved, same_members, same_rows };

struct Shape {
  int64_t members, rows, classes;
  int64_t inner = 0;             // rows of an outer dimension; 0: all
  Layout layout = Layout::rows;  // of the logits, and of what has none of its own
  int offset = 0;                // of the logits and directions from a multiple of 16 bytes, in elements
  int out_offset = 0;            // of the result
  std::optional<Layout> direction_layout = {}, out_layout = {};

  int64_t inner_rows() const { return inner == 0 ? rows : inner; }
  Layout of_directions() const { return direction_layout.value_or(layout); }
  Layout of_out() const { return out_layout.value_or(layout); }
};

// What outputs are filled with before a launch: a NaN unlike those that arithmetic gives.
constexpr unsigned char poison = 0xff;

template <typename T>
void fill_with_poison(std::vector<T>& x) {
  auto* bytes = reinterpret_cast<unsigned char*>(x.data());
  std::fill(bytes, bytes + x.size() * sizeof(T), poison);
}

// An operand in an allocation without a byte to spare; what lies between its elements is watched.
template <typename S>
class Array {
 public:
  Array(const Shape& shape, int offset, Layout layout) : shape_(shape), offset_(offset) {
    shape_.layout = layout;
    const int64_t C = shape.classes, inner = shape.inner_rows();
    switch (layout) {
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
      case Layout::apart:
        operand_ = {nullptr, 2 * (shape.rows * C + 5), inner * C, C, 1};
        break;
      case Layout::interleaved:
        operand_ = {nullptr, C, shape.members * inner * C, shape.members * C, 1};
        break;
      case Layout::same_members:
        operand_ = {nullptr, 0, inner * C, C, 1};
        break;
      case Layout::same_rows:
        operand_ = {nullptr, C, 0, 0, 1};
        break;
    }
    int64_t size = 0;
    for_each([&](int64_t e, int64_t r, int64_t c) { size = std::max(size, index(e, r, c) + 1); });
    bytes_ = (offset + size) * sizeof(S);
    // Memory that is never touched costs nothing, but AddressSanitizer would mark all of it.
    memory_ = layout == Layout::far ? far_memory(bytes_) : std::malloc(std::max<size_t>(bytes_, 1));
    operand_.data = static_cast<S*>(memory_) + offset;
    if (layout != Layout::far) std::memset(memory_, poison, bytes_);
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
  Real value(int64_t e, int64_t r, int64_t c) { return value_of(at(e, r, c)); }
  void set(int64_t e, int64_t r, int64_t c, double x) { at(e, r, c) = stored<S>(x); }
  std::vector<Real> row(int64_t e, int64_t r) {
    std::vector<Real> x;
    for (int64_t c = 0; c < shape_.classes; ++c) x.push_back(value(e, r, c));
    return x;
  }
  void erase() {
    if (shape_.layout != Layout::far) std::memset(memory_, poison, bytes_);
  }
  Memory memory() const { return {memory_, bytes_}; }
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
  // No element still has the bits of the poison, which no kernel computes.
  bool written_everywhere() {
    S untouched;
    std::memset(&untouched, poison, sizeof(S));
    bool written = true;
    for_each([&](int64_t e, int64_t r, int64_t c) {
      written &= std::memcmp(&at(e, r, c), &untouched, sizeof(S)) != 0;
    });
    return written;
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
enum class ClassWeight { none, shared, own };  // by the members of an ensemble

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
  ClassWeight weight = ClassWeight::none;
  int waveform = 0;
  int ignore_every = 0;    // of so many rows one is ignored, on average
  int invalid_every = 0;   // and one has a label that is no class
  bool extremes = false;   // rows with infinities
  bool sprinkled = false;  // NaN and infinities anywhere
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
  std::vector<S> weight;                 // (classes,) or (members, classes), if there is any
  std::vector<std::vector<Real>> gamma;  // per member, times weight
  std::vector<twin::Row> rows;           // computed when first asked for

  Problem(const Shape& shape, const Options& options)
      : shape(shape),
        options(options),
        ignore_index(options.label == Label::uint8 ? 255 : -100),
        logits(shape, shape.offset, shape.layout),
        u(shape, shape.offset, shape.of_directions()),
        v(shape, shape.out_offset, shape.of_directions()),
        out(shape, shape.out_offset, shape.of_out()) {
    make_oscillations();
    make_weight();
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

  // Calls f(pointer of the description, where it leads, access).
  template <typename P, typename F>
  void for_memory(P& p, F&& f) {
    const bool in_place = p.out.data == p.logits.data;
    f(p.logits.data, logits.memory(), in_place ? Access::write : Access::read);
    f(p.out.data, in_place ? logits.memory() : out.memory(), Access::write);
    f(p.target, memory_of(target), Access::read);
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

  void make_weight() {
    if (options.weight == ClassWeight::none) return;
    const int64_t rows = options.weight == ClassWeight::own ? shape.members : 1;
    for (int64_t i = 0; i < rows * shape.classes; ++i)
      weight.push_back(stored<S>(i % 5 == 2 ? 0 : uniform(0, 3)));
    for (int64_t e = 0; e < shape.members; ++e)
      for (int64_t c = 0; c < shape.classes; ++c)
        gamma[e][c] *= value_of(weight[(rows > 1 ? e * shape.classes : 0) + c]);
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
      // Of each three rows one is sure, rightly or wrongly.
      const int64_t sure = r % 2 == 0 ? label(e, r) : r % shape.classes;
      logits.set(e, r, c, uniform(-6, 6) + (r % 3 == 2 && c == sure ? uniform(0, 50) : 0));
      u.set(e, r, c, uniform(-2, 2));
      v.set(e, r, c, uniform(-2, 2));
      if (!ignored(e, r)) return;
      // An ignored row may hold anything.
      for (Array<S>* x : {&logits, &u, &v}) x->set(e, r, c, c % 2 == 0 ? NAN : INFINITY);
    });
    if (options.sprinkled)
      logits.for_each([&](int64_t e, int64_t r, int64_t c) {
        const int64_t what = integer(0, 40 * shape.classes);
        if (what < 20) logits.set(e, r, c, what == 0 ? NAN : what == 1 ? INFINITY : -INFINITY);
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

inline bool close(Real x, Real expected, Real tolerance) {
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
         " label " + std::to_string(static_cast<int>(o.label)) + " weight " +
         std::to_string(static_cast<int>(o.weight)) + schedule();
}

// Compares `out` with a derivative of the given order; `scale` is what a row's is multiplied by. Where
// `zeros` are given, one flag per element in the order of for_each, these must be 0, whatever the scale.
template <typename S, typename F>
void compare_derivative(Problem<S>& problem, int order, F&& scale, const std::vector<bool>& zeros = {}) {
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
        if (!zeros.empty() && zeros[(e * shape.rows + r) * shape.classes + c]) {
          CHECK(problem.out.value(e, r, c) == 0);
          continue;
        }
        const Real size = order == 1
                              ? (row.total - row.q[c]) * row.p[c] + row.q[c] * row.others[c] + row.smoothed
                              : 16 * row.total * row.p[c] * row.others[c];
        const Real magnitude = std::fabs(by) * size;
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
    p.weight = options.weight == ClassWeight::none ? nullptr : problem.weight.data();
    p.weight_storage = storage_v<S>;
    p.weight_member_stride = options.weight == ClassWeight::own ? shape.classes : 0;
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

  cudaError_t start() { return launch_forward(p, nullptr); }

  template <typename F>
  void for_memory(F&& f) {
    problem.for_memory(p, f);
    f(p.clock, memory_of(problem.clocks), Access::read);
    f(p.class_order, memory_of(problem.order), Access::read);
    f(p.table, memory_of(problem.table), Access::read);
    f(p.step_tensor, memory_of(problem.steps), Access::read);
    f(p.weight, memory_of(problem.weight), Access::read);
    f(p.row_loss, memory_of(row_loss), Access::write);
    f(p.loss, memory_of(loss), Access::write);
    f(p.weights, memory_of(weights), Access::write);
    f(p.normalizer, memory_of(normalizer), Access::write);
    f(p.partials, memory_of(partials), Access::write);
    f(p.arrivals, memory_of(arrivals), Access::write);
    f(p.counts, memory_of(counts), Access::write);
  }

  // Everything written, as bytes.
  std::vector<unsigned char> launch() {
    problem.out.erase();
    fill_with_poison(loss);
    fill_with_poison(row_loss);
    fill_with_poison(weights);
    fill_with_poison(normalizer);
    fill_with_poison(partials);
    fill_with_poison(counts);
    carry_out(*this);
    for (const unsigned x : arrivals) CHECK(x == 0);
    CHECK(problem.out.surroundings_untouched());
    CHECK(p.out.data == nullptr || problem.out.written_everywhere());
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
          CHECK(close(value_of(row_loss[e * shape.rows + r]), expected,
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
  const Shape& shape = problem.shape;
  if (shape.layout == Layout::far || shape.of_out() != shape.layout || shape.offset != shape.out_offset)
    return;
  const auto expected = problem.out.snapshot();
  const auto logits = problem.logits.contents();
  const auto bytes = [](const auto& x) {
    const auto* begin = reinterpret_cast<const unsigned char*>(x.data());
    return std::vector<unsigned char>(begin, begin + x.size() * sizeof(x[0]));
  };
  const auto loss = bytes(run.loss), row_loss = bytes(run.row_loss);
  run.p.out = problem.logits.operand();
  next_schedule();
  carry_out(run);
  CHECK(problem.logits.surroundings_untouched());
  CHECK(problem.logits.snapshot() == expected);
  CHECK(bytes(run.loss) == loss);
  CHECK(bytes(run.row_loss) == row_loss);
  problem.logits.restore(logits);
}

// The gradient of a contiguous problem times grad_output, per member.
template <typename S>
struct RescaleRun {
  Problem<S>& problem;
  std::vector<float>& grad_output;
  std::vector<double>& normalizer;
  Rescale p;

  RescaleRun(Problem<S>& problem, std::vector<float>& grad_output, std::vector<double>& normalizer)
      : problem(problem), grad_output(grad_output), normalizer(normalizer) {
    const Shape& shape = problem.shape;
    const Operand& out = problem.out.operand();
    p = {storage_v<S>,      out.data,           shape.members,    shape.rows * shape.classes,
         out.member_stride, grad_output.data(), Storage::float32, 1,
         normalizer.data()};
  }
  cudaError_t start() { return launch_rescale(p, nullptr); }

  template <typename F>
  void for_memory(F&& f) {
    f(p.gradient, problem.out.memory(), Access::write);
    f(p.grad_output, memory_of(grad_output), Access::read);
    f(p.normalizer, memory_of(normalizer), Access::read);
  }
};

template <typename S>
void test_forward(Problem<S>& problem, bool with_gradient) {
  context = describe<S>(problem.shape, problem.options, with_gradient ? "loss and gradient" : "loss");
  ForwardRun<S> run(problem, with_gradient);
  next_schedule();
  const auto first = run.launch();
  run.compare();
  // Again, in another order, on the counters that the first launch has left behind: the same bits.
  next_schedule();
  context += ", second launch" + schedule();
  CHECK(run.launch() == first);
  if (!with_gradient) return;
  test_into_logits(problem, run);

  std::vector<float> grad_output;
  for (int64_t e = 0; e < problem.shape.members; ++e)
    grad_output.push_back(static_cast<float>(run.normalizer[2 * e] / run.normalizer[2 * e + 1]) *
                          (e % 2 + 1.0f));
  const Shape& shape = problem.shape;
  if (shape.of_out() != Layout::rows || shape.rows * shape.classes == 0) return;
  // Where the counted weights add up to 0, the factor is NaN. It leaves zeros as they are: those of ignored
  // rows must stay, and those of rows that weigh 0 look the same.
  std::vector<bool> zeros;
  problem.out.for_each([&](int64_t e, int64_t r, int64_t c) {
    zeros.push_back(run.normalizer[2 * e] == 0 && problem.out.value(e, r, c) == 0);
  });
  RescaleRun<S> rescale(problem, grad_output, run.normalizer);
  carry_out(rescale);
  CHECK(problem.out.surroundings_untouched());
  if (sizeof(S) < 4) return;  // a second rounding, which the tolerances do not know
  compare_derivative(
      problem, 1, [&](int64_t e, int64_t) { return Real(grad_output[e]) / run.normalizer[2 * e]; }, zeros);
}

// ---- the derivatives

template <typename S>
struct DerivativeRun {
  Problem<S>& problem;
  Derivative p;
  std::vector<double> weights, normalizer;
  std::vector<S> grad_output;

  DerivativeRun(Problem<S>& problem, int order, bool per_row) : problem(problem) {
    const Shape& shape = problem.shape;
    for (int64_t e = 0; e < shape.members; ++e) {
      for (const Real x : problem.gamma[e]) weights.push_back(static_cast<double>(x));
      normalizer.push_back(uniform(1, 5));
      normalizer.push_back(NAN);
    }
    for (int64_t i = 0; i < shape.members * (per_row ? shape.rows : 1); ++i)
      grad_output.push_back(stored<S>(uniform(-2, 2)));
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
  }
  cudaError_t start() { return launch_derivative(p, nullptr); }

  template <typename F>
  void for_memory(F&& f) {
    problem.for_memory(p, f);
    f(p.u.data, problem.u.memory(), Access::read);
    f(p.v.data, problem.v.memory(), Access::read);
    f(p.weights, memory_of(weights), Access::read);
    f(p.normalizer, memory_of(normalizer), Access::read);
    f(p.grad_output, memory_of(grad_output), Access::read);
  }
};

template <typename S>
void test_derivative(Problem<S>& problem, int order, bool per_row) {
  context = describe<S>(problem.shape, problem.options, "derivative") + ", order " + std::to_string(order);
  DerivativeRun<S> run(problem, order, per_row);
  next_schedule();
  problem.out.erase();
  carry_out(run);
  CHECK(problem.out.surroundings_untouched());
  CHECK(problem.out.written_everywhere());
  compare_derivative(problem, order, [&](int64_t e, int64_t r) {
    const int64_t at = e * run.p.grad_member_stride + r * run.p.grad_row_stride;
    return value_of(run.grad_output[at]) / run.normalizer[2 * e];
  });
}

// Γ at `count` steps.
struct WeightsRun {
  Problem<float>& problem;
  std::vector<int64_t> steps;
  std::vector<double> out;
  Weights p;

  WeightsRun(Problem<float>& problem, int64_t count) : problem(problem) {
    for (int64_t i = 0; i < count; ++i)
      steps.push_back(i % 3 > 0 ? integer(0, 10000) : INT64_MAX - integer(0, int64_t{1} << integer(1, 62)));
    out.resize(count * problem.shape.members * problem.shape.classes);
    fill_with_poison(out);
    p = {steps.data(),
         count,
         problem.shape.members,
         problem.shape.classes,
         problem.clocks.data(),
         problem.options.class_order ? problem.order.data() : nullptr,
         problem.options.table ? problem.table.data() : nullptr,
         problem.table_rows,
         out.data()};
  }
  cudaError_t start() { return launch_weights(p, nullptr); }

  template <typename F>
  void for_memory(F&& f) {
    f(p.steps, memory_of(steps), Access::read);
    f(p.clock, memory_of(problem.clocks), Access::read);
    f(p.class_order, memory_of(problem.order), Access::read);
    f(p.table, memory_of(problem.table), Access::read);
    f(p.out, memory_of(out), Access::write);
  }

  void compare() {
    size_t i = 0;
    for (const int64_t step : steps)
      for (const twin::Oscillation& oscillation : problem.oscillations)
        for (const Real expected : twin::weights(oscillation, problem.shape.classes, step))
          CHECK(close(out[i++], expected, 1e-13L * (1 + expected)));
  }
};

template <typename S>
void test_all(const Shape& shape, const Options& options) {
  Problem<S> problem(shape, options);
  test_forward(problem, false);
  test_forward(problem, true);
  for (int order = 1; order <= 3; ++order)
    test_derivative(problem, order, options.reduction == Reduction::none);
}

// ---- what is tested

inline Options varied(int i) {
  Options o;
  o.label = static_cast<Label>(i % 3);
  o.smoothing = i % 4 == 1 ? 0.1 : 0;
  o.reduction = static_cast<Reduction>(std::array{1, 1, 2, 0}[i % 4]);
  o.division = static_cast<Division>(i / 2 % 3);
  o.by_weights = i % 5 == 2;
  o.table = i % 7 == 3;
  o.class_order = i % 2 == 1;
  o.step_tensor = i % 3 == 1;
  o.weight = static_cast<ClassWeight>(i % 11 == 1 ? 1 : i % 11 == 5 ? 2 : 0);
  o.waveform = i % 3;
  o.ignore_every = i % 3 == 0 ? 0 : 4;
  return o;
}

}  // namespace problems
