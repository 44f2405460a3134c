#include "row_algebra.h"

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmv.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "row_loops.h"

namespace dynloss {
namespace {

std::atomic<bool> device_path = false;
std::atomic<int64_t> num_reads_ = 0;
thread_local const Shards* shards = nullptr;

// Beneath autograd and autocast, and without TF32: the accuracy of these sums is that of the eigenvalues.
class Plainly {
  at::AutoDispatchBelowADInplaceOrView below_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
  at::NoTF32Guard no_tf32_;
};

// A pass over rows, which torch.profiler shows with their shape: they are what the driver costs beside its
// products.
class Pass {
 public:
  Pass(const char* name, const Rows& rows) {
    if (!record_.isActive()) return;
    if (record_.needsInputs()) {
      const std::vector<c10::IValue> inputs{rows.tensor()};
      record_.before(name, c10::ArrayRef<const c10::IValue>(inputs.data(), inputs.size()));
    } else {
      record_.before(name);
    }
  }

 private:
  at::RecordFunction record_{at::RecordScope::FUNCTION};
};

// Sums over the entries of shards become those over the entries of whole rows.
const at::Tensor& sum_shards(const at::Tensor& sums) {
  if (shards) shards->sum(sums);
  return sums;
}
void sum_shards(double* sums, int64_t count) {
  if (shards) shards->sum(at::from_blob(sums, {count}, at::TensorOptions(at::kDouble)));
}

// Columns that are taken at a time: in float32 sixty rows of a block fit into a second cache of a megabyte,
// and half or a quarter as many columns were slower with four rows and with seventy. On a device they are
// also what is summed in the dtype of the rows. The sums of blocks are added in double precision, in an order
// that depends on no number of threads.
constexpr int64_t kBlock = 4096;
// Numbers that are worth a thread.
constexpr int64_t kGrain = 1 << 16;

// What is left of x is orthogonal to n rows when its measured part in them is no longer than another
// subtraction would leave it: the roundings of P entries, about half an epsilon of each and independent,
// have a part of about epsilon √(n / P) / 3 of the length in n orthonormal rows. So many epsilon √(n / P):
constexpr double kRoundingsLeft = 2.0;
// A part of less than this share of what is left is gone after one more subtraction but for rounding: "twice
// is enough" (Kahan; Parlett 1998, 6.9). It is larger where most of x was in the rows, or the guess was
// wrong.
constexpr double kEnough = 0.1;
constexpr int kMaxSubtractions = 3;

// work(first column, columns, number of the block) for every block of columns; `rows` of each are touched.
template <typename Work>
void for_blocks(int64_t length, int64_t rows, Work work) {
  const int64_t count = (length + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kBlock * rows));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      work(block * kBlock, std::min(kBlock, length - block * kBlock), block);
    }
  });
}

// The sum over the blocks of what work(first column, columns, numbers) makes of one, `entries` numbers.
template <typename Work>
void sum_blocks(int64_t length, int64_t rows, int64_t entries, double* out, Work work) {
  if (entries == 0) return;
  if (length <= kBlock) return work(0, length, out);
  std::vector<double> partial((length + kBlock - 1) / kBlock * entries);
  for_blocks(length, rows, [&](int64_t first, int64_t columns, int64_t block) {
    work(first, columns, &partial[block * entries]);
  });
  std::fill_n(out, entries, 0.0);
  for (size_t i = 0; i < partial.size(); ++i) out[i % entries] += partial[i];
}

template <typename T>
std::vector<const T*> pointers(const Rows& rows, int64_t first = 0) {
  std::vector<const T*> out(rows.count());
  for (int64_t j = 0; j < rows.count(); ++j) out[j] = rows.row<T>(j) + first;
  return out;
}

// The columns of rows on a device, some at a time, such that `count` rows as short as a block are small
// beside one row: another set of whole rows would be the largest thing in memory.
std::vector<at::Tensor> device_blocks(const at::Tensor& rows, int64_t count) {
  const int64_t length = rows.size(1);
  const int64_t width = std::max<int64_t>(length / (8 * count), 16384);
  std::vector<at::Tensor> columns;
  for (int64_t first = 0; first < length; first += width) {
    columns.push_back(rows.narrow(1, first, std::min(width, length - first)));
  }
  return columns;
}

