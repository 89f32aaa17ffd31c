#include "ops/bindings.h"

#include <stdexcept>

#include "mlx/mlx.h"
#include "ops/decode_step.h"
#include "taken_rows.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace glm_fused {

namespace {

using ObjectList = nb::typed<nb::list, nb::object>;
using ArraySequence = nb::typed<nb::sequence, mx::array>;

Arrays arrays(const ArraySequence& sequence) {
  Arrays all;
  for (nb::handle a : sequence) {
    all.push_back(nb::cast<const mx::array&>(a));
  }
  return all;
}

// Whether containers[i][keys[i]] is values[i] for all i, of dicts and lists.
bool same_items(
    const ObjectList& containers,
    const ObjectList& keys,
    const ObjectList& values) {
  const size_t count = containers.size();
  if (keys.size() != count || values.size() != count) {
    throw std::invalid_argument(
        "[same_items] expected lists of the same length.");
  }
  for (size_t i = 0; i < count; i++) {
    PyObject* container = containers[i].ptr();
    PyObject* key = keys[i].ptr();
    PyObject* found = nullptr;
    if (PyDict_Check(container)) {
      found = PyDict_GetItemWithError(container, key);
    } else if (PyList_Check(container)) {
      const Py_ssize_t at = PyLong_AsSsize_t(key);
      if (at >= 0 && at < PyList_Size(container)) {
        found = PyList_GetItem(container, at);
      }
    }
    if (PyErr_Occurred()) {
      throw nb::python_error();
    }
    if (found != values[i].ptr()) {
      return false;
    }
  }
  return true;
}

}  // namespace

void bind_decode_step(nb::module_& m) {
  m.def(
      "same_items",
      &same_items,
      "containers"_a,
      "keys"_a,
      "values"_a,
      "Whether containers[i][keys[i]] is values[i] for all i; containers are "
      "dicts and lists.");
  nb::class_<DecodeStep>(
      m, "DecodeStep", "A recorded decode step: see models.decode_step.")
      .def(
          "__init__",
          [](DecodeStep* self,
             const ArraySequence& inputs,
             const ArraySequence& caches,
             const mx::array& logits,
             const ArraySequence& appended) {
            new (self) DecodeStep(
                arrays(inputs),
                arrays(caches),
                logits,
                arrays(appended),
                mx::default_stream(mx::Device::cpu));
          },
          "inputs"_a,
          "caches"_a,
          "logits"_a,
          "appended"_a,
          "Take how `logits` and `appended` were made of the others.")
      .def_static(
          "takes",
          [](const ArraySequence& all) {
            return DecodeStep::takes(arrays(all));
          },
          "arrays"_a,
          "Whether no transformation of a function traces the arrays.")
      .def(
          "__call__",
          [](const DecodeStep& self,
             const ArraySequence& inputs,
             const ArraySequence& caches,
             int at) {
            // Before the graph holds them, too.
            for (nb::handle cache : caches) {
              take_own_rows(nb::cast<const mx::array&>(cache), at);
            }
            Arrays grown = arrays(caches);
            mx::array logits = self(arrays(inputs), grown, at);
            for (size_t i = 0; i < grown.size(); i++) {
              nb::cast<mx::array&>(caches[i]).overwrite_descriptor(grown[i]);
            }
            return logits;
          },
          "inputs"_a,
          "caches"_a,
          "at"_a,
          "The logits; the caches then hold the new rows, from row `at` on.");
}

}  // namespace glm_fused
