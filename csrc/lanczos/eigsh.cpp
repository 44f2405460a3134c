#include "eigsh.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>

#include "complement_probe.h"
#include "ritz_basis.h"
#include "row_algebra.h"
#include "small_eigen.h"
#include "start_vectors.h"
#include "symmetry.h"

namespace dynloss {
namespace {

// Ritz vectors kept at a restart beyond the wanted ones.
constexpr int64_t kExtraKept = 3;
// An audit ends when an eigenvector that it should have shown would have gone unnoticed with this
// probability, or after so many products.
constexpr double kMissProbability = 0.08;
constexpr int64_t kMaxAuditProducts = 24;
// Audits that found what turned out to be nothing, one after the other, before there are no more of them.
constexpr int kMaxDeceptions = 2;
// The noise floor: so many products without progress at least, and how far above the noise of a product a
// residual may then stand, for each of them: the longer it stands still, the less the noise has to explain.
constexpr int64_t kMinStalledProducts = 8;
constexpr double kNoisePerProduct = 0.25;
// Of a noise that the operator knows, which every residual contains, a residual in which it is half need not
// stand still.
constexpr double kKnownNoise = 2.0;
// It is good to this factor; asymmetry, which takes noise for alike in all directions, may show far more.
constexpr double kKnownWithin = 8.0;
// A residual that has not fallen below this share of the best one stands still.
constexpr double kProgress = 0.7;

// A product brings residuals down by a factor of 2 to 5: before the worst can be good, so many are made
// without a look. Two at most, or one for so many columns of the basis: a look at 64 takes as long as the
// product of a small network.
constexpr double kGainOfProduct = 3.2;
constexpr int64_t kColumnsPerProduct = 16;

// From this probability on an audit says nothing.
constexpr double kInconclusive = 0.5;

constexpr const char* kConverged = "converged";
constexpr const char* kNotAudited = "converged, not audited";
constexpr const char* kAuditInconclusive = "converged, audit inconclusive";
constexpr const char* kBudgetSpent = "max_hvp";
constexpr const char* kNoiseFloor = "noise floor";
constexpr const char* kNotFinite = "non-finite product";
constexpr const char* kNotSymmetric = "not symmetric";

// Ends a search from anywhere in it: what it has found until then is its result.
struct Stop {
  const char* status;
};

class Solver {
 public:
  Solver(SymmetricOperator& op, const EigshOptions& options, const at::Tensor& start)
      : op_(op),
        options_(options),
        dimension_(op.dimension()),
        capacity_(std::min(options.max_basis, dimension_)),
        epsilon_(rounding_of(op.options())),
        basis_(capacity_, op),
        start_(start),
        symmetry_(op, options.tolerance) {}

  EigshResult run() {
    std::string status;
    try {
      status = solve();
    } catch (const Stop& stop) {
      // A product that was taken in blindly may yet turn out not to be finite.
      status = basis_.settle() ? stop.status : kNotFinite;
      project();
      audited_ = false;
    }
    return result(std::move(status));
  }

 private:
  std::string solve() {
    begin();
    while (true) {
      if (basis_.size() < options_.count) {
        expand_krylov();
        continue;
      }
      project();
      check_symmetric();
      if (basis_.size() < options_.count) continue;
      if (!all_converged() && !at_noise_floor()) {
        const int64_t count = products_before_a_look();
        expand_by_residual();
        // In a Krylov space the last product is the direction of every residual.
        for (int64_t i = 1; i < count && basis_.size() < capacity_; ++i) expand_krylov();
      } else if (const std::optional<int64_t> lost = start_.lost(basis_)) {
        expand([&] { return basis_.propose(start_.row(*lost), start_.length(*lost)); });
      } else if (options_.audit && !audited_) {
        audit();
      } else {
        if (!all_converged()) return kNoiseFloor;
        if (!options_.audit) return kNotAudited;
        return miss_probability_ < kInconclusive ? kConverged : kAuditInconclusive;
      }
    }
  }

  // The Krylov space of one vector made of all the old ones: every product then works for every wanted pair,
  // where a block would spend as many as it has vectors on each power of H.
  void begin() {
    const at::Tensor sum = start_.sum();
    const at::Tensor x = sum.defined() ? sum : random_vector();
    expand([&] { return basis_.propose(x, 0.0); });
    settle();  // this product says in what unit to go on
  }