// to[i, :] = coefficients · rows for some columns, where the rows of `to` are `stride` apart.
template <typename T>
void combine_columns(T* to, int64_t stride, const Rows& coefficients, const Rows& rows, int64_t first,
                     int64_t columns) {
  const std::vector<const T*> from = pointers<T>(rows, first);
  for (int64_t i = 0; i < coefficients.count(); ++i, to += stride) {
    std::fill_n(to, columns, T(0));
    add_combination(to, coefficients.row<T>(i), from.data(), rows.count(), columns);
  }
}

// out = x - weights · rows, whatever the columns: rows of weight zero are not read.
template <typename T>
class Subtraction {
 public:
  Subtraction(const Rows& out, const Rows& x, const double* weights, int64_t step, const Rows& rows)
      : out_(out.row<T>(0)), x_(x.row<T>(0)) {
    for (int64_t j = 0; j < rows.count(); ++j) {
      if (weights[j * step] == 0.0) continue;
      weights_.push_back(static_cast<T>(weights[j * step]));
      rows_.push_back(rows.row<T>(j));
    }
  }

  void operator()(int64_t first, int64_t columns) const {
    // The sum first: x is rounded once, and not the same way in all its entries.
    std::array<T, kBlock> sum;
    std::fill_n(sum.data(), columns, T(0));
    std::vector<const T*> from = rows_;
    for (const T*& row : from) row += first;
    add_combination(sum.data(), weights_.data(), from.data(), static_cast<int64_t>(from.size()), columns);
    subtract(out_ + first, x_ + first, sum.data(), columns);
  }

 private:
  T* out_;
  const T* x_;
  std::vector<T> weights_;
  std::vector<const T*> rows_;
};

void subtract_on_device(const Rows& out, const Rows& x, const at::Tensor& coefficients, const Rows& rows) {
  const Pass pass("dynloss_ext::subtract_combination", rows);
  at::Tensor to = out.vector();
  const at::Tensor weights = coefficients.to(to.scalar_type());
  at::addmv_out(to, x.vector(), rows.tensor().t(), weights, 1, -1);
}

// The whole blocks of the columns of x: (blocks, rows, columns of a block); and what is left of them.
std::pair<at::Tensor, at::Tensor> blocks_and_rest(const at::Tensor& x) {
  const int64_t blocks = x.size(1) / kBlock, rest = x.size(1) % kBlock;
  return {x.as_strided({blocks, x.size(0), kBlock}, {kBlock, x.stride(0), 1}, x.storage_offset()),
          x.narrow(1, blocks * kBlock, rest)};
}

// Whether sums over rows of x lose nothing that blocks would save.
bool sums_at_once(const at::Tensor& x) { return x.scalar_type() == at::kDouble || x.size(1) <= kBlock; }

at::Tensor inner_products_on_device(const at::Tensor& a, const at::Tensor& b) {
  if (sums_at_once(a)) return at::mm(a, b.t()).to(at::kDouble);
  const auto [a_blocks, a_rest] = blocks_and_rest(a);
  const auto [b_blocks, b_rest] = blocks_and_rest(b);
  return at::bmm(a_blocks, b_blocks.transpose(1, 2))
      .sum(0, false, at::kDouble)
      .add_(at::mm(a_rest, b_rest.t()));
}

at::Tensor lengths_on_device(const at::Tensor& x) {
  if (sums_at_once(x)) return at::linalg_vector_norm(x, 2, -1).to(at::kDouble);
  const auto [blocks, rest] = blocks_and_rest(x);
  const at::Tensor of_blocks = at::linalg_vector_norm(blocks, 2, -1).to(at::kDouble);
  const at::Tensor of_rest = at::linalg_vector_norm(rest, 2, -1, true).to(at::kDouble);
  return at::linalg_vector_norm(at::cat({of_blocks.t(), of_rest}, 1), 2, 1);
}

