// Decode steps that follow one another on a cache.
#include <cstdlib>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "appended_rows.h"
#include "cpu/runtime/thread_pool.h"
#include "mlx/mlx.h"
#include "nanobind/stl/optional.h"
#include "nanobind/stl/pair.h"
#include "nanobind/stl/string.h"
#include "nanobind/stl/vector.h"
#include "ops/bindings.h"
#include "ops/cache_objects.h"
#include "ops/decode_step.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace glm_fused {

namespace {

// What decides which code runs a step, besides its arguments.
class Surroundings {
 public:
  // `path` is the context variable that overrides an environment variable.
  Surroundings(nb::handle path, std::string variable)
      : read_path_(path.attr("get")),
        variable_(std::move(variable)),
        text_(text()),
        override_(override()),
        device_(mx::default_device()),
        stream_(mx::default_stream(mx::Device::cpu)),
        threads_(cpu::num_threads()) {}

  bool are_same() const {
    return mx::default_device() == device_ &&
        mx::default_stream(mx::Device::cpu) == stream_ &&
        cpu::num_threads() == threads_ && override().is(override_) &&
        text() == text_;
  }

 private:
  std::string text() const {
    const char* value = std::getenv(variable_.c_str());
    return value ? value : "";
  }

  nb::object override() const {
    return read_path_();
  }

  nb::object read_path_;
  std::string variable_, text_;
  nb::object override_;
  mx::Device device_;
  mx::Stream stream_;
  int threads_;
};

// A recorded step, and all that decides that it is the one for some tokens and
// a cache: steps that follow one another differ only in how many rows the cache
// has.
class Decoding {
 public:
  // Takes what was checked: the cache, tokens like those of the steps, of which
  // without `vocabulary` the embedded rows are given, too; angles of positions
  // from `first` on; what else steps are given; the least and most rows that
  // there may be after a step.
  Decoding(
      const DecodeStep& step,
      nb::handle cache,
      const mx::array& tokens,
      std::optional<int> vocabulary,
      const std::pair<mx::array, mx::array>& angles,
      int first,
      std::optional<mx::array> start,
      const ArraySequence& given,
      std::pair<int, int> rows,
      Surroundings surroundings)
      : step_(step),
        tokens_{tokens.shape(), tokens.dtype()},
        vocabulary_(vocabulary),
        angles_(angles),
        first_(first),
        start_(std::move(start)),
        rows_(rows),
        surroundings_(std::move(surroundings)),
        layers_(nb::len(cache)) {
    const std::vector<Entry> entries = entries_of(cache);
    batched_ = nb::hasattr(entries.at(0).cache, "_idx");
    for (const Entry& entry : entries) {
      known_.emplace_back(entry.keys, entry.values);
    }
    for (nb::handle array : given) {
      const auto& a = nb::cast<const mx::array&>(array);
      given_.push_back({a.shape(), a.dtype()});
    }
  }

  // Returns the outputs of a step, which appends to the cache, or nothing where
  // this is not the one to make it.
  std::optional<Arrays> operator()(
      nb::handle tokens,
      nb::handle cache,
      const ArraySequence& given,
      const std::optional<mx::array>& embedded) const {
    if (!surroundings_.are_same() || !tokens_.is_of(tokens) || !takes(given)) {
      return std::nullopt;
    }
    std::vector<Entry> entries;
    try {
      if (nb::len(cache) != layers_) {
        return std::nullopt;
      }
      entries = entries_of(cache);
    } catch (nb::python_error&) {
      return std::nullopt;  // it is no cache
    }
    const int64_t at = rows_of(entries), rows = at + length();
    if (at < 0 || rows < rows_.first || rows > rows_.second) {
      return std::nullopt;
    }
    const auto& ids = nb::cast<const mx::array&>(tokens);
    return run(ids, entries, given, static_cast<int>(at), embedded);
  }

 private:
  int length() const {
    return tokens_.shape[1];
  }

  bool takes(const ArraySequence& given) const {
    size_t i = 0;
    for (nb::handle array : given) {
      if (i == given_.size() || !given_[i++].is_of(array)) {
        return false;
      }
    }
    return i == given_.size();
  }

  // Returns how many rows the caches have, or -1 unless they are those that
  // were checked, of one length.
  int64_t rows_of(const std::vector<Entry>& entries) const {
    int64_t rows = -1;
    if (entries.size() != known_.size()) {
      return -1;
    }
    for (size_t i = 0; i < entries.size(); i++) {
      const auto& [cache, keys, values] = entries[i];
      const int64_t filled = filled_of(cache);
      if (filled < 0 || (i > 0 && filled != rows) ||
          !known_[i].first.is(keys) || !known_[i].second.is(values)) {
        return -1;
      }
      rows = filled;
    }
    const bool traced = nb::cast<const mx::array&>(entries[0].keys).is_tracer();
    return traced ? -1 : rows;
  }