  at::Tensor multiply(const at::Tensor& v, bool noisily = false) {
    if (num_products_ >= options_.max_products) throw Stop{kBudgetSpent};
    if (options_.poll) options_.poll();
    ++num_products_;
    return noisily ? op_.apply_noisily(v) : op_.apply(v);
  }

  // One product with what is new in a proposal; with a random direction where nothing is.
  template <typename Propose>
  void expand(Propose propose) {
    make_room(1);
    for (bool proposed = propose(); !proposed;) {
      proposed = basis_.propose(random_vector(), std::sqrt(static_cast<double>(dimension_)));
    }
    basis_.accept(multiply(basis_.candidate()));
    start_.forget_overlaps();
    if (!basis_.can_wait()) settle();
  }

  void expand_krylov() {
    expand([&] { return basis_.propose_product(); });
  }

  // Asks the basis what it has found: once for a decision.
  void settle() {
    if (!basis_.settle()) throw Stop{kNotFinite};
  }

  void make_room(int64_t columns) {
    if (basis_.size() + columns <= capacity_) return;
    project();
    const int64_t keep = std::min({options_.count + kExtraKept, basis_.size(), capacity_ - columns});
    ritz_.values.resize(keep);
    basis_.restart(leading(keep));
    start_.forget_overlaps();
    ritz_.vectors.assign(keep * keep, 0.0);  // the basis is of these vectors now
    for (int64_t i = 0; i < keep; ++i) ritz_.vectors[i * keep + i] = 1.0;
  }

  // Rayleigh-Ritz: the pairs of the projected problem, wanted first.
  void project() {
    settle();
    const int64_t m = basis_.size();
    if (m == 0) return;
    const EigenPairs pairs = symmetric_eigen(basis_.projection(), m, m);
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

    // Of the products that were made; within their span nothing is left of an error that is symmetric.
    const double unseen = known_noise();
    residual_norms_.clear();
    for (int64_t i = 0; i < std::min(options_.count, m); ++i) {
      residual_norms_.push_back(basis_.residual_norm(&ritz_.vectors[i * m], ritz_.values[i]) + unseen);
    }
  }