// |x| of the largest entry of all shards, where NaN is larger than all: a maximum over processes may lose it.
at::Tensor largest_entry(const at::Tensor& x) {
  if (!shards) return at::linalg_vector_norm(x, INFINITY);
  const at::Tensor largest = at::zeros({1}, x.options().dtype(at::kDouble));
  if (x.numel() > 0) largest.copy_(at::linalg_vector_norm(x, INFINITY).nan_to_num(INFINITY, INFINITY));
  shards->max(largest);
  return largest;
}

}  // namespace

OnShards::OnShards(const Shards* of) : before_(std::exchange(shards, of)) {}
OnShards::~OnShards() { shards = before_; }

bool Rows::on_host() const { return matrix_.is_cpu() && !device_path; }

void take_device_path(bool on) { device_path = on; }

int64_t num_reads() { return num_reads_; }

at::Tensor Rows::tensor() const {
  const Plainly plainly;
  if (matrix_.dim() == 1) return matrix_.unsqueeze(0);
  return matrix_.slice(0, first_, first_ + (count_ - 1) * step_ + 1, step_);
}

at::Tensor Rows::vector() const {
  const Plainly plainly;
  return matrix_.dim() == 1 ? matrix_ : matrix_.select(0, first_);
}

at::Tensor inner_products(const Rows& a, const Rows& b) {
  const Plainly plainly;
  const Pass pass("dynloss_ext::inner_products", a.count() > b.count() ? a : b);
  const bool single = b.count() == 1;
  if (!a.on_host()) {
    const at::Tensor out = sum_shards(inner_products_on_device(a.tensor(), b.tensor()));
    return single ? out.view({a.count()}) : out;
  }
  const auto options = at::TensorOptions(at::kDouble);
  const at::Tensor out =
      single ? at::empty({a.count()}, options) : at::empty({a.count(), b.count()}, options);
  AT_DISPATCH_FLOATING_TYPES(a.matrix().scalar_type(), "inner_products", [&] {
    const std::vector<const scalar_t*> of_b = pointers<scalar_t>(b);
    const int64_t count = a.count(), entries = count * b.count();
    std::vector<double> by_b(entries);
    sum_blocks(a.length(), count + b.count(), entries, by_b.data(),
               [&](int64_t first, int64_t columns, double* sums) {
                 const std::vector<const scalar_t*> here = pointers<scalar_t>(a, first);
                 for (const scalar_t* row : of_b) {
                   dots(here.data(), count, row + first, columns, sums);
                   sums += count;
                 }
               });
    sum_shards(by_b.data(), entries);
    auto* to = out.mutable_data_ptr<double>();
    for (int64_t i = 0; i < entries; ++i) to[i] = by_b[i % b.count() * count + i / b.count()];
  });
  return out;
}

at::Tensor combinations(const Rows& coefficients, const Rows& rows) {
  const Plainly plainly;
  const Pass pass("dynloss_ext::combinations", rows);
  if (!rows.on_host()) return at::mm(coefficients.tensor(), rows.tensor());
  const int64_t length = rows.length();
  const at::Tensor out = at::empty({coefficients.count(), length}, rows.matrix().options());
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "combinations", [&] {
    auto* begin = out.mutable_data_ptr<scalar_t>();
    for_blocks(length, rows.count(), [&](int64_t first, int64_t columns, int64_t) {
      combine_columns(begin + first, length, coefficients, rows, first, columns);
    });
  });
  return out;
}

void replace_by_combinations(const at::Tensor& rows, const Rows& coefficients) {
  const Plainly plainly;
  const Pass pass("dynloss_ext::replace_by_combinations", rows);
  const int64_t count = coefficients.count();
  const Rows all(rows);
  if (!all.on_host()) {
    for (const at::Tensor& columns : device_blocks(rows, count)) {
      columns.narrow(0, 0, count).copy_(at::mm(coefficients.tensor(), columns));
    }
    return;
  }
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "replace_by_combinations", [&] {
    for_blocks(all.length(), all.count(), [&](int64_t first, int64_t columns, int64_t) {
      std::vector<scalar_t> combined(count * columns);
      combine_columns(combined.data(), columns, coefficients, all, first, columns);
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(&combined[i * columns], columns, all.row<scalar_t>(i) + first);
      }
    });
  });
}

