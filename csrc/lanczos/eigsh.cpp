#include "eigsh.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>

#include "projected.h"
#include "random_vector.h"
#include "ritz_basis.h"
#include "row_algebra.h"

namespace dynloss {
namespace {

// Ritz vectors kept at a restart beyond the wanted ones.
constexpr int64_t kExtraKept = 3;
// An audit ends when an eigenvector that it should have shown would have gone unnoticed with this
// probability, or after so many products.
constexpr double kMissProbability = 0.08;
constexpr int64_t kMaxAuditProducts = 24;
// Audits that found what turned out to be nothing, one after the other, before there are no more of them.
constexpr int kDeceptions = 2;
// The noise floor: so many products without progress at least, and how far above the noise of a product a
// residual may then stand, for each of them: the longer it stands still, the less the noise has to explain.
constexpr int64_t kStagnation = 8;
constexpr double kNoisePerProduct = 0.25;

// Products of a symmetric operator may be as inexact as the tolerance, but not more than this.
constexpr double kNoise = 0.01;

// Residuals this far above what is allowed (one product gains a factor of 2 to 5) are not looked at every
// product.
constexpr double kFar = 10.0;
// A start vector with less of its squared length than this in the basis is lost.
constexpr double kKept = 0.75;
// Old and new eigenvectors that overlap by less are not the same.
constexpr double kSame = 0.5;

enum class Step { kDone, kBudget, kNonFinite };

class Solver {
 public:
  Solver(SymmetricOperator& op, const EigshOptions& options, const at::Tensor& start)
      : op_(op),
        options_(options),
        start_(start),
        length_(op.size()),
        capacity_(std::min(options.max_basis, length_)),
        epsilon_(op.options().dtype() == at::kFloat ? std::numeric_limits<float>::epsilon()
                                                    : std::numeric_limits<double>::epsilon()),
        basis_(capacity_, length_, op.options()) {}

  EigshResult run() {
    std::string status = solve();
    if (basis_.size() > 0) check_symmetric();
    return result(std::move(status));
  }

 private:
  std::string solve() {
    Step step = begin();
    while (step == Step::kDone) {
      if (basis_.size() < options_.count) {
        step = expand_krylov();
        continue;
      }
      step = project();
      if (step != Step::kDone || basis_.size() < options_.count) continue;
      const bool settled = all_converged() || at_noise_floor();
      if (!settled) {
        const bool far = worst_excess() > kFar;
        step = expand_by_residual();
        // A second product before looking again; in a Krylov space this is the direction of every residual.
        if (far && step == Step::kDone && basis_.size() < capacity_) step = expand_krylov();
      } else if (const std::optional<int64_t> lost = lost_start()) {
        step = expand([&] { return basis_.propose(Rows(start_, *lost, 1), start_norms_[*lost]); });
      } else if (options_.audit && !audited_) {
        if (deceived_ < kDeceptions) {
          step = audit();
        } else {
          audited_ = true;
          miss_probability_ = 1.0;
        }
      } else {
        return all_converged() ? "converged" : "noise floor";
      }
    }
    if (project() == Step::kNonFinite) step = Step::kNonFinite;
    audited_ = false;
    return step == Step::kNonFinite ? "non-finite product" : "max_hvp";
  }

  // The Krylov space of one vector made of all the old ones: every product then works for every wanted pair,
  // where a block would spend as many as it has vectors on each power of H. (Unequal weights, as v and -v may
  // be there.)
  Step begin() {
    std::vector<double> weights;
    if (start_.defined()) start_norms_ = to_host({lengths(start_)});
    for (const double norm : start_norms_) {
      const auto i = static_cast<int64_t>(weights.size());
      weights.push_back(norm > 0.0 ? (1.0 + 0.5 * static_cast<double>(i)) / norm : 0.0);
      if (norm > 0.0) unseen_.push_back(i);
    }
    const at::Tensor x =
        unseen_.empty() ? random_vector() : combinations(to_device(weights, start_.size(0), start_), start_);
    const Step step = expand([&] { return basis_.propose(x, 0.0); });
    return step == Step::kDone ? settle() : step;  // this product says in what unit to go on
  }