  // What the operator knows of the length of a product's noise, and what is known of it in all.
  double known_noise() const { return op_.noise() * basis_.unit(); }
  double noise() const {
    const double seen = basis_.noise(), known = known_noise();
    return known == 0.0 ? seen : std::clamp(seen, known, kKnownWithin * known);
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

  int64_t products_before_a_look() const {
    const int64_t most = std::max<int64_t>(2, basis_.size() / kColumnsPerProduct);
    const double needed = std::log(worst_excess()) / std::log(kGainOfProduct);
    return needed < static_cast<double>(most) ? std::max<int64_t>(1, static_cast<int64_t>(needed)) : most;
  }

  // One product along the worst wanted residual.
  void expand_by_residual() {
    make_room(1);
    int64_t worst = 0;
    for (int64_t i = 1; i < std::min(options_.count, basis_.size()); ++i) {
      if (excess(i) > excess(worst)) worst = i;
    }
    expand([&] {
      return basis_.propose_residual(&ritz_.vectors[worst * basis_.size()], residual_norms_[worst]);
    });
  }

  at::Tensor random_vector() {
    if (!generator_) generator_ = at::detail::createCPUGenerator(options_.seed);
    return random_normal(op_, *generator_);
  }

  // A Krylov space cannot see a second eigenvector of the same eigenvalue, nor one that its start is
  // orthogonal to.
  void audit() {
    audited_ = true;
    miss_probability_ = deceived_ < kMaxDeceptions ? 0.0 : 1.0;
    if (deceived_ >= kMaxDeceptions) return;
    if (capacity_ < dimension_) make_room(ComplementProbe::kColumns);
    const double last = ritz_.values[options_.count - 1];
    const double edge = options_.which == Which::kMagnitude ? std::abs(last) : last;
    // What lies beyond by less cannot be told from the last wanted value.
    const double beyond_noise = 3.0 * noise() / std::sqrt(static_cast<double>(dimension_));
    const double margin = std::max({limit(last), residual_norms_[options_.count - 1], beyond_noise});
    if (options_.which != Which::kSmallest) search_beyond(edge + margin, 1.0);
    if (options_.which != Which::kLargest && audited_) {
      const double lower = options_.which == Which::kMagnitude ? -edge : edge;
      search_beyond(lower - margin, -1.0);
    }
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
  void search_beyond(double bound, double side) {
    const int64_t m = basis_.size(), complement = dimension_ - m;
    if (complement == 0) return;
    const int64_t count = basis_.directions().count();
    std::vector<double> coupling(count * count);  // R (μ - t)⁻¹ Rᵀ in the directions of the residuals
    for (int64_t i = options_.count; i < m; ++i) {
      const std::vector<double> r = basis_.beside(&ritz_.vectors[i * m]);
      const double distance = bound - ritz_.values[i];
      for (int64_t j = 0; j < count * count && distance != 0.0; ++j) {
        coupling[j] += r[j / count] * r[j % count] / distance;
      }
    }
    probe_.start(random_vector(), std::move(coupling));
    double missed;
    do {
      if (!advance_probe()) return;
      if (probe_.steps() == 1) check_symmetric_beside();
      // Where the space of the vector ends, all that it has a component of is known, also next to the bound.
      const bool ended = probe_.off_diagonal().back() == 0.0;
      const double hidden =
          ended ? 0.0 : shifted_minres_residual(probe_.diagonal(), probe_.off_diagonal(), bound);
      missed = std::erf(hidden * std::sqrt(0.5 * static_cast<double>(complement)));
    } while (missed >= kMissProbability && probe_.steps() < std::min(kMaxAuditProducts, complement));
    miss_probability_ = std::max(miss_probability_, missed);
    const int64_t steps = probe_.steps();
    const EigenPairs pairs = tridiagonal_eigen(probe_.diagonal(), probe_.off_diagonal(), steps);
    const auto found = std::max_element(pairs.values.begin(), pairs.values.end(),
                                        [&](double a, double b) { return side * a < side * b; });
    if (side * *found <= side * bound) return;
    const auto beyond = [&] {
      return std::count_if(ritz_.values.begin(), ritz_.values.end(),
                           [&](double value) { return side * value > side * bound; });
    };
    const auto before = beyond();
    take_in(&pairs.vectors[(found - pairs.values.begin()) * steps], steps);
    project();
    // There is one more Ritz value beyond the bound now, unless it was rounding or noise that came up.
    deceived_ = beyond() > before ? 0 : deceived_ + 1;
  }

  // One step of the Lanczos process in the complement of the basis; false where that ends the audit.
  bool advance_probe() {
    const at::Tensor v = probe_.vector();
    if (probe_.advance(multiply(v))) return true;
    // Too large for the unit that the basis has seen reason for, if it is finite: the basis looks into that.
    audited_ = false;
    expand([&] { return basis_.propose(v, 1.0); });
    return false;
  }

  // The Ritz vector with the given coefficients, for which the process runs a second time where it was too
  // long for the basis to keep all vectors.
  void take_in(const double* coefficients, int64_t steps) {
    const bool again = !probe_.keeps_all();
    if (again) probe_.restart();
    for (int64_t j = 0; j < steps; ++j) {
      probe_.collect(j, coefficients[j]);
      if (again && j + 1 < steps && !advance_probe()) return;
    }
    audited_ = false;
    best_ = std::numeric_limits<double>::infinity();
    expand([&] { return basis_.propose(probe_.collected(), 1.0); });
  }

  // Residuals that stopped falling, at a height that the operator's own noise explains.
  bool at_noise_floor() {
    const double worst = worst_excess();
    double height = 0.0;
    for (int64_t i = 0; i < options_.count; ++i) {
      if (i < static_cast<int64_t>(residual_norms_.size()) && excess(i) > 0.0)
        height = std::max(height, residual_norms_[i]);
    }
    if (worst < kProgress * best_) {
      best_ = worst;
      best_at_ = num_products_;
    }
    if (!std::isfinite(worst)) return false;
    if (height <= kKnownNoise * known_noise()) return true;
    const int64_t stalled = num_products_ - best_at_;
    return stalled >= kMinStalledProducts &&
           height <= kNoisePerProduct * static_cast<double>(stalled) * noise();
  }

  // Before the basis forgets what it knows, and as soon as it does: the budget may be large.
  void check_symmetric() {
    check_symmetric(basis_.asymmetry(), scale_, {basis_.vectors(), basis_.projection(), basis_.unit()});
  }

  // A basis of old eigenvectors of H alone knows nothing of what Hᵀ makes of them. A random unit vector
  // beside it does, which has about 1 / √P of anything.
  void check_symmetric_beside() {
    const std::vector<double> projection = probe_.projection_with_start();
    const int64_t m = basis_.size();
    double asymmetry = 0.0;
    for (int64_t i = 0; i < m; ++i) {
      asymmetry = std::max(asymmetry, std::abs(projection[i * (m + 1) + m] - projection[m * (m + 1) + i]));
    }
    check_symmetric(asymmetry, scale_ / std::sqrt(static_cast<double>(dimension_)),
                    {basis_.vectors(), projection, basis_.unit(), probe_.first()});
  }

  void check_symmetric(double asymmetry, double norm, const Projection& seen) {
    const int64_t before = num_products_;
    const auto multiply_noisily = [this](const at::Tensor& v) { return multiply(v, /*noisily=*/true); };
    if (symmetry_.fails(asymmetry, norm, seen, multiply_noisily)) {
      asymmetry_ = asymmetry / scale_;
      throw Stop{kNotSymmetric};
    }
    best_at_ += num_products_ - before;
  }

  EigshResult result(std::string status) {
    const int64_t found = std::min(options_.count, basis_.size());
    std::vector<int64_t> order(found);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return ritz_.values[a] > ritz_.values[b]; });
    const double nan = std::numeric_limits<double>::quiet_NaN();
    EigshResult out{.values = std::vector<double>(options_.count, nan),
                    .residuals = std::vector<double>(options_.count, nan),
                    .converged = std::vector<uint8_t>(options_.count)};
    std::vector<double> coefficients;
    for (int64_t i = 0; i < found; ++i) {
      const int64_t pair = order[i];
      out.values[i] = ritz_.values[pair] / basis_.unit();
      out.residuals[i] = residual_norms_[pair] / basis_.unit();
      out.converged[i] = excess(pair) == 0.0 && (!options_.audit || audited_) && status != kNotSymmetric;
      const double* begin = &ritz_.vectors[pair * basis_.size()];
      coefficients.insert(coefficients.end(), begin, begin + basis_.size());
    }
    if (found > 0) out.origins = start_.follow(basis_, coefficients);
    out.origins.resize(options_.count, -1);
    out.vectors = found == options_.count ? basis_.combine(coefficients)
                                          : at::zeros({options_.count, op_.size()}, op_.options());
    if (found > 0 && found < options_.count) {
      out.vectors.narrow(0, 0, found).copy_(basis_.combine(coefficients));
    }
    out.num_products = num_products_;
    out.miss_probability = audited_ ? miss_probability_ : nan;
    if (status == kNotSymmetric) out.asymmetry = asymmetry_;
    out.status = std::move(status);
    return out;
  }

  SymmetricOperator& op_;
  const EigshOptions& options_;
  const int64_t dimension_;
  const int64_t capacity_;
  const double epsilon_;
  RitzBasis basis_;
  StartVectors start_;
  SymmetryCheck symmetry_;
  ComplementProbe probe_{basis_};
  std::optional<at::Generator> generator_;  // made when needed: seeding takes microseconds

  EigenPairs ritz_;                     // wanted first
  std::vector<double> residual_norms_;  // of the wanted pairs
  double largest_ = 0.0;                // max |θ| of all that was seen: a lower bound of ‖H‖
  double scale_ = 0.0;                  // the same in the basis's unit
  int64_t num_products_ = 0;
  bool audited_ = false;
  double miss_probability_ = 0.0;
  int deceived_ = 0;
  double best_ = std::numeric_limits<double>::infinity();
  int64_t best_at_ = 0;
  double asymmetry_ = 0.0;  // that ended the search, in units of ‖H‖
};

}  // namespace

EigshResult eigsh(SymmetricOperator& op, const EigshOptions& options, const at::Tensor& start) {
  const at::NoGradGuard no_grad;
  const OnShards on_shards(op.shards());
  return Solver(op, options, start).run();
}

}  // namespace dynloss
