// Arrays and caches as Python's objects, and whether they are those of before.
#pragma once

#include <vector>

#include "mlx/mlx.h"
#include "nanobind/nanobind.h"

namespace glm_fused {

namespace mx = mlx::core;
namespace nb = nanobind;

using ArraySequence = nb::typed<nb::sequence, mx::array>;

// Where Python keeps arrays; an array is that of before if it is the object.
class SameArray {
 public:
  explicit SameArray(nb::handle array)
      : reference_(nb::steal(PyWeakref_NewRef(array.ptr(), nullptr))) {}

  bool is(nb::handle array) const {
    return !array.is_none() && reference_().is(array);  // None: it is gone
  }

 private:
  nb::object reference_;
};

// An array of a cache, [b, 1, capacity, width]: those without width may become
// others of the same shape.
class KnownRows {
 public:
  explicit KnownRows(nb::handle array)
      : shape_(nb::cast<const mx::array&>(array).shape()), array_(array) {}

  bool is(nb::handle array) const {
    return has_width() ? array_.is(array)
                       : nb::isinstance<mx::array>(array) &&
            nb::cast<const mx::array&>(array).shape() == shape_;
  }
  bool has_width() const {
    return shape_.back() != 0;
  }

 private:
  mx::Shape shape_;
  SameArray array_;
};

// What an array is like.
struct Kind {
  mx::Shape shape;
  mx::Dtype type;

  bool is_of(nb::handle object) const {
    if (!nb::isinstance<mx::array>(object)) {
      return false;
    }
    const auto& a = nb::cast<const mx::array&>(object);
    return a.shape() == shape && a.dtype() == type && !a.is_tracer();
  }
};

// One of the caches of a layer, mlx-lm's own object.
struct Entry {
  nb::object cache, keys, values;
};

inline nb::object attribute(nb::handle object, PyObject* name) {
  PyObject* found = PyObject_GetAttr(object.ptr(), name);
  if (found == nullptr) {
    throw nb::python_error();
  }
  return nb::steal(found);
}

inline void set_attribute(nb::handle object, PyObject* name, nb::handle value) {
  if (PyObject_SetAttr(object.ptr(), name, value.ptr()) < 0) {
    throw nb::python_error();
  }
}

// The names of attributes, which are never destroyed.
struct Names {
  PyObject* caches = PyUnicode_InternFromString("caches");
  PyObject* keys = PyUnicode_InternFromString("keys");
  PyObject* values = PyUnicode_InternFromString("values");
  PyObject* offset = PyUnicode_InternFromString("offset");
  PyObject* index = PyUnicode_InternFromString("_idx");
};

inline const Names& names() {
  static const Names names;
  return names;
}

// Returns the caches of all layers. Throws nb::python_error for other objects.
inline std::vector<Entry> entries_of(nb::handle cache) {
  std::vector<Entry> entries;
  for (nb::handle layer : cache) {
    for (nb::handle each : attribute(layer, names().caches)) {
      entries.push_back(
          {nb::borrow(each),
           attribute(each, names().keys),
           attribute(each, names().values)});
    }
  }
  return entries;
}

}  // namespace glm_fused
