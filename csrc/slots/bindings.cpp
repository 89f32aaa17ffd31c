#include "slots/bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "slots/checksum.h"
#include "slots/ops.h"
#include "slots/simulate.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace glm_fused::slots {

namespace {

std::shared_ptr<SlotBank> make_bank(
    std::shared_ptr<Reader> reader,
    std::shared_ptr<Files> files,
    int layer,
    const std::vector<std::pair<std::vector<int>, mx::Dtype>>& parts,
    const std::vector<std::pair<int, int64_t>>& locations,
    const std::vector<uint64_t>& checksums,
    int slots,
    int spares,
    const std::string& policy,
    const std::vector<int>& pinned,
    double patience) {
  std::vector<PartType> types;
  for (const auto& [shape, dtype] : parts) {
    types.push_back({mx::Shape(shape.begin(), shape.end()), dtype});
  }
  BankOptions options;
  options.layer = layer;
  options.files = std::move(files);
  for (const auto& [file, offset] : locations) {
    options.locations.push_back({file, offset});
  }
  options.checksums = checksums;
  options.patience =
      std::chrono::milliseconds(static_cast<int64_t>(1000 * patience));
  return std::make_shared<SlotBank>(
      std::move(reader),
      std::move(options),
      types,
      slots,
      spares,
      policy,
      pinned);
}

nb::dict describe(const BankStats& s) {
  nb::dict d;
  d["hits"] = s.hits;
  d["misses"] = s.misses;
  d["bytes"] = s.bytes;
  d["wait_us"] = s.wait_us;
  d["prefetches"] = s.prefetches;
  return d;
}

nb::list take_requests(SlotBank& bank) {
  nb::list list;
  for (const Request& r : bank.bank().take_requests()) {
    nb::dict d;
    d["token"] = r.first_token;
    d["experts"] = nb::cast(r.experts);
    d["top_k"] = r.top_k;
    d["hits"] = r.hits;
    d["misses"] = r.misses;
    d["bytes"] = r.bytes;
    d["wait_us"] = r.wait_us;
    list.append(d);
  }
  return list;
}

void bind_bank(nb::module_& m) {
  nb::class_<SlotBank>(m, "SlotBank", "Resident experts of one layer.")
      .def_prop_ro(
          "arrays",
          [](const SlotBank& b) { return b.arrays(); },
          "[slots, ...] for each part of an expert.")
      .def_prop_ro(
          "capacity",
          [](SlotBank& b) { return b.bank().capacity(); },
          "The most experts that a request may name.")
      .def(
          "resident",
          [](SlotBank& b) { return b.bank().resident(); },
          "The experts in slots now.")
      .def(
          "stats",
          [](SlotBank& b) { return describe(b.bank().stats()); },
          nb::sig("def stats(self) -> dict[str, int]"),
          "Counts since the bank was made.")
      .def(
          "take_requests",
          &take_requests,
          nb::sig("def take_requests(self) -> list[dict[str, object]]"),
          "The requests since the last call; the first call starts recording.");
  m.def(
      "slot_bank",
      &make_bank,
      "reader"_a,
      "files"_a,
      "layer"_a,
      "parts"_a,
      "locations"_a,
      "checksums"_a,
      "slots"_a,
      "spares"_a,
      "policy"_a,
      "pinned"_a,
      "patience"_a);
  m.def("slots_resolve", &resolve, "bank"_a, "experts"_a);
  m.def("slots_wait", &wait, "bank"_a, "slots"_a, "after"_a.none());
  m.def("slots_release", &release, "bank"_a, "y"_a, "slots"_a);
  m.def("slots_prefetch", &prefetch, "bank"_a, "experts"_a, "x"_a);
}

}  // namespace

void bind(nb::module_& m) {
  nb::class_<Files>(m, "SlotFiles", "Open files that experts are read from.")
      .def(
          nb::init<
              const std::vector<std::string>&,
              const std::vector<int64_t>&,
              bool>(),
          "paths"_a,
          "sizes"_a,
          "direct"_a);
  nb::class_<Reader>(m, "SlotReader", "A pool of positional reads.")
      .def(nb::init<int, int64_t>(), "depth"_a, "split"_a);
  bind_bank(m);
  m.def(
      "checksum",
      [](const std::vector<nb::bytes>& parts) {
        Checksum sum;
        for (const nb::bytes& part : parts) {
          sum.add(static_cast<const std::byte*>(part.data()), part.size());
        }
        return sum.value();
      },
      "parts"_a,
      "The checksum of an expert's tensors, as a bank compares it.");
  m.def(
      "slots_simulate",
      &simulate,
      "policy"_a,
      "experts"_a,
      "slots"_a,
      "pinned"_a,
      "requests"_a,
      "(hits, misses) of one layer's requests.");
  m.def(
      "slots_simulate_optimum",
      &simulate_optimum,
      "experts"_a,
      "slots"_a,
      "requests"_a,
      "(hits, misses) of Belady's optimum.");
}

}  // namespace glm_fused::slots
