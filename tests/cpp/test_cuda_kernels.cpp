// The CUDA kernels under the emulator, against long double: every regime, element type and memory layout.
#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "kernel_problems.h"

namespace problems {

template <typename Run>
void carry_out(Run& run) {
  CHECK(run.start() == cudaSuccess);
}

namespace {

template <typename S>
void test_sizes() {
  int i = static_cast<int>(storage_v<S>);
  for (const int64_t classes : {1, 2, 3, 10, 31, 32, 33, 200, 400, 1000, 1025, 2049})
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
  // Longer than registers hold and than shared memory does; several rows for each place of a block.
  for (const int64_t classes : {3000, 12000, 40000}) test_all<S>({1, 3, classes}, varied(1));
  test_all<S>({1, 40, 3000}, varied(2));
}

template <typename S>
void test_layouts() {
  int i = 0;
  for (const int64_t classes : {2, 5, 10, 32, 33, 129, 1001, 1021, 1100, 2101})
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
  for (const int64_t classes : {1, 3, 10, 17, 50, 1000, 1100, 2100})
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

// Normalization by weights where the label of a member's only row has a weight of 0, as the last class has
// here.
template <typename S>
void test_weights_that_add_up_to_zero() {
  for (const int64_t classes : {4, 32, 200, 1103})
    for (const Division division : {Division::exact, Division::estimated, Division::postponed}) {
      Options options;
      options.table = options.by_weights = true;
      options.division = division;
      test_all<S>({2, 1, classes}, options);
    }
}

// The launches before the rows': labels are counted by weights that another one has written.
template <typename S>
void test_weights_of_classes() {
  for (const int64_t classes : {3, 40, 1100, 2100})
    for (const ClassWeight weight : {ClassWeight::shared, ClassWeight::own})
      for (const int i : {1, 2}) {
        Options options = varied(i);
        options.weight = weight;
        options.by_weights = i % 2 == 0;
        options.division = Division::exact;
        options.ignore_every = 4;
        if (classes > 250) options.label = Label::int32;
        test_all<S>({3, classes < 100 ? 700 : 5, classes}, options);
      }
}

void test_far_rows() {
  for (const int64_t classes : {5, 40, 1100, 2100}) {
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

// One block where it takes few rows at a time, else as many as the device has room for; labels are counted
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
                                                                                 {513, 10, 3},
                                                                                 {64, 100, 1},
                                                                                 {65, 100, 3},
                                                                                 {128, 100, 4},
                                                                                 {8, 2000, 1},
                                                                                 {9, 2000, 3},
                                                                                 {1, 5000, 1},
                                                                                 {2, 5000, 2}}) {
    context = "plan of (" + std::to_string(rows) + ", " + std::to_string(classes) +
              "): " + std::to_string(plan(rows, classes, true, Division::estimated).blocks) + " blocks";
    CHECK(plan(rows, classes, true, Division::estimated).blocks == blocks);
    CHECK(plan(rows, classes, true, Division::exact).count_blocks == (blocks == 1 ? 0 : 1));
  }
  CHECK(plan(300, 3, false, Division::exact).blocks == 2);
  CHECK(plan(128, 100, false, Division::exact).count_blocks == 0);
  CHECK(plan(1 << 18, 10, true, Division::estimated).count_blocks == 0);
  CHECK(plan(1 << 19, 10, true, Division::estimated).count_blocks == 512);
  CHECK(plan(1 << 19, 10, true, Division::postponed).count_blocks == 0);
  CHECK(plan(1 << 24, 10, true, Division::exact).count_blocks == 1024);
  // No more blocks than are resident: kernels for another architecture are bounded to one less to a
  // multiprocessor.
  for (const auto& [capability, warps, held] : {std::array{90, 3, 2}, std::array{80, 2, 1}}) {
    context = "resident blocks of " + std::to_string(capability);
    emulator::settings().capability = capability;
    CHECK(plan(1 << 24, 10, true, Division::exact).blocks == warps * 132);
    CHECK(plan(1 << 16, 5000, true, Division::exact).blocks == held * 132);
  }
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
    WeightsRun run(problem, 100);
    carry_out(run);
    run.compare();
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

template <typename T>
T one_of(std::initializer_list<T> x) {
  return x.begin()[integer(0, static_cast<int64_t>(x.size()) - 1)];
}

// Anything: sizes around the borders between kernels more often, operands each in a layout of its own.
template <typename S>
void test_random() {
  Shape shape{};
  shape.members = one_of<int64_t>({1, 1, 2, 3});
  shape.classes = one_of<int64_t>({integer(1, 40), integer(1, 40), integer(1, 600), integer(1, 2300)});
  if (integer(0, 2) == 0) shape.classes = one_of<int64_t>({1, 2, 3, 10, 16, 17, 32, 33, 64, 65, 512, 513});
  if (integer(0, 8) == 0) shape.classes = one_of<int64_t>({1024, 1025, 2048, 2049, 8192, 8200, 16385, 33000});
  const int64_t elements = shape.classes > 8000 ? 4 * shape.classes : 12000;
  shape.rows = integer(0, std::clamp<int64_t>(elements / shape.classes / shape.members, 1, 600));
  if (integer(0, 2) > 0) shape.offset = static_cast<int>(integer(0, 16 / sizeof(S) - 1));
  shape.out_offset = integer(0, 1) == 0 ? shape.offset : static_cast<int>(integer(0, 16 / sizeof(S) - 1));
  const auto layout = [&] {
    const Layout x = one_of({Layout::rows, Layout::rows, Layout::padded, Layout::apart, Layout::interleaved,
                             shape.classes <= 32 ? Layout::planes : Layout::rows});
    return integer(0, 6) > 0 ? x : one_of({Layout::same_members, Layout::same_rows});
  };
  shape.layout = layout();
  shape.direction_layout = layout();
  do shape.out_layout = integer(0, 1) == 0 ? shape.layout : layout();
  while (shape.out_layout == Layout::same_members || shape.out_layout == Layout::same_rows ||
         (shape.layout >= Layout::same_members && shape.out_layout == shape.layout));
  if (shape.members == 1 && shape.rows > 0)
    for (shape.inner = integer(1, shape.rows); shape.rows % shape.inner != 0;) --shape.inner;
  Options options = varied(static_cast<int>(integer(0, 100000)));
  if (shape.classes > 250 && options.label == Label::uint8) options.label = Label::int32;
  options.ignore_every = one_of({0, 0, 2, 5, 1});
  options.invalid_every = one_of({0, 0, 0, 6});
  options.sprinkled = integer(0, 2) == 0;
  options.shared_target = shape.members > 1 && integer(0, 2) == 0;
  emulator::settings().multiprocessors = one_of({1, 2, 3});
  test_all<S>(shape, options);
}

void test_random_problems(int count) {
  for (int i = 0; i < count; ++i) {
    test_random<float>();
    test_random<double>();
    test_random<__half>();
    test_random<__nv_bfloat16>();
  }
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
  test_weights_that_add_up_to_zero<S>();
  test_weights_of_classes<S>();
}

}  // namespace

}  // namespace problems

// Without an argument everything; else one element type, "other", "random" with how many and a seed, or
// "faults": enough to find planted ones.
int main(int argc, char** argv) {
  using namespace problems;
  const std::string part = argc > 1 ? argv[1] : "";
  if (part == "faults") {
    stop_at_first = true;
    test_ensembles<float>();
    test_all<float>({3, 1, 3}, varied(0));  // no member ends at a multiple of 16 bytes, no row is ignored
    Options counted = varied(0);
    counted.division = Division::exact;
    counted.ignore_every = 9;
    test_all<float>({3, 3000, 3}, counted);
    test_all<float>({1, 20000, 3, 0, Layout::rows, 1, 2}, varied(0));
    for (const int64_t classes : {1100, 2100, 10800, 17000}) test_all<float>({1, 60, classes}, varied(1));
    for (const int64_t classes : {1, 3, 10, 17, 40, 1000, 1100, 2100})
      for (int i = 0; i < 4; ++i) test_all<float>({1, classes < 1000 ? 1100 : 9, classes}, varied(i));
    test_weights_of_classes<float>();
  }
  if (part == "random" && argc > 3) {
    random_bits.seed(std::strtoull(argv[3], nullptr, 10));
    test_random_problems(std::atoi(argv[2]));
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