  // A start vector that the basis has lost, each at most once. A Krylov space has one vector for equal
  // eigenvalues; the others are among the old vectors.
  std::optional<int64_t> lost_start() {
    if (unseen_.empty()) return std::nullopt;
    const std::vector<double>& overlaps = start_overlaps();
    while (!unseen_.empty()) {
      const int64_t i = unseen_.back();
      unseen_.pop_back();
      const double* begin = &overlaps[i * basis_.size()];
      const double inside = std::inner_product(begin, begin + basis_.size(), begin, 0.0);
      if (inside < kKept * start_norms_[i] * start_norms_[i]) return i;
    }
    return std::nullopt;
  }

  // The overlaps of the start vectors with the basis: (start vectors, basis vectors).
  const std::vector<double>& start_overlaps() {
    if (start_overlaps_.empty()) start_overlaps_ = basis_.overlaps(start_);
    return start_overlaps_;
  }

  Step multiply(const at::Tensor& v, at::Tensor& product) {
    if (num_products_ >= options_.max_products) return Step::kBudget;
    if (options_.poll) options_.poll();
    ++num_products_;
    product = op_.apply(v);
    return Step::kDone;
  }

  // One product with what is new in a proposal; with a random direction where nothing is.
  template <typename Propose>
  Step expand(Propose propose) {
    if (const Step step = make_room(1); step != Step::kDone) return step;
    for (bool proposed = propose(); !proposed;) {
      proposed = basis_.propose(random_vector(), std::sqrt(static_cast<double>(length_)));
    }
    at::Tensor product;
    if (const Step step = multiply(basis_.candidate(), product); step != Step::kDone) return step;
    basis_.accept(product);
    start_overlaps_.clear();
    nothing_new_ = false;
    return basis_.blind() && basis_.num_waiting() < 2 ? Step::kDone : settle();
  }

  Step expand_krylov() {
    return expand([&] { return !nothing_new_ && basis_.propose_product(); });
  }

  // Asks the basis what it has found: once for a decision.
  Step settle() {
    const RitzBasis::Settled settled = basis_.settle();
    nothing_new_ |= settled == RitzBasis::Settled::kNothingNew;
    return settled == RitzBasis::Settled::kNonFinite ? Step::kNonFinite : Step::kDone;
  }

  Step make_room(int64_t columns) {
    if (basis_.size() + columns <= capacity_) return Step::kDone;
    if (const Step step = project(); step != Step::kDone) return step;
    const int64_t keep = std::min({options_.count + kExtraKept, basis_.size(), capacity_ - columns});
    ritz_.values.resize(keep);
    check_symmetric();  // a full basis knows, and the budget may be large
    basis_.restart(leading(keep), ritz_.values);
    start_overlaps_.clear();
    ritz_.vectors.assign(keep * keep, 0.0);  // the basis is of these vectors now
    for (int64_t i = 0; i < keep; ++i) ritz_.vectors[i * keep + i] = 1.0;
    return Step::kDone;
  }

  // Rayleigh-Ritz: the pairs of the projected problem, wanted first.
  Step project() {
    const Step step = settle();
    const int64_t m = basis_.size();
    if (m == 0) return step;
    EigenPairs pairs = symmetric_eigen(basis_.projection(), m);
    std::vector<int64_t> order(m);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return key(pairs.values[a]) > key(pairs.values[b]); });
    ritz_ = {};
    for (const int64_t i : order) {
      ritz_.values.push_back(pairs.values[i]);
      ritz_.vectors.insert(ritz_.vectors.end(), &pairs.vectors[i * m], &pairs.vectors[i * m] + m);
    }
    for (const double value : pairs.values) largest_ = std::max(largest_, std::abs(value) / basis_.unit());
    scale_ = largest_ * basis_.unit();

    std::vector<double> allowed;
    for (int64_t i = 0; i < std::min(options_.count, m); ++i) allowed.push_back(limit(ritz_.values[i]));
    find_residuals(allowed);
    return step;
  }

  void find_residuals(const std::vector<double>& enough) {
    const auto wanted = static_cast<int64_t>(enough.size());
    residual_norms_ =
        basis_.residual_norms(leading(wanted), {ritz_.values.begin(), ritz_.values.begin() + wanted}, enough);
  }

