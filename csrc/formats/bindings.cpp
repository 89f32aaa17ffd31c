#include "formats/bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "formats/weight.h"

namespace nb = nanobind;

namespace glm_fused {

namespace {

template <class T>
using TupleOf = nb::typed<nb::tuple, T, nb::ellipsis>;

// Objects of the registry, which outlives Python's.
template <class T>
TupleOf<T> in_place(const T* first, size_t count) {
  nb::list all;
  for (size_t i = 0; i < count; i++) {
    all.append(nb::cast(first + i, nb::rv_policy::reference));
  }
  return TupleOf<T>(nb::tuple(all));
}

TupleOf<PlaneSpec> planes_of(const FormatSpec& f) {
  return in_place(f.planes.data(), f.plane_count);
}

nb::typed<nb::dict, std::string, nb::any> parameters(const FormatSpec& f) {
  nb::dict made;
  made["group_size"] = f.block;
  made["bits"] = f.bits;
  made["mode"] = f.mode;
  return nb::typed<nb::dict, std::string, nb::any>(made);
}

// Of planes of floats that are 16 bits wide.
double bits_per_weight(const FormatSpec& f) {
  double bits = 0;
  for (int p = 0; p < f.plane_count; p++) {
    const mx::Dtype narrowest = dtypes_of(f.planes[p].type).back();
    const PlaneSpec& plane = f.planes[p];
    bits += 8.0 * plane.count * narrowest.size() / (f.block * plane.rows);
  }
  return bits;
}

void bind_plane(nb::module_& m) {
  nb::class_<PlaneSpec>(m, "Plane", "One of the arrays that make a weight.")
      .def_ro("name", &PlaneSpec::name, "The last part of its tensor's name.")
      .def_prop_ro(
          "dtypes",
          [](const PlaneSpec& p) { return dtypes_of(p.type); },
          "The types that it may have; all planes of floats have the same.")
      .def_ro("count", &PlaneSpec::count, "Elements a block of columns.")
      .def_ro(
          "per_matrix",
          &PlaneSpec::per_matrix,
          "Whether it is one element a matrix, which multiplies its products.")
      .def_ro(
          "rows",
          &PlaneSpec::rows,
          "Rows of the weight that share a row of the plane.");
}

}  // namespace

void bind_formats(nb::module_& m) {
  bind_plane(m);
  nb::class_<FormatSpec>(
      m, "Format", "How the rows of a weight are stored; one of `formats()`.")
      .def_ro("name", &FormatSpec::name, "The format's name in every output.")
      .def_ro(
          "mode",
          &FormatSpec::mode,
          "MLX's quantization mode, ``dense``, or empty where MLX has none.")
      .def_ro("bits", &FormatSpec::bits, "Bits of a value; 0 for ``dense``.")
      .def_ro(
          "group_size",
          &FormatSpec::block,
          "Columns a block, which share a scale; 1 for ``dense``.")
      .def_ro(
          "is_default",
          &FormatSpec::is_default,
          "Whether it is MLX's for its mode, where only that is given.")
      .def_prop_ro("planes", &planes_of, "The arrays that make a weight.")
      .def_prop_ro(
          "bits_per_weight",
          &bits_per_weight,
          "Bits of a value with its share of the scales, floats taken as 16 "
          "bits.")
      .def_prop_ro(
          "parameters",
          &parameters,
          "Keyword arguments of ``mx.quantize`` and ``to_quantized``.")
      .def("__str__", [](const FormatSpec& f) { return f.name; })
      .def("__repr__", [](const FormatSpec& f) { return f.name; });
  m.def(
      "formats",
      [] { return in_place(formats().data(), formats().size()); },
      "Every format that the kernels take.");
}

}  // namespace glm_fused
