#include "slots/bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "slots/checksum.h"
#include "slots/ops.h"
#include "slots/simulate.h"
#include "slots/use.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace glm_fused::slots {

namespace {

using FilesHandle = Handle<Files>;
using ReaderHandle = Handle<Reader>;
using ReadsHandle = Handle<Reads>;

BankHandle make_bank(
    const ReaderHandle& reader,
    const FilesHandle& files,
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
  options.files = files.value;
  for (const auto& [file, offset] : locations) {
    options.locations.push_back({file, offset});
  }
  options.checksums = checksums;
  options.patience =
      std::chrono::milliseconds(static_cast<int64_t>(1000 * patience));
  return {std::make_shared<SlotBank>(
      reader.value, std::move(options), types, slots, spares, policy, pinned)};
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

nb::list take_requests(const BankHandle& bank) {
  nb::list list;
  for (const Request& r : bank.value->bank()->take_requests()) {
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
  nb::class_<BankHandle>(m, "SlotBank", "Resident experts of one layer.")
      .def_prop_ro(
          "arrays",
          [](const BankHandle& b) { return b.value->arrays(); },
          "[slots, ...] for each part of an expert.")
      .def_prop_ro(
          "capacity",
          [](const BankHandle& b) { return b.value->bank()->capacity(); },
          "The most experts that a request may name.")
      .def(
          "resident",
          [](const BankHandle& b) { return b.value->bank()->resident(); },
          "The experts in slots now.")
      .def(
          "stats",
          [](const BankHandle& b) { return describe(b.value->bank()->stats()); },
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
  m.def(
      "slots_prefetch",
      [](const BankHandle& bank, const mx::array& experts, const mx::array& x) {
        return prefetch(bank.value, experts, x);
      },
      "bank"_a,
      "experts"_a,
      "x"_a,
      "`x`; starts to read experts into spare slots.");
}

void bind_use(nb::module_& m) {
  nb::class_<ReadsHandle>(
      m,
      "SlotReads",
      "Whether all experts could be read for what a cache holds.")
      .def(
          "__init__",
          [](ReadsHandle* self) {
            new (self) ReadsHandle{std::make_shared<Reads>()};
          })
      .def_prop_ro(
          "error",
          [](const ReadsHandle& r) { return r.value->error(); },
          "Of the first read that failed, or empty.")
      .def(
          "__deepcopy__",
          [](const ReadsHandle& r, const nb::object&) {
            return ReadsHandle{std::make_shared<Reads>(r.value)};
          },
          "memo"_a,
          "Of a copy of the cache: what failed for this one failed for it.");
  nb::class_<UseHandle>(
      m, "SlotUse", "One use of a bank in the graph that is being built.")
      .def(
          "__init__",
          [](UseHandle* self,
             const BankHandle& bank,
             const ReadsHandle& reads) {
            new (self)
                UseHandle{std::make_shared<SlotUse>(bank.value, reads.value)};
          },
          "bank"_a,
          "reads"_a)
      .def(
          "resolve",
          [](const UseHandle& use, const mx::array& experts) {
            return use.value->resolve(experts);
          },
          "experts"_a,
          "Slots of experts int32 [tokens, top_k], whose reads may go on, and "
          "an array to come after.")
      .def(
          "wait",
          [](const UseHandle& use, const mx::array& slots) {
            return use.value->wait(slots);
          },
          "slots"_a,
          "The same slots, read.")
      .def(
          "release",
          [](const UseHandle& use, const mx::array& y, const mx::array& slots) {
            return use.value->release(y, slots);
          },
          "y"_a,
          "slots"_a,
          "`y`, computed with `slots`, which are leased until then.");
  m.def(
      "slots_verify",
      [](const ReadsHandle& reads, const mx::array& y) {
        return verify(reads.value, y);
      },
      "reads"_a,
      "y"_a,
      "`y`; evaluation raises if a read failed, and `y` is NaN then.");
}

}  // namespace

void bind(nb::module_& m) {
  nb::class_<FilesHandle>(
      m, "SlotFiles", "Open files that experts are read from.")
      .def(
          "__init__",
          [](FilesHandle* self,
             const std::vector<std::string>& paths,
             const std::vector<int64_t>& sizes,
             bool direct) {
            new (self)
                FilesHandle{std::make_shared<Files>(paths, sizes, direct)};
          },
          "paths"_a,
          "sizes"_a,
          "direct"_a);
  nb::class_<ReaderHandle>(m, "SlotReader", "A pool of positional reads.")
      .def(
          "__init__",
          [](ReaderHandle* self, int depth, int64_t split) {
            new (self) ReaderHandle{std::make_shared<Reader>(depth, split)};
          },
          "depth"_a,
          "split"_a);
  bind_bank(m);
  bind_use(m);
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