void subtract_combination(const Rows& out, const Rows& x, const at::Tensor& coefficients, const Rows& rows) {
  const Plainly plainly;
  if (!rows.on_host()) return subtract_on_device(out, x, coefficients, rows);
  const Pass pass("dynloss_ext::subtract_combination", rows);
  AT_DISPATCH_FLOATING_TYPES(rows.matrix().scalar_type(), "subtract_combination", [&] {
    const Subtraction<scalar_t> subtract_from(out, x, coefficients.const_data_ptr<double>(),
                                              coefficients.stride(0), rows);
    for_blocks(rows.length(), rows.count(),
               [&](int64_t first, int64_t columns, int64_t) { subtract_from(first, columns); });
  });
}

at::Tensor orthogonalise(const Rows& out, const Rows& x, const at::Tensor& overlaps, const Rows& rows) {
  const Plainly plainly;
  const int64_t count = rows.count(), length = rows.length(),
                dimension = shards ? shards->dimension() : length;
  if (!rows.on_host()) {
    subtract_on_device(out, x, overlaps, rows);
    const at::Tensor left = inner_products(rows, out);
    subtract_on_device(out, out, left, rows);
    return at::cat({overlaps.add(left), lengths(out)});
  }
  const at::Tensor total = at::zeros({count + 1}, at::TensorOptions(at::kDouble));
  auto* sums = total.mutable_data_ptr<double>();
  // Of what is left: the overlaps with the rows, and the square of its length.
  std::vector<double> left(count + 1);
  for (int64_t j = 0; j < count; ++j) {
    sums[j] = left[j] = overlaps.const_data_ptr<double>()[j * overlaps.stride(0)];
  }
  const double negligible = kRoundingsLeft * rounding_of(rows.matrix().options()) *
                            std::sqrt(static_cast<double>(count) / static_cast<double>(dimension));
  bool last = false;
  for (int i = 0; i < kMaxSubtractions; ++i) {
    const Pass pass("dynloss_ext::orthogonalise", rows);
    AT_DISPATCH_FLOATING_TYPES(rows.matrix().scalar_type(), "orthogonalise", [&] {
      const Subtraction<scalar_t> subtract_from(out, i == 0 ? x : out, left.data(), 1, rows);
      const auto* to = out.row<scalar_t>(0);
      // The rows of a block come from memory once: they are still in the cache for the inner products.
      sum_blocks(length, 2 * count, count + 1, left.data(),
                 [&](int64_t first, int64_t columns, double* of_block) {
                   subtract_from(first, columns);
                   std::vector<const scalar_t*> here = pointers<scalar_t>(rows, first);
                   here.push_back(to + first);
                   dots(here.data(), count + 1, to + first, columns, of_block);
                 });
    });
    sum_shards(left.data(), count + 1);
    for (int64_t j = 0; j < count; ++j) sums[j] += left[j];
    sums[count] = std::sqrt(left[count]);
    const double inside = std::inner_product(left.begin(), left.end() - 1, left.begin(), 0.0);
    const double share = std::sqrt(inside) / sums[count];
    if (last || !(share > negligible)) break;
    last = share <= kEnough;
  }
  return total;
}

at::Tensor orthogonalise(const Rows& out, const Rows& x, const Rows& rows) {
  return orthogonalise(out, x, inner_products(rows, x), rows);
}

void assign(const Rows& out, const Rows& x, double factor) {
  if (!out.on_host()) {
    const Plainly plainly;
    at::Tensor to = out.vector();
    if (const at::Tensor from = x.vector(); from.data_ptr() != to.data_ptr()) to.copy_(from);
    if (factor != 1.0) to.mul_(factor);
    return;
  }
  AT_DISPATCH_FLOATING_TYPES(x.matrix().scalar_type(), "assign", [&] {
    const auto* from = x.row<scalar_t>(0);
    auto* to = out.row<scalar_t>(0);
    for_blocks(x.length(), 1, [&](int64_t first, int64_t columns, int64_t) {
      for (int64_t i = first; i < first + columns; ++i) to[i] = static_cast<scalar_t>(factor) * from[i];
    });
  });
}

