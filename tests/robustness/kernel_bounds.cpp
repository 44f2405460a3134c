// The CPU kernels of the cross-entropy on arrays that end where they must: under AddressSanitizer a vector
// that reads or writes beside them is found. And the driver's small eigenproblems, of all sizes. Values are
// the business of other tests. Usage: kernel_bounds [short-of], a number of elements that arrays lack, so
// that something is found.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cpu/kernel.h"
#include "lanczos/small_eigen.h"

using namespace dynloss;
using namespace dynloss::cpu;

namespace {

std::mt19937_64 randomness(0);
int64_t lacking = 0;

int64_t size_of(Storage storage) {
  return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

// `count` elements with nothing behind them that may be touched; in half types any bits, NaN too.
std::unique_ptr<char[]> elements(int64_t count, Storage storage) {
  const int64_t bytes = std::max<int64_t>(0, count - lacking) * size_of(storage);
  std::unique_ptr<char[]> data(new char[bytes]);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < bytes / size_of(storage); ++i) {
    if (storage == Storage::float64)
      reinterpret_cast<double*>(data.get())[i] = 3.0 * normal(randomness);
    else if (storage == Storage::float32)
      reinterpret_cast<float*>(data.get())[i] = 3.0f * static_cast<float>(normal(randomness));
    else
      reinterpret_cast<uint16_t*>(data.get())[i] = static_cast<uint16_t>(randomness());
  }
  return data;
}

struct Shape {
  int64_t rows, classes, padding;  // padding: elements between rows, or planes
  bool planes;                     // classes are the slow dimension

  int64_t count() const {
    if (rows == 0) return 0;
    return planes ? (classes - 1) * (rows + padding) + rows : (rows - 1) * (classes + padding) + classes;
  }

  Operand operand(char* data) const {
    return planes ? Operand{data, 0, 1, rows + padding} : Operand{data, 0, classes + padding, 1};
  }
};

void run(const Kernels& kernels, const Shape& shape, Storage storage, Kind kind, bool smooth, bool scaled) {
  const bool wide = storage == Storage::float64;
  auto logits = elements(shape.count(), storage), u = elements(shape.count(), storage),
       v = elements(shape.count(), storage), out = elements(shape.count(), storage),
       row_loss = elements(shape.rows, storage),
       row_scale = elements(shape.rows, wide ? Storage::float64 : Storage::float32);
  std::unique_ptr<int64_t[]> labels(new int64_t[shape.rows]);
  for (int64_t i = 0; i < shape.rows; ++i)
    labels[i] = randomness() % 4 == 0 ? -100 : static_cast<int64_t>(randomness() % shape.classes);
  std::unique_ptr<double[]> weights(new double[shape.classes]);
  double sum = 0;
  for (int64_t c = 0; c < shape.classes; ++c) sum += weights[c] = 1.0 + static_cast<double>(c % 3);
  kernels.count_labels(labels.get(), shape.rows, shape.classes, -100);

  Block block = {};
  block.kind = kind;
  block.storage = storage;
  block.num_classes = shape.classes;
  block.logits = shape.operand(logits.get());
  block.u = shape.operand(u.get());
  block.v = shape.operand(v.get());
  block.out = shape.operand(out.get());
  block.labels = labels.get();
  block.ignore_index = -100;
  block.any_ignored = true;
  block.weights = weights.get();
  block.weights_sum = sum;
  block.label_smoothing = smooth ? 0.2 : 0.0;
  block.scale = 0.5;
  block.row_scale = scaled ? row_scale.get() : nullptr;
  block.row_loss = scaled ? row_loss.get() : nullptr;
  kernels.run_rows(block, 0, shape.rows);
  if (kind != Kind::loss_and_gradient) return;
  block.out = block.logits;
  block.into_logits = true;
  kernels.run_rows(block, 0, shape.rows);
}

int64_t check_kernels(const Kernels& kernels) {
  int64_t cases = 0;
  for (const int64_t classes :
       {1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 129, 257, 1025})
    for (const int64_t rows : {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65})
      for (const bool planes : {false, true}) {
        if (planes && (classes == 1 || classes > max_plane_classes)) continue;
        for (const int64_t padding : {0, 1, 3})
          for (const Storage storage :
               {Storage::float32, Storage::float64, Storage::float16, Storage::bfloat16})
            for (const Kind kind :
                 {Kind::loss, Kind::loss_and_gradient, Kind::gradient, Kind::hessian, Kind::third}) {
              const bool smooth = randomness() % 2 == 0, scaled = randomness() % 2 == 0;
              run(kernels, {rows, classes, padding, planes}, storage, kind, smooth, scaled);
              ++cases;
            }
      }
  return cases;
}

int64_t check_eigenproblems() {
  int64_t cases = 0;
  std::normal_distribution<double> normal;
  for (int64_t size = 1; size <= 64; ++size)
    for (const double scale : {0.0, 1e-300, 1.0, 1e150})
      for (const int64_t components : {int64_t{1}, (size + 1) / 2, size}) {
        std::vector<double> matrix(size * size), alpha(size), beta(size);
        for (double& x : matrix) x = scale * normal(randomness);
        for (double& x : alpha) x = scale * normal(randomness);
        for (double& x : beta) x = randomness() % 3 == 0 ? 0.0 : scale * std::abs(normal(randomness));
        symmetric_eigen(matrix, size, components);
        tridiagonal_eigen(alpha, beta, components);
        shifted_minres_residual(alpha, beta, scale * normal(randomness));
        ++cases;
      }
  return cases;
}

}  // namespace

int main(int count, char** arguments) {
  lacking = count > 1 ? std::atoi(arguments[1]) : 0;
  const auto tell = [](const Kernels& kernels) {
    std::printf("%s: %lld cases\n", kernels.instruction_set, static_cast<long long>(check_kernels(kernels)));
  };
  tell(default_kernels);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tell(avx2_kernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) tell(avx512_kernels);
#endif
  std::printf("eigenproblems: %lld cases\n", static_cast<long long>(check_eigenproblems()));
}