  // What is wanted most: larger is better.
  double key(double value) const {
    switch (options_.which) {
      case Which::kLargest:
        return value;
      case Which::kSmallest:
        return -value;
      default:
        return std::abs(value);
    }
  }

  std::vector<double> leading(int64_t rows) const {
    return {ritz_.vectors.begin(), ritz_.vectors.begin() + rows * basis_.size()};
  }

  // The relative rule alone never ends at an eigenvalue of zero.
  double limit(double value) const {
    return std::max(options_.tolerance * std::abs(value), std::pow(epsilon_, 2.0 / 3.0) * scale_);
  }

  // The residual of wanted pair i in units of what is allowed; infinite for a pair that the basis is too
  // small for.
  double excess(int64_t i) const {
    if (i >= static_cast<int64_t>(residual_norms_.size())) return std::numeric_limits<double>::infinity();
    const double allowed = limit(ritz_.values[i]);
    return residual_norms_[i] <= allowed ? 0.0 : residual_norms_[i] / allowed;
  }

  double worst_excess() const {
    double worst = 0.0;
    for (int64_t i = 0; i < options_.count; ++i) worst = std::max(worst, excess(i));
    return worst;
  }

  bool all_converged() const { return worst_excess() == 0.0; }

  // One product along the worst wanted residual.
  Step expand_by_residual() {
    if (const Step step = make_room(1); step != Step::kDone) return step;
    int64_t worst = 0;
    for (int64_t i = 1; i < std::min(options_.count, basis_.size()); ++i) {
      if (excess(i) > excess(worst)) worst = i;
    }
    return expand([&] {
      return !nothing_new_ && basis_.propose_residual(&ritz_.vectors[worst * basis_.size()],
                                                      ritz_.values[worst], residual_norms_[worst]);
    });
  }

  at::Tensor random_vector() {
    if (!generator_) generator_ = at::detail::createCPUGenerator(options_.seed);
    return random_normal(op_, *generator_);
  }

  // A Krylov space cannot see a second eigenvector of the same eigenvalue, nor one that its start is
  // orthogonal to.
  Step audit() {
    check_symmetric();
    audited_ = true;
    miss_probability_ = 0.0;
    if (capacity_ < length_) {
      if (const Step step = make_room(RitzBasis::kProbeColumns); step != Step::kDone) return step;
    }
    const double last = ritz_.values[options_.count - 1];
    const double edge = options_.which == Which::kMagnitude ? std::abs(last) : last;
    // What lies beyond by less cannot be told from the last wanted value.
    const double noise = 3.0 * basis_.noise() / std::sqrt(static_cast<double>(length_));
    const double margin = std::max({limit(last), residual_norms_[options_.count - 1], noise});
    Step step = Step::kDone;
    if (options_.which != Which::kSmallest) step = search_beyond(edge + margin, 1.0);
    if (options_.which != Which::kLargest && step == Step::kDone && audited_) {
      const double lower = options_.which == Which::kMagnitude ? -edge : edge;
      step = search_beyond(lower - margin, -1.0);
    }
    return step;
  }

