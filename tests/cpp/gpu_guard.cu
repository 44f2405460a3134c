// The CUDA kernels on a device, without torch, whose caching allocator would hide an access out of bounds:
// every operand is an allocation of its own, once of exactly its size, for compute-sanitizer, and once
// between zones that no kernel may write to. Values are compared as in the emulator, under which this runs as
// well.
//
//     bash tests/cpp/gpu_guard.sh build OUTPUT sm_90
//     OUTPUT [--seconds S] [--cases N] [--exact] [--stop]
//
// --exact leaves the zones out: under compute-sanitizer they find nothing that it would not. Ends by itself
// after S seconds, N cases, or with --stop at the first failure; the order of the cases is mixed, so that a
// part of them is a sample of all.
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <list>
#include <map>
#include <string>
#include <utility>

#include "kernel_problems.h"

namespace problems {

namespace {

#define CUDA(call) expect_success((call), #call, __LINE__)

// After an error the device answers nothing more: there is no going on.
void expect_success(cudaError_t error, const char* call, int line) {
  if (error == cudaSuccess) return;
  std::printf("gpu_guard.cu:%d: failed: %s: %s\n    %s\n", line, call, cudaGetErrorString(error),
              context.c_str());
  std::exit(1);
}

bool exact_only = false;

// Memory on the device that stands for some on the host.
class Copy {
 public:
  Copy(const Memory& host, Access access, bool guarded)
      : host_(host), access_(access), zone_(guarded ? 16 * 1024 : 0) {
    // A multiple of 16 bytes into the allocation, which is aligned to more.
    CUDA(cudaMalloc(&allocation_, std::max<size_t>(host.bytes + 2 * zone_, 1)));
    const std::vector<unsigned char> zone(zone_, guard);
    CUDA(cudaMemcpy(allocation_, zone.data(), zone_, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(begin(), host.begin, host.bytes, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(begin() + host.bytes, zone.data(), zone_, cudaMemcpyHostToDevice));
  }
  Copy(const Copy&) = delete;
  ~Copy() { CUDA(cudaFree(allocation_)); }

  unsigned char* begin() const { return static_cast<unsigned char*>(allocation_) + zone_; }
  void may_be_written() { access_ = Access::write; }

  // To the host, or if it has the results of another launch already, only compared with those.
  void take_back(bool results_are_there) {
    std::vector<unsigned char> all(host_.bytes + 2 * zone_);
    CUDA(cudaMemcpy(all.data(), allocation_, all.size(), cudaMemcpyDeviceToHost));
    const auto first = all.begin() + zone_, end = first + host_.bytes;
    const auto is_guard = [](unsigned char x) { return x == guard; };
    CHECK(std::all_of(all.begin(), first, is_guard));  // before the operand
    CHECK(std::all_of(end, all.end(), is_guard));      // behind it
    auto* host = static_cast<unsigned char*>(host_.begin);
    if (access_ == Access::read || results_are_there)
      CHECK(std::equal(first, end, host));
    else
      std::copy(first, end, host);
  }

 private:
  static constexpr unsigned char guard = 0x5a;

  Memory host_;
  Access access_;
  size_t zone_;
  void* allocation_ = nullptr;
};

// The copies of all that a launch uses.
class Device {
 public:
  explicit Device(bool guarded) : guarded_(guarded) {}

  template <typename T>
  void place(T*& pointer, const Memory& host, Access access) {
    if (pointer == nullptr) return;
    const auto [at, is_new] = by_host_.try_emplace(host.begin, nullptr);
    if (is_new) at->second = &copies_.emplace_back(host, access, guarded_);
    if (access == Access::write) at->second->may_be_written();
    const auto offset = reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(host.begin);
    pointer = reinterpret_cast<T*>(at->second->begin() + offset);
  }
  void take_back(bool results_are_there = false) {
    for (Copy& copy : copies_) copy.take_back(results_are_there);
  }

 private:
  bool guarded_;
  std::list<Copy> copies_;
  std::map<void*, Copy*> by_host_;
};

template <typename Run>
void launch_on(Device& device, Run& run) {
  const auto on_host = run.p;
  run.for_memory(
      [&](auto& pointer, const Memory& host, Access access) { device.place(pointer, host, access); });
  CHECK(run.start() == cudaSuccess);
  CUDA(cudaGetLastError());
  CUDA(cudaDeviceSynchronize());
  run.p = on_host;
}

}  // namespace

template <typename Run>
void carry_out(Run& run) {
  // What is on the host belongs to both launches: nothing is taken back before the second.
  Device exact(false), guarded(true);
  launch_on(exact, run);
  if (!exact_only) launch_on(guarded, run);
  exact.take_back();
  if (!exact_only) guarded.take_back(true);
}

namespace {

// ---- what is tested

struct Case {
  std::string regime;
  std::function<void()> run;
};

template <typename S>
void add_case(std::vector<Case>& cases, const Shape& shape, Options options) {
  // uint8 labels end at 255.
  if (shape.classes > 250 && options.label == Label::uint8) options.label = Label::int32;
  const char* regime = shape.classes <= max_strided_classes             ? "few classes"
                       : shape.classes <= (sizeof(S) == 8 ? 512 : 2048) ? "warp"
                                                                        : "block";
  cases.push_back({regime, [shape, options] { test_all<S>(shape, options); }});
}

// Sizes around every border between kernels; with one block and with several.
template <typename S>
void add_sizes(std::vector<Case>& cases) {
  int i = static_cast<int>(storage_v<S>);
  for (const int64_t classes :
       {1, 2, 3, 10, 17, 31, 32, 33, 129, 200, 256, 257, 400, 513, 999, 1000, 1025, 3000})
    for (const int64_t rows : {1, 31, classes < 20 ? 1100 : classes < 300 ? 600 : 40})
      add_case<S>(cases, {1, rows, classes}, varied(++i));
  // Longer than a warp's registers hold, than what shared memory does without being asked and at all.
  for (const int64_t classes : {1024, 2048, 2049, 9000, 20001, 60001})
    add_case<S>(cases, {1, 3, classes}, varied(++i));
}

template <typename S>
void add_layouts(std::vector<Case>& cases) {
  int i = 0;
  for (const int64_t classes : {2, 3, 10, 32, 33, 129, 1001, 1021, 2101})
    for (const auto& [offset, out_offset] : {std::pair{0, 1}, {1, 0}, {1, 1}, {3, 2}}) {
      Shape shape{1, classes < 1000 ? 137 : 19, classes, 0, Layout::rows, offset, out_offset};
      add_case<S>(cases, shape, varied(++i));
      shape.layout = Layout::padded;
      add_case<S>(cases, shape, varied(++i));
    }
  for (const int64_t classes : {1, 3, 10, 32}) {
    add_case<S>(cases, {1, 300, classes, 60, Layout::planes}, varied(++i));
    add_case<S>(cases, {1, 2100, classes, 700, Layout::planes, 1}, varied(++i));
  }
}

template <typename S>
void add_ensembles_and_labels(std::vector<Case>& cases) {
  int i = 0;
  for (const int64_t classes : {3, 10, 40, 1000, 2100})
    for (const int64_t rows : {1, 70, classes < 100 ? 1500 : 30}) {
      Options options = varied(++i);
      options.step_tensor = true;
      options.shared_target = i % 2 == 0;
      add_case<S>(cases, {3, rows, classes}, options);
      add_case<S>(cases, {2, rows, classes, 0, Layout::padded, 1}, options);
      options = varied(i);
      options.ignore_every = 5;
      options.invalid_every = 4;
      add_case<S>(cases, {1, rows, classes}, options);
      options.ignore_every = 1;  // all of them
      options.invalid_every = 0;
      add_case<S>(cases, {1, rows, classes}, options);
      options.ignore_every = 0;
      options.extremes = true;
      options.reduction = Reduction::none;
      add_case<S>(cases, {1, rows, classes}, options);
    }
}

template <typename S>
void add_all(std::vector<Case>& cases) {
  add_sizes<S>(cases);
  add_layouts<S>(cases);
  add_ensembles_and_labels<S>(cases);
}

void test_weights_kernel() {
  for (const bool table : {false, true}) {
    context = "oscillation_weights";
    Options options;
    options.table = table;
    options.class_order = !table;
    Problem<float> problem({3, 1, 7}, options);
    WeightsRun run(problem, 100);
    carry_out(run);
    run.compare();
  }
}

// Runs the cases until the time is up; how many of each regime there were.
std::map<std::string, int> run_cases(const std::vector<Case>& cases, double seconds, size_t most) {
  const auto start = std::chrono::steady_clock::now();
  std::map<std::string, int> counts;
  for (size_t i = 0; i < cases.size() && i < most; ++i) {
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds) break;
    cases[i].run();
    ++counts[cases[i].regime];
  }
  return counts;
}

}  // namespace

}  // namespace problems

int main(int argc, char** argv) {
  using namespace problems;
  double seconds = 600;
  size_t most = SIZE_MAX;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const char* value = i + 1 < argc ? argv[i + 1] : "";
    char* end = nullptr;
    if (argument == "--exact" || argument == "--stop") {
      (argument == "--exact" ? exact_only : stop_at_first) = true;
      continue;
    }
    if (argument == "--seconds") seconds = std::strtod(value, &end);
    if (argument == "--cases") most = std::strtoull(value, &end, 10);
    if (end == nullptr || end == value || *end != 0) {
      std::printf("%s: expected [--seconds S] [--cases N] [--exact] [--stop], got %s %s\n", argv[0], argv[i],
                  value);
      return 2;
    }
    ++i;
  }
  std::vector<Case> cases;
  add_all<float>(cases);
  add_all<double>(cases);
  add_all<__half>(cases);
  add_all<__nv_bfloat16>(cases);
  std::shuffle(cases.begin(), cases.end(), std::mt19937_64(5));
  test_weights_kernel();
  const auto counts = run_cases(cases, seconds, most);
  int run = 0;
  for (const auto& [regime, count] : counts) {
    std::printf("%s rows: %d cases\n", regime.c_str(), count);
    run += count;
  }
  std::printf("gpu_guard: %d of %d cases\n", run, static_cast<int>(cases.size()));
  context = "every regime has its cases";
  CHECK(counts.size() == 3);
  return finish("gpu_guard");
}
