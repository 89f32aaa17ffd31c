#include <optional>
#include <stdexcept>
#include <utility>

#include "mlx/mlx.h"
#include "nanobind/stl/optional.h"
#include "nanobind/stl/pair.h"
#include "ops/bindings.h"
#include "ops/decode_step.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace glm_fused {

namespace {

using ObjectList = nb::typed<nb::list, nb::object>;
using ListList = nb::typed<nb::list, ObjectList>;
using ArraySequence = nb::typed<nb::sequence, mx::array>;

Arrays arrays(const ArraySequence& sequence) {
  Arrays all;
  for (nb::handle a : sequence) {
    all.push_back(nb::cast<const mx::array&>(a));
  }
  return all;
}

// Whether a container, a dict or a list, has just these items, in their order:
// of a dict, key and value in turn.
bool has_items(PyObject* container, PyObject* items) {
  const Py_ssize_t count = PyList_Size(items);
  Py_ssize_t seen = 0;
  const auto is_next = [&](PyObject* item) {
    return seen < count && PyList_GetItem(items, seen++) == item;
  };
  if (PyDict_Check(container)) {
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(container, &at, &key, &value);) {
      if (!is_next(key) || !is_next(value)) {
        return false;
      }
    }
  } else if (PyList_Check(container)) {
    for (Py_ssize_t i = 0; i < PyList_Size(container); i++) {
      if (!is_next(PyList_GetItem(container, i))) {
        return false;
      }
    }
  }
  return seen == count;
}

// Whether containers[i] has the items of the list items[i], for all i.
bool same_items(const ObjectList& containers, const ListList& items) {
  const size_t count = containers.size();
  if (items.size() != count) {
    throw std::invalid_argument(
        "[same_items] expected lists of the same length.");
  }
  for (size_t i = 0; i < count; i++) {
    if (!has_items(containers[i].ptr(), items[i].ptr())) {
      return false;
    }
  }
  return true;
}

// What arrays are: an operator that works in place gives an array's object
// another value.
class ArrayValues {
 public:
  explicit ArrayValues(const ArraySequence& all) : values_(arrays(all)) {}

  bool are_of(const nb::typed<nb::list, mx::array>& all) const {
    if (all.size() != values_.size()) {
      return false;
    }
    for (size_t i = 0; i < values_.size(); i++) {
      if (nb::cast<const mx::array&>(all[i]).id() != values_[i].id()) {
        return false;
      }
    }
    return true;
  }

 private:
  const Arrays values_;  // held, so that no other may have its id
};

}  // namespace

void bind_decode_step(nb::module_& m) {
  m.def(
      "same_items",
      &same_items,
      "containers"_a,
      "items"_a,
      "Whether containers[i], a dict or a list, has just items[i], in "
      "order.\n\n"
      "Of a dict that is keys and values in turn.");
  nb::class_<ArrayValues>(
      m, "ArrayValues", "What arrays are, whatever their objects become.")
      .def(nb::init<const ArraySequence&>(), "arrays"_a)
      .def(
          "are_of",
          &ArrayValues::are_of,
          "arrays"_a,
          "Whether the same objects, in their order, still are these.");
  nb::class_<LateCheck>(
      m, "LateCheck", "A check of tokens that MLX computes already.");
  nb::class_<DecodeStep>(
      m, "DecodeStep", "A recorded decode step: see models.decode_step.")
      .def(
          "__init__",
          [](DecodeStep* self,
             const ArraySequence& inputs,
             const ArraySequence& caches,
             const ArraySequence& outputs,
             const ArraySequence& appended) {
            new (self) DecodeStep(
                arrays(inputs),
                arrays(caches),
                arrays(outputs),
                arrays(appended),
                mx::default_stream(mx::Device::cpu));
          },
          "inputs"_a,
          "caches"_a,
          "outputs"_a,
          "appended"_a,
          "Take how `outputs`, logits first, and `appended` were made of the "
          "others.")
      .def_static(
          "takes",
          [](const ArraySequence& all) {
            return DecodeStep::takes(arrays(all));
          },
          "arrays"_a,
          "Whether no transformation of a function traces the arrays.")
      .def_static(
          "run_seconds",
          &DecodeStep::run_seconds,
          "How long all steps of this process have run their kernels.");
  m.def(
      "tokens_of_step",
      [](const mx::array& tokens, int vocabulary) {
        const TokensOfStep of = tokens_of_step(
            tokens, vocabulary, mx::default_stream(mx::Device::cpu));
        return std::pair(of.tokens, of.late);
      },
      "tokens"_a,
      "vocabulary"_a,
      "Tokens that a step takes, int32 or uint32, and what it has to check.\n\n"
      "Those that are not being computed are checked as `check_tokens` does.");
}

}  // namespace glm_fused
