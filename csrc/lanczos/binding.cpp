#include "binding.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "eigsh.h"
#include "fingerprint.h"
#include "graph_operator.h"
#include "operator.h"
#include "perceptron_operator.h"
#include "python_operator.h"
#include "row_algebra.h"
#include "spectrum.h"

namespace py = pybind11;

namespace dynloss {
namespace {

// Lets a Ctrl-C through. Not before every product: another thread of Python would hold each call up.
class SignalCheck {
 public:
  void operator()() {
    const auto now = std::chrono::steady_clock::now();
    if (now < next_) return;
    next_ = now + std::chrono::milliseconds(20);
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }

 private:
  std::chrono::steady_clock::time_point next_ =
      std::chrono::steady_clock::now() + std::chrono::milliseconds(20);
};

// Runs work without the GIL. An exception that Python code raised under the autograd engine arrives as
// python_error, which pybind11 does not know.
template <typename Work>
auto without_gil(Work&& work) {
  try {
    const py::gil_scoped_release release;
    return work();
  } catch (python_error& error) {
    error.restore();
    throw py::error_already_set();
  }
}

Which parse_which(const std::string& which) {
  if (which == "LA") return Which::kLargest;
  if (which == "SA") return Which::kSmallest;
  return Which::kMagnitude;
}

py::tuple run_eigsh(SymmetricOperator& op, int64_t k, const std::string& which, double tol,
                    const std::optional<at::Tensor>& v0, int64_t max_hvp, int64_t max_basis, uint64_t seed,
                    bool audit) {
  const EigshOptions options{.count = k,
                             .which = parse_which(which),
                             .tolerance = tol,
                             .max_products = max_hvp,
                             .max_basis = max_basis,
                             .seed = seed,
                             .audit = audit,
                             .poll = SignalCheck()};
  EigshResult result = without_gil([&] {
    op.check_values();
    return eigsh(op, options, v0.value_or(at::Tensor()));
  });
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor converged = at::empty({k}, at::kBool);
  std::copy(result.converged.begin(), result.converged.end(), converged.mutable_data_ptr<bool>());
  return py::make_tuple(at::tensor(result.values, at::kDouble), std::move(result.vectors),
                        at::tensor(result.residuals, at::kDouble), result.num_products, converged,
                        std::move(result.status), result.miss_probability, std::move(result.origins),
                        result.asymmetry);
}

// Members between two looks for a Ctrl-C.
constexpr int64_t kMembersAtOnce = 32;

// For every member: values, residuals, converged and, if they are wanted, vectors; and all their products.
py::tuple run_perceptron_eigenvalues(const Perceptrons& ensemble, const std::vector<bool>& wanted, int64_t k,
                                     double tol, const std::optional<at::Tensor>& start, int64_t max_hvp,
                                     int64_t max_basis, uint64_t seed, bool audit) {
  const EigshOptions options{.count = k,
                             .tolerance = tol,
                             .max_products = max_hvp,
                             .max_basis = max_basis,
                             .seed = seed,
                             .audit = audit,
                             .poll = {}};
  const auto members = static_cast<int64_t>(wanted.size());
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor values = at::full({members, k}, std::numeric_limits<double>::quiet_NaN(), at::kDouble);
  const at::Tensor residuals = values.clone(), products = at::zeros({members}, at::kLong);
  const at::Tensor converged = at::zeros({members, k}, at::kBool);
  const at::Tensor vectors =
      at::zeros({members, k, ensemble.parameters.size(1)}, ensemble.parameters.options());
  without_gil([&] {
    SignalCheck poll;
    for (int64_t begin = 0; begin < members; begin += kMembersAtOnce) {
      poll();
      const int64_t end = std::min(begin + kMembersAtOnce, members);
      const std::vector<EigshResult> results =
          perceptron_eigenvalues(ensemble, wanted, options, start.value_or(at::Tensor()), begin, end);
      for (int64_t m = begin; m < end; ++m) {
        if (!wanted[m]) continue;
        const EigshResult& result = results[m - begin];
        std::copy(result.values.begin(), result.values.end(), values.mutable_data_ptr<double>() + m * k);
        std::copy(result.residuals.begin(), result.residuals.end(),
                  residuals.mutable_data_ptr<double>() + m * k);
        std::copy(result.converged.begin(), result.converged.end(),
                  converged.mutable_data_ptr<bool>() + m * k);
        products.mutable_data_ptr<int64_t>()[m] = result.num_products;
        vectors.select(0, m).copy_(result.vectors);
      }
    }
  });
  return py::make_tuple(values, residuals, converged, products, vectors);
}

std::vector<std::tuple<std::vector<double>, std::vector<double>, double>> run_gauss_quadrature(
    SymmetricOperator& op, int64_t steps, int64_t probes, const at::Generator& generator) {
  std::vector<std::tuple<std::vector<double>, std::vector<double>, double>> out;
  without_gil([&] {
    SignalCheck poll;
    op.check_values();
    for (int64_t i = 0; i < probes && (i == 0 || std::get<2>(out.back()) == 0.0); ++i) {
      Quadrature probe = gauss_quadrature(op, random_signs(op, generator), steps, std::ref(poll));
      out.emplace_back(std::move(probe.nodes), std::move(probe.weights), probe.asymmetry);
    }
  });
  return out;
}

std::tuple<double, std::vector<double>, double> run_sample_trace(SymmetricOperator& op, int64_t range,
                                                                 int64_t samples,
                                                                 const at::Generator& generator) {
  TraceSamples result = without_gil([&] {
    op.check_values();
    return sample_trace(op, range, samples, generator, SignalCheck());
  });
  return {result.on_range, std::move(result.beside_it), result.asymmetry};
}

}  // namespace

void bind_lanczos(py::module_& module) {
  py::class_<SymmetricOperator, std::shared_ptr<SymmetricOperator>>(module, "SymmetricOperator")
      .def_property_readonly("size", &SymmetricOperator::size)
      .def_property_readonly("dimension", &SymmetricOperator::dimension)
      .def("apply", [](SymmetricOperator& op,
                       const at::Tensor& v) { return without_gil([&] { return op.apply(v); }); })
      .def("apply_noisily",
           [](SymmetricOperator& op, const at::Tensor& v) {
             return without_gil([&] { return op.apply_noisily(v); });
           })
      .def("random_signs", &random_signs, py::arg("generator"))
      .def("check_values", &SymmetricOperator::check_values)
      .def("noise", &SymmetricOperator::noise);
  py::class_<FlatParameters>(module, "FlatParameters")
      .def(py::init<std::vector<at::Tensor>, std::vector<std::string>>(), py::arg("parameters"),
           py::arg("labels"))
      .def("check_values", &FlatParameters::check_values);
  py::class_<GraphOperator, SymmetricOperator, std::shared_ptr<GraphOperator>>(module, "GraphOperator")
      .def(py::init<const std::vector<std::optional<at::Tensor>>&, FlatParameters>(), py::arg("gradients"),
           py::arg("parameters"));
  py::class_<GaussNewtonOperator, SymmetricOperator, std::shared_ptr<GaussNewtonOperator>>(
      module, "GaussNewtonOperator")
      .def(py::init<const at::Tensor&, const at::Tensor&, const at::Tensor&,
                    const std::vector<std::optional<at::Tensor>>&, FlatParameters>(),
           py::arg("outputs"), py::arg("output_gradient"), py::arg("dummy"), py::arg("pullback"),
           py::arg("parameters"));
  py::class_<PythonOperator, SymmetricOperator, std::shared_ptr<PythonOperator>>(module, "PythonOperator")
      .def(py::init<py::function, int64_t, const at::Tensor&, std::optional<py::function>,
                    std::vector<std::shared_ptr<SymmetricOperator>>, std::optional<py::function>,
                    std::optional<py::object>>(),
           py::arg("product"), py::arg("size"), py::arg("like"), py::arg("noisy") = py::none(),
           py::arg("parts") = py::tuple(), py::arg("noise") = py::none(), py::arg("shards") = py::none());
  module.def("eigsh", &run_eigsh, py::arg("op"), py::kw_only(), py::arg("k"), py::arg("which"),
             py::arg("tol"), py::arg("v0"), py::arg("max_hvp"), py::arg("max_basis"), py::arg("seed"),
             py::arg("audit"));
  py::class_<Perceptrons>(module, "Perceptrons")
      .def(py::init([](at::Tensor parameters, at::Tensor inputs, at::Tensor target, int64_t hidden,
                       int64_t activation, int64_t step, at::Tensor clock,
                       std::optional<at::Tensor> class_order, std::optional<at::Tensor> table) {
             return Perceptrons{
                 std::move(parameters), std::move(inputs),      std::move(target), hidden, activation, step,
                 std::move(clock),      std::move(class_order), std::move(table)};
           }),
           py::arg("parameters"), py::arg("inputs"), py::arg("target"), py::arg("hidden"),
           py::arg("activation"), py::arg("step"), py::arg("clock"), py::arg("class_order"),
           py::arg("table"));
  py::class_<PerceptronOperator, SymmetricOperator, std::shared_ptr<PerceptronOperator>>(module,
                                                                                         "PerceptronOperator")
      .def(py::init([](const Perceptrons& ensemble, int64_t member) {
             return PerceptronOperator(ensemble.member(member));
           }),
           py::arg("ensemble"), py::arg("member"));
  module.def("perceptron_eigenvalues", &run_perceptron_eigenvalues, py::arg("ensemble"), py::kw_only(),
             py::arg("wanted"), py::arg("k"), py::arg("tol"), py::arg("start"), py::arg("max_hvp"),
             py::arg("max_basis"), py::arg("seed"), py::arg("audit"));
  module.def("fingerprints", &fingerprints, py::arg("tensors"));
  module.def("take_device_path", &take_device_path, py::arg("on"));
  module.def("num_reads", &num_reads);
  module.def("sample_trace", &run_sample_trace, py::arg("op"), py::kw_only(), py::arg("range"),
             py::arg("samples"), py::arg("generator"));
  module.def("gauss_quadrature", &run_gauss_quadrature, py::arg("op"), py::kw_only(), py::arg("steps"),
             py::arg("probes"), py::arg("generator"));
}

}  // namespace dynloss