at::Tensor lengths(const Rows& x) {
  const Plainly plainly;
  if (!x.on_host()) {
    const at::Tensor own = lengths_on_device(x.tensor());
    return shards ? sum_shards(own.square()).sqrt() : own;
  }
  const at::Tensor out = at::empty({x.count()}, at::TensorOptions(at::kDouble));
  auto* begin = out.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.matrix().scalar_type(), "lengths", [&] {
    sum_blocks(x.length(), x.count(), x.count(), begin, [&](int64_t first, int64_t columns, double* sums) {
      for (const scalar_t* row : pointers<scalar_t>(x, first)) dots(&row, 1, row, columns, sums++);
    });
  });
  sum_shards(begin, x.count());
  std::transform(begin, begin + x.count(), begin, [](double square) { return std::sqrt(square); });
  return out;
}

bool normalise(const Rows& x, double negligible) {
  const double length = to_host({lengths(x)}).front();
  if (!(length > negligible)) return false;
  assign(x, x, 1.0 / length);
  return true;
}

void normalise_blindly(const Rows& x, const at::Tensor& negligible) {
  const Plainly plainly;
  const at::Tensor length = lengths(x).squeeze(0);
  x.vector().div_(at::where(length > negligible, length, INFINITY));
}

double scale_into_range(const Rows& x) {
  const Plainly plainly;
  const double largest = to_host({largest_entry(x.vector())}).front();
  if (!std::isfinite(largest)) return largest;
  if (largest == 0.0) return 1.0;
  const int limit = x.matrix().scalar_type() == at::kDouble ? 1020 : 120;
  const double factor = std::ldexp(1.0, std::clamp(-std::ilogb(largest), -limit, limit));
  assign(x, x, factor);
  return factor;
}

double rounding_of(const at::TensorOptions& options) {
  return options.dtype() == at::kFloat ? std::numeric_limits<float>::epsilon()
                                       : std::numeric_limits<double>::epsilon();
}

std::vector<double> to_host(const std::vector<at::Tensor>& values) {
  const auto at_hand = [](const at::Tensor& x) {
    return !device_path && x.is_cpu() && x.scalar_type() == at::kDouble && x.is_contiguous();
  };
  std::vector<double> out;
  const auto append = [&](const at::Tensor& x) {
    const double* begin = x.const_data_ptr<double>();
    out.insert(out.end(), begin, begin + x.numel());
  };
  if (std::all_of(values.begin(), values.end(), at_hand)) {
    for (const at::Tensor& x : values) append(x);
    return out;
  }
  const Plainly plainly;
  std::vector<at::Tensor> flat;
  for (const at::Tensor& x : values) flat.push_back(x.reshape({-1}).to(at::kDouble));
  const at::Tensor joined = flat.size() == 1 ? flat.front() : at::cat(flat);
  if (device_path || !joined.is_cpu()) ++num_reads_;
  const at::Tensor host = joined.to(at::kCPU, at::kDouble, /*non_blocking=*/true);  // into pinned memory
  if (!joined.is_cpu()) {
    const c10::impl::VirtualGuardImpl device(joined.device().type());
    device.getStream(joined.device()).synchronize();
  }
  append(host.contiguous());
  return out;
}

at::Tensor to_device(const std::vector<double>& values, int64_t columns, const at::Tensor& like) {
  const Plainly plainly;
  const auto rows = static_cast<int64_t>(values.size()) / columns;
  const at::Tensor host = at::empty({rows, columns}, at::TensorOptions(at::kDouble));
  std::copy(values.begin(), values.end(), host.mutable_data_ptr<double>());
  return like.is_cpu() && like.scalar_type() == at::kDouble ? host : host.to(like.options());
}

}  // namespace dynloss