  // Looks for eigenvalues above a bound (below it for side = -1) other than the wanted ones. Let C be the
  // complement of the basis, U its Ritz vectors other than the wanted ones, t their values and R = P_C H U
  // their residuals. All t are below the bound μ; then H has as many eigenvalues above μ on U + C as the
  // Schur complement
  //     A = P_C H P_C + R (μ - t)⁻¹ Rᵀ
  // has on C (Haynsworth 1968). So a Lanczos process with A starts from a random vector x of C, and goes on
  // until ‖p(A) x‖ for the best polynomial with p(μ) = 1 is so small that an eigenvector with a value beyond
  // μ could hide only if x had almost none of it: its component is a normal number over the root of the
  // dimension. What comes up is taken into the basis, and the audit has to be repeated.
  Step search_beyond(double bound, double side) {
    const int64_t m = basis_.size(), complement = length_ - m;
    if (complement == 0) return Step::kDone;
    std::vector<double> coupling(m * m);  // Σ u uᵀ / (μ - t)
    for (int64_t i = options_.count; i < m; ++i) {
      const double* u = &ritz_.vectors[i * m];
      const double distance = bound - ritz_.values[i];
      for (int64_t j = 0; j < m * m && distance != 0.0; ++j) coupling[j] += u[j / m] * u[j % m] / distance;
    }
    basis_.start_probe(random_vector(), coupling);
    alpha_.clear();
    beta_.clear();
    double missed;
    do {
      if (const Step step = probe(); step != Step::kDone || !audited_) return step;
      const double hidden = shifted_minres_residual(alpha_, beta_, bound);
      missed = std::erf(hidden * std::sqrt(0.5 * static_cast<double>(complement)));
    } while (missed >= kMissProbability && num_probed() < std::min(kMaxAuditProducts, complement));
    miss_probability_ = std::max(miss_probability_, missed);
    const EigenPairs pairs = tridiagonal_eigen(alpha_, beta_);
    const auto found = std::max_element(pairs.values.begin(), pairs.values.end(),
                                        [&](double a, double b) { return side * a < side * b; });
    if (side * *found <= side * bound) return Step::kDone;
    const auto beyond = [&] {
      return std::count_if(ritz_.values.begin(), ritz_.values.end(),
                           [&](double value) { return side * value > side * bound; });
    };
    const auto before = beyond();
    Step step = take_in(&pairs.vectors[(found - pairs.values.begin()) * num_probed()]);
    if (step == Step::kDone) step = project();
    // There is one more Ritz value beyond the bound now, unless it was rounding or noise that came up.
    deceived_ = beyond() > before ? 0 : deceived_ + 1;
    return step;
  }

  // One step of the Lanczos process in the complement of the basis.
  Step probe() {
    const at::Tensor v = basis_.probe();
    at::Tensor product;
    if (const Step step = multiply(v, product); step != Step::kDone) return step;
    const auto [diagonal, off_diagonal] = basis_.advance_probe(product);
    if (!std::isfinite(diagonal) || !std::isfinite(off_diagonal)) {
      // Too large for the unit that the basis has seen reason for, if it is finite: there, that is looked
      // into.
      audited_ = false;
      return expand([&] { return basis_.propose(v, 1.0); });
    }
    alpha_.push_back(diagonal);
    beta_.push_back(off_diagonal);
    return Step::kDone;
  }

  int64_t num_probed() const { return static_cast<int64_t>(alpha_.size()); }

  // The Ritz vector with the given coefficients, for which the process runs a second time: it keeps no
  // vectors.
  Step take_in(const double* coefficients) {
    const int64_t steps = num_probed();
    basis_.restart_probe();
    for (int64_t j = 0; j < steps; ++j) {
      basis_.collect_probe(coefficients[j]);
      if (j + 1 == steps) break;
      if (const Step step = probe(); step != Step::kDone || !audited_) return step;
    }
    audited_ = false;
    best_ = std::numeric_limits<double>::infinity();
    return expand([&] { return basis_.propose(basis_.collected(), 1.0); });
  }

  // Residuals that stopped falling, at a height that the operator's own noise explains.
  bool at_noise_floor() {
    const double worst = worst_excess();
    double height = 0.0;
    for (int64_t i = 0; i < options_.count; ++i) {
      if (i < static_cast<int64_t>(residual_norms_.size()) && excess(i) > 0.0)
        height = std::max(height, residual_norms_[i]);
    }
    if (worst < 0.7 * best_) {
      best_ = worst;
      best_at_ = num_products_;
    }
    const int64_t stalled = num_products_ - best_at_;
    return stalled >= kStagnation && std::isfinite(worst) &&
           height <= kNoisePerProduct * static_cast<double>(stalled) * basis_.noise();
  }

  // What is symmetric by construction differs from that by rounding, which for the Hessian of a loss near
  // zero may be larger than the Hessian.
  void check_symmetric() const {
    const double noise = std::max(std::min(options_.tolerance, kNoise), 100.0 * std::sqrt(epsilon_));
    const double allowed = noise * scale_;
    if (op_.symmetric_by_construction() || basis_.asymmetry() <= allowed) return;
    throw std::invalid_argument(c10::str("H is not symmetric: u · H v and v · H u differ by ",
                                         basis_.asymmetry() / basis_.unit(),
                                         " for unit vectors, where |H| is about ", scale_ / basis_.unit()));
  }

