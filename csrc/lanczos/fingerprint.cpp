#include "fingerprint.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <random>
#include <string>

#include "row_loops.h"

namespace dynloss {
namespace {

// Factors of places: f_i = kFactors[i % kPlaces] * kRatio^(i / kPlaces). Those of two places differ by a
// multiple of 2^31 at most, and two words by less than 2^33, so that no exchange of values is lost modulo
// 2^64.
constexpr int64_t kPlaces = 4096;
constexpr uint64_t kRatio = 6364136223846793005u;
constexpr int64_t kBlocksAtOnce = 256;  // on a device: they take 8 MB

const std::array<int32_t, kPlaces>& factors() {
  static const auto made = [] {
    std::mt19937 random(0);
    std::array<int32_t, kPlaces> out;
    for (int32_t& factor : out) factor = static_cast<int32_t>(random() >> 1 | 1);
    return out;
  }();
  return made;
}

int64_t of_words(const int32_t* words, int64_t length) {
  uint64_t total = 0, power = 1;
  for (int64_t i = 0; i < length; i += kPlaces, power *= kRatio) {
    total += power *
             static_cast<uint64_t>(integer_dot(words + i, factors().data(), std::min(kPlaces, length - i)));
  }
  return static_cast<int64_t>(total);
}

// (kBlocksAtOnce * kPlaces,) int64, kept for each device: a capture could not bring it there.
at::Tensor factors_on(const at::Device& device) {
  static std::mutex mutex;
  static auto* kept = new std::map<std::string, at::Tensor>;  // not freed after the device is gone
  const std::scoped_lock lock(mutex);
  at::Tensor& table = (*kept)[device.str()];
  if (!table.defined()) {
    at::Tensor host = at::empty({kBlocksAtOnce * kPlaces}, at::kLong);
    auto* out = static_cast<int64_t*>(host.data_ptr());
    uint64_t power = 1;
    for (int64_t i = 0; i < host.numel(); ++i) {
      out[i] = static_cast<int64_t>(power * static_cast<uint64_t>(factors()[i % kPlaces]));
      if (i % kPlaces == kPlaces - 1) power *= kRatio;
    }
    table = host.to(device);
  }
  return table;
}

at::Tensor of_tensor(const at::Tensor& x) {
  const bool wide = x.element_size() == 8;
  if (x.is_cpu() && x.is_non_overlapping_and_dense()) {
    const auto* words = static_cast<const int32_t*>(x.const_data_ptr());
    return at::scalar_tensor(of_words(words, x.numel() * (wide ? 2 : 1)), at::kLong);
  }
  const at::Tensor words = x.view(wide ? at::kLong : at::kInt).reshape({-1}).contiguous().view(at::kInt);
  const at::Tensor table = factors_on(x.device());
  at::Tensor total = at::scalar_tensor(0, table.options());
  uint64_t ratio = 1, power = 1;
  for (int64_t i = 0; i < kBlocksAtOnce; ++i) ratio *= kRatio;
  for (int64_t i = 0; i < words.numel(); i += table.numel(), power *= ratio) {
    const int64_t length = std::min(table.numel(), words.numel() - i);
    const at::Tensor sum = words.narrow(0, i, length).mul(table.narrow(0, 0, length)).sum();
    total.add_(sum, static_cast<int64_t>(power));
  }
  return total;
}

}  // namespace

at::Tensor fingerprints(const std::vector<at::Tensor>& tensors) {
  const at::AutoDispatchBelowADInplaceOrView below;
  std::vector<at::Tensor> of_each;
  for (const at::Tensor& x : tensors) of_each.push_back(of_tensor(x));
  return at::stack(of_each);
}

}  // namespace dynloss
