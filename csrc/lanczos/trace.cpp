#include "trace.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>
#include <stdexcept>

#include "random_vector.h"
#include "row_algebra.h"

namespace dynloss {
namespace {

class Sampler {
 public:
  Sampler(SymmetricOperator& op, int64_t range, const at::Generator& generator,
          const std::function<void()>& poll)
      : op_(op),
        generator_(generator),
        poll_(poll),
        epsilon_(op.options().dtype() == at::kFloat ? std::numeric_limits<float>::epsilon()
                                                    : std::numeric_limits<double>::epsilon()),
        rows_(at::empty({range + 1, op.size()}, op.options())) {}

  // Takes what is new in H z into Q.
  void extend_range() {
    multiply_into_slot(random_signs(op_, generator_));
    // Where Q holds the whole range of H, any direction will do.
    while (!make_orthonormal()) copy(slot(), random_normal(op_, generator_));
    ++size_;
  }

  double trace_on_range() {
    double sum = 0.0;
    for (int64_t i = 0; i < size_; ++i) sum += quadratic_form(Rows(rows_, i, 1).vector());
    return sum;
  }

  double sample_beside() {
    const at::Tensor z = random_signs(op_, generator_);
    remove_range(z);
    return quadratic_form(z);
  }

 private:
  Rows range() const { return {rows_, 0, size_}; }
  Rows slot() const { return {rows_, size_, 1}; }

  // The slot becomes H v in a unit in which no square overflows or vanishes, which is returned.
  double multiply_into_slot(const at::Tensor& v) {
    poll_();
    const at::Tensor product = op_.apply(v);
    const double unit = normalising_power_of_two(product);
    if (!std::isfinite(unit)) throw std::runtime_error("a product with the operator is not finite");
    copy(slot(), product);
    if (unit == 0.0) return 1.0;
    scale(slot(), unit);
    return unit;
  }

  double quadratic_form(const at::Tensor& v) {
    const double unit = multiply_into_slot(v);
    return to_host({inner_products(v, slot())}).front() / unit;
  }

  void remove_range(const Rows& x) const {
    if (size_ == 0) return;
    subtract_combination(x, x, inner_products(range(), x), range());
    subtract_combination(x, x, inner_products(range(), x), range());
  }

  // The slot without its part in Q, of length 1; false where that is mere rounding.
  bool make_orthonormal() {
    const at::Tensor before = lengths(slot());
    remove_range(slot());
    const std::vector<double> read = to_host({before, lengths(slot())});
    if (!(read[1] > 10.0 * epsilon_ * read[0])) return false;
    scale(slot(), 1.0 / read[1]);
    return true;
  }

  SymmetricOperator& op_;
  at::Generator generator_;
  const std::function<void()>& poll_;
  const double epsilon_;
  const at::Tensor rows_;  // Q, and room for one product
  int64_t size_ = 0;       // of Q
};

}  // namespace

TraceSamples sample_trace(SymmetricOperator& op, int64_t range, int64_t samples,
                          const at::Generator& generator, const std::function<void()>& poll) {
  const at::NoGradGuard no_grad;
  Sampler sampler(op, range, generator, poll);
  TraceSamples out;
  for (int64_t i = 0; i < range; ++i) sampler.extend_range();
  out.on_range = sampler.trace_on_range();
  if (range == op.size()) return out;
  for (int64_t i = 0; i < samples; ++i) out.beside_it.push_back(sampler.sample_beside());
  return out;
}

}  // namespace dynloss