  EigshResult result(std::string status) {
    const int64_t found = std::min(options_.count, basis_.size());
    find_residuals(std::vector<double>(found));
    std::vector<int64_t> order(found);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return ritz_.values[a] > ritz_.values[b]; });
    const double nan = std::numeric_limits<double>::quiet_NaN();
    EigshResult out{.values = std::vector<double>(options_.count, nan),
                    .residuals = std::vector<double>(options_.count, nan),
                    .converged = std::vector<uint8_t>(options_.count),
                    .origins = std::vector<int64_t>(options_.count, -1)};
    std::vector<double> coefficients;
    for (int64_t i = 0; i < found; ++i) {
      const int64_t pair = order[i];
      out.values[i] = ritz_.values[pair] / basis_.unit();
      out.residuals[i] = residual_norms_[pair] / basis_.unit();
      out.converged[i] = excess(pair) == 0.0 && (!options_.audit || audited_);
      const double* begin = &ritz_.vectors[pair * basis_.size()];
      coefficients.insert(coefficients.end(), begin, begin + basis_.size());
    }
    if (found > 0 && start_.defined()) follow(coefficients, out.origins);
    out.vectors = found == options_.count ? basis_.combine(coefficients)
                                          : at::zeros({options_.count, length_}, op_.options());
    if (found > 0 && found < options_.count) {
      out.vectors.narrow(0, 0, found).copy_(basis_.combine(coefficients));
    }
    out.num_products = num_products_;
    out.miss_probability = audited_ ? miss_probability_ : nan;
    out.status = std::move(status);
    return out;
  }

  // Matches the vectors with those that they started from, the largest overlap first; a match decides the
  // sign.
  void follow(std::vector<double>& coefficients, std::vector<int64_t>& origins) {
    const int64_t m = basis_.size();
    const std::vector<double>& old = start_overlaps();
    std::vector<bool> taken(start_norms_.size());
    while (true) {
      double best = kSame, overlap = 0.0;
      int64_t from = -1, to = -1;
      for (int64_t i = 0; i < start_.size(0); ++i) {
        for (int64_t j = 0; !taken[i] && (j + 1) * m <= static_cast<int64_t>(coefficients.size()); ++j) {
          if (origins[j] >= 0) continue;
          const double inner = std::inner_product(&old[i * m], &old[i * m] + m, &coefficients[j * m], 0.0);
          if (std::abs(inner) < best * start_norms_[i] || start_norms_[i] == 0.0) continue;
          best = std::abs(inner) / start_norms_[i];
          overlap = inner;
          from = i;
          to = j;
        }
      }
      if (from < 0) return;
      taken[from] = true;
      origins[to] = from;
      if (overlap < 0.0) {
        std::transform(&coefficients[to * m], &coefficients[to * m] + m, &coefficients[to * m],
                       std::negate<>());
      }
    }
  }

  SymmetricOperator& op_;
  const EigshOptions& options_;
  const at::Tensor start_;
  const int64_t length_;
  const int64_t capacity_;
  const double epsilon_;
  RitzBasis basis_;
  std::optional<at::Generator> generator_;  // made when needed: seeding takes microseconds

  std::vector<double> start_norms_;
  std::vector<double> start_overlaps_;  // with the basis as it is, or empty
  bool nothing_new_ = false;            // the last proposal held nothing that the basis lacked
  std::vector<int64_t> unseen_;         // start vectors other than 0 that were not yet looked for
  EigenPairs ritz_;                     // wanted first
  std::vector<double> residual_norms_;  // of the wanted pairs
  double largest_ = 0.0;                // max |θ| of all that was seen: a lower bound of ‖H‖
  double scale_ = 0.0;                  // the same in the basis's unit
  int64_t num_products_ = 0;
  std::vector<double> alpha_, beta_;  // the Lanczos matrix of the last audit
  bool audited_ = false;
  double miss_probability_ = 0.0;
  int deceived_ = 0;
  double best_ = std::numeric_limits<double>::infinity();
  int64_t best_at_ = 0;
};

}  // namespace

EigshResult eigsh(SymmetricOperator& op, const EigshOptions& options, const at::Tensor& start) {
  const at::NoGradGuard no_grad;
  return Solver(op, options, start).run();
}

}  // namespace dynloss
