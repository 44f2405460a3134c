// torch.ops takes some microseconds to match arguments with a schema, as long as a small loss itself takes.
// These two functions call the dispatcher directly, with the arguments of the Python functions of the same
// purpose. Whatever is not plain (a subclass, a mode, an argument of another type or out of range) is
// answered with NotImplemented, before anything has been done, and left to dynloss_ext/loss.py and torch.ops.
#include "eager.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <cstring>
#include <optional>
#include <tuple>

#include "arguments.h"
#include "ops.h"

namespace dynloss {

namespace {

using at::Tensor;

// Whether an object is this word; no error is set for other types.
bool is_word(PyObject* object, const char* word) {
  return PyUnicode_CheckExact(object) && PyUnicode_CompareWithASCIIString(object, word) == 0;
}

std::optional<int64_t> plain_int(PyObject* object) {
  if (!PyLong_CheckExact(object)) return std::nullopt;
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0 ? std::optional(value) : std::nullopt;
}

std::optional<Tensor> tensor_or_none(PyObject* object) {
  return object == Py_None ? std::nullopt : std::optional(THPVariable_Unpack(object));
}

// The arguments of the ops; `plain` tells whether they could be read.
struct Arguments {
  bool plain = false;
  Tensor logits, target, clock;
  c10::SymInt step = 0, ignore_index = 0;
  int64_t reduction = 0;
  std::optional<Tensor> step_tensor, class_order, table, weight;
  bool by_weights = false;
  double label_smoothing = 0;

  Arguments(PyObject* const* args, Py_ssize_t count) {
    if (count != 9 || at::impl::torch_function_mode_enabled()) return;
    plain = read_tensors(args[0], args[1]) && read_oscillation(args[2]) && read_step(args[3]) &&
            read_weight(args[4]) && read_options(args[5], args[6], args[7], args[8]);
  }

  ForwardArguments unpacked() const {
    return {logits, target, step,      step_tensor, clock,        class_order,
            table,  weight, reduction, by_weights,  ignore_index, label_smoothing};
  }

 private:
  bool read_tensors(PyObject* logits_object, PyObject* target_object) {
    if (!THPVariable_CheckExact(logits_object) || !THPVariable_CheckExact(target_object)) return false;
    logits = THPVariable_Unpack(logits_object);
    target = THPVariable_Unpack(target_object);
    return true;
  }

  // Oscillation._plain: (C, {device: (clock, class_order, table)}), or None for one that calls Python.
  bool read_oscillation(PyObject* description) {
    if (!PyTuple_CheckExact(description)) return false;
    THPObjectPtr device(THPDevice_New(logits.device()));
    PyObject* placed = PyDict_GetItemWithError(PyTuple_GET_ITEM(description, 1), device.get());
    if (placed == nullptr) return false;
    clock = THPVariable_Unpack(PyTuple_GET_ITEM(placed, 0));
    class_order = tensor_or_none(PyTuple_GET_ITEM(placed, 1));
    table = tensor_or_none(PyTuple_GET_ITEM(placed, 2));
    const int64_t dim = class_dim(logits.dim(), is_ensemble(clock));
    const auto classes = plain_int(PyTuple_GET_ITEM(description, 0));
    return logits.dim() > dim && classes && logits.sym_size(dim) == *classes;
  }

  bool read_step(PyObject* object) {
    if (THPVariable_CheckExact(object)) {
      step_tensor = THPVariable_Unpack(object);
      return true;
    }
    const auto value = plain_int(object);
    step = value.value_or(0);
    return value.has_value();
  }

  bool read_weight(PyObject* object) {
    if (object != Py_None && !THPVariable_CheckExact(object)) return false;
    weight = tensor_or_none(object);
    return true;
  }

  bool read_options(PyObject* reduction_object, PyObject* normalization, PyObject* ignore_object,
                    PyObject* smoothing) {
    if (is_word(reduction_object, "mean"))
      reduction = reduction_mean;
    else if (is_word(reduction_object, "sum"))
      reduction = reduction_sum;
    else if (is_word(reduction_object, "none"))
      reduction = reduction_none;
    else
      return false;
    by_weights = is_word(normalization, "weights");
    if (!by_weights && !is_word(normalization, "samples")) return false;
    const auto ignored = plain_int(ignore_object);
    ignore_index = ignored.value_or(0);
    if (!ignored || !PyFloat_CheckExact(smoothing)) return false;
    label_smoothing = PyFloat_AS_DOUBLE(smoothing);
    return label_smoothing >= 0 && label_smoothing <= 1;
  }
};

PyObject* not_implemented() {
  Py_INCREF(Py_NotImplemented);
  return Py_NotImplemented;
}

PyObject* cross_entropy(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const Arguments x(args, count);
  if (!x.plain) return not_implemented();
  Tensor loss;
  {
    const pybind11::gil_scoped_release no_gil;
    loss = std::get<0>(ops::cross_entropy(x.unpacked()));
  }
  return THPVariable_Wrap(std::move(loss));
  END_HANDLE_TH_ERRORS
}

PyObject* cross_entropy_with_gradient(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const Arguments x(args, count);
  if (!x.plain) return not_implemented();
  Tensor loss, gradient;
  {
    const pybind11::gil_scoped_release no_gil;
    auto results = ops::cross_entropy_with_gradient(x.unpacked(), /*finished=*/true);
    loss = std::get<0>(std::move(results));
    gradient = std::get<1>(std::move(results));
  }
  THPObjectPtr pair(PyTuple_New(2));
  if (!pair) return nullptr;
  PyTuple_SET_ITEM(pair.get(), 0, THPVariable_Wrap(std::move(loss)));
  PyTuple_SET_ITEM(pair.get(), 1, THPVariable_Wrap(std::move(gradient)));
  return pair.release();
  END_HANDLE_TH_ERRORS
}

template <auto function>
PyCFunction as_method() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"cross_entropy", as_method<&cross_entropy>(), METH_FASTCALL,
     "The loss of a plain eager call, or NotImplemented."},
    {"cross_entropy_with_gradient", as_method<&cross_entropy_with_gradient>(), METH_FASTCALL,
     "(loss, gradient) of a plain eager call, or NotImplemented."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_eager(pybind11::module_& module) {
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace dynloss