  int64_t filled_of(nb::handle cache) const {
    PyObject* name = batched_ ? names().index : names().offset;
    const nb::object found = nb::steal(PyObject_GetAttr(cache.ptr(), name));
    if (!found.is_valid() || !PyLong_CheckExact(found.ptr())) {
      PyErr_Clear();
      return -1;
    }
    const int64_t filled = PyLong_AsLongLong(found.ptr());
    PyErr_Clear();  // -1 where it is too large
    return filled;
  }

  Arrays run(
      const mx::array& tokens,
      const std::vector<Entry>& entries,
      const ArraySequence& given,
      int at,
      const std::optional<mx::array>& embedded) const {
    TokensOfStep first{tokens, std::nullopt};
    if (vocabulary_) {
      first = tokens_of_step(
          tokens, *vocabulary_, mx::default_stream(mx::Device::cpu));
    } else {
      first.tokens = embedded.value();
    }
    Arrays inputs = {
        first.tokens,
        angles_at(angles_.first, at),
        angles_at(angles_.second, at)};
    if (start_) {
      inputs.push_back(*start_);
    }
    for (nb::handle array : given) {
      inputs.push_back(nb::cast<const mx::array&>(array));
    }
    Arrays outputs = step_(inputs, rows_in(entries), at, first.late);
    const nb::int_ count(length());
    for (const Entry& entry : entries) {
      advance(entry.cache, names().offset, count);
      if (batched_) {
        advance(entry.cache, names().index, count);
      }
    }
    return outputs;
  }

  // Returns the angles of a step's positions: views of those that are there, or
  // these, which may be computed only now.
  mx::array angles_at(const mx::array& all, int at) const {
    if (all.shape(2) == length()) {
      return all;
    }
    mx::array some(
        {all.shape(0), 1, length(), all.shape(3)}, all.dtype(), nullptr, {});
    share_rows(all, at - first_, some);
    some.set_status(mx::array::Status::available);
    return some;
  }

  // Returns the arrays to which a step appends: all that have width.
  std::vector<mx::array*> rows_in(const std::vector<Entry>& entries) const {
    std::vector<mx::array*> rows;
    for (size_t i = 0; i < entries.size(); i++) {
      rows.push_back(&nb::cast<mx::array&>(entries[i].keys));
      if (known_[i].second.has_width()) {
        rows.push_back(&nb::cast<mx::array&>(entries[i].values));
      }
    }
    return rows;
  }

  // The offsets of a batch are an array.
  static void advance(nb::handle cache, PyObject* name, nb::handle count) {
    const nb::object before = attribute(cache, name);
    PyObject* sum = PyNumber_Add(before.ptr(), count.ptr());
    if (sum == nullptr) {
      throw nb::python_error();
    }
    set_attribute(cache, name, nb::steal(sum));
  }

  const DecodeStep step_;
  const Kind tokens_;
  const std::optional<int> vocabulary_;
  const std::pair<mx::array, mx::array> angles_;
  const int first_;
  const std::optional<mx::array> start_;
  const std::pair<int, int> rows_;
  const Surroundings surroundings_;
  const size_t layers_;
  std::vector<std::pair<KnownRows, KnownRows>> known_;  // keys and values
  std::vector<Kind> given_;
  bool batched_ = false;  // whether they are of a batch with padding
};
}  // namespace

void bind_decoding(nb::module_& m) {
  nb::class_<Decoding>(
      m, "Decoding", "A recorded step and its cache: see models.decode_step.")
      .def(
          "__init__",
          [](Decoding* self,
             const DecodeStep& step,
             nb::handle cache,
             const mx::array& tokens,
             std::optional<int> vocabulary,
             const std::pair<mx::array, mx::array>& angles,
             int first,
             const std::optional<mx::array>& start,
             const ArraySequence& given,
             std::pair<int, int> rows,
             nb::handle path,
             const std::string& variable) {
            new (self) Decoding(
                step,
                cache,
                tokens,
                vocabulary,
                angles,
                first,
                start,
                given,
                rows,
                Surroundings(path, variable));
          },
          "step"_a,
          "cache"_a,
          "tokens"_a,
          "vocabulary"_a.none(),
          "angles"_a,
          "first"_a,
          "start"_a.none(),
          "given"_a,
          "rows"_a,
          "path"_a,
          "variable"_a,
          "Take what was checked, and is not to change.\n\n"
          "Tokens [b, l] of which without `vocabulary` the embedded rows are "
          "given, too;\n"
          "cosines and sines of the positions from `first` on; what else the "
          "step takes; the\n"
          "least and most rows that the caches may have after a step; the "
          "context variable\n"
          "that, if set, goes before the environment variable.")
      .def(
          "__call__",
          &Decoding::operator(),
          "tokens"_a.none(),
          "cache"_a.none(),
          "given"_a,
          "embedded"_a = nb::none(),
          "The logits of tokens, which the caches then hold, and what else "
          "the step gives.\n\n"
          "None, with nothing done, where anything is not as it was.");
}

}  // namespace glm_fused
