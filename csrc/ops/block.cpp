#include "ops/block.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "cpu/dot/matrix.h"
#include "cpu/runtime/dispatch.h"
#include "primitives.h"

namespace glm_fused {

namespace {

// These primitives of MLX give their input's memory another shape or other
// strides: to evaluate them enqueues nothing.
constexpr std::string_view kViews[] = {
    "ExpandDims",
    "Slice",
    "Squeeze",
    "Transpose"};
// These need rows that lie back to back; where they do, no copy is made.
constexpr std::string_view kRows[] =
    {"AsType", "Contiguous", "Flatten", "Reshape", "Unflatten"};

template <size_t n>
bool is_one_of(
    const std::string_view (&names)[n],
    const mx::Primitive& primitive) {
  return std::ranges::find(names, std::string_view(primitive.name())) !=
      std::end(names);
}

// MLX does not export what a dynamic_cast would need.
bool is_concatenation(const mx::Primitive& primitive) {
  return primitive.name() == std::string_view("Concatenate");
}

bool is_known(const mx::Primitive& primitive) {
  return is_one_of(kViews, primitive) || is_one_of(kRows, primitive) ||
      is_concatenation(primitive);
}

bool is_ours(const mx::Primitive& primitive) {
  return dynamic_cast<const FusedPrimitive*>(&primitive) != nullptr;
}

// An output of a step, or an input of the whole where `step` is -1.
struct Value {
  int step;
  int output;
};

struct Step {
  std::shared_ptr<mx::Primitive> primitive;
  std::vector<Value> inputs;
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
};

struct Program {
  std::vector<Step> steps;
  std::vector<Value> outputs;
  Arrays constants;  // of the chain; they follow its inputs
};

// Walks the graph from the chain's outputs to its inputs.
class Recorder {
 public:
  explicit Recorder(const Arrays& inputs)
      : inputs_(static_cast<int>(inputs.size())) {
    for (int i = 0; i < inputs_; i++) {
      values_.insert({inputs[i].id(), {-1, i}});
    }
  }

  Program record(const Arrays& outputs) {
    for (const mx::array& output : outputs) {
      program_.outputs.push_back(value(output));
    }
    return std::move(program_);
  }

 private:
  Value value(const mx::array& a) {
    const auto found = values_.find(a.id());
    if (found != values_.end()) {
      return found->second;
    }
    if (!a.has_primitive()) {  // a constant of the chain
      const int number = static_cast<int>(program_.constants.size());
      const Value constant{-1, inputs_ + number};
      program_.constants.push_back(a);
      values_.insert({a.id(), constant});
      return constant;
    }
    if (!is_ours(a.primitive()) && !is_known(a.primitive())) {
      throw std::runtime_error(
          std::string("[block] ") + a.primitive().name() +
          " is none of the ops that a block may have.");
    }
    Step step{a.primitive_ptr(), {}, {}, {}};
    for (const mx::array& input : a.inputs()) {
      step.inputs.push_back(value(input));
    }
    const int number = static_cast<int>(program_.steps.size());
    const Arrays outputs = a.outputs();
    for (size_t i = 0; i < outputs.size(); i++) {
      step.shapes.push_back(outputs[i].shape());
      step.dtypes.push_back(outputs[i].dtype());
      values_.insert({outputs[i].id(), {number, static_cast<int>(i)}});
    }
    program_.steps.push_back(std::move(step));
    return values_.at(a.id());
  }

  const int inputs_;  // how many there are
  std::unordered_map<std::uintptr_t, Value> values_;
  Program program_;
};

// Copies an array of any strides to another.
struct CopyRows {
  const mx::array& from;
  mx::array& to;

  void run() const {
    copy(0, from.data<std::byte>(), to.data<std::byte>());
  }

 private:
  void copy(int axis, const std::byte* source, std::byte* target) const {
    const size_t item = from.itemsize();
    const int ndim = static_cast<int>(from.ndim());
    const auto stride = [&](const mx::array& a) {
      return static_cast<std::ptrdiff_t>(a.strides(axis) * item);
    };
    if (axis == ndim ||
        (axis == ndim - 1 && from.strides(axis) == 1 &&
         to.strides(axis) == 1)) {
      const size_t count = axis == ndim ? 1 : from.shape(axis);
      std::copy_n(source, count * item, target);
      return;
    }
    for (int i = 0; i < from.shape(axis); i++) {
      copy(axis + 1, source + i * stride(from), target + i * stride(to));
    }
  }
};

// Converts floats, which lie back to back, to those of another type.
struct Convert {
  const mx::array& from;
  mx::array& to;

  void run() const {
    constexpr size_t kValues = 4096;  // so many are loaded at once
    float values[kValues];
    for (size_t at = 0; at < from.size(); at += kValues) {
      const int count = static_cast<int>(std::min(kValues, from.size() - at));
      cpu::load_values(from, at, count, values);
      cpu::store_row(to, at, values, count);
    }
  }
};

class Block : public mx::Primitive {
 public:
  Block(
      mx::Stream stream,
      std::string name,
      std::shared_ptr<const Program> program,
      Chain chain)
      : mx::Primitive(stream),
        name_(std::move(name)),
        program_(std::move(program)),
        chain_(std::move(chain)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    cpu::evaluate(*this, [&] {
      cpu::Together together(stream());
      std::vector<Arrays> made;
      for (size_t i = 0; i < program_->steps.size(); i++) {
        const Step& step = program_->steps[i];
        Arrays in;
        for (const Value& v : step.inputs) {
          in.push_back(v.step < 0 ? inputs[v.output] : made[v.step][v.output]);
        }
        made.push_back(outputs_of(i, outputs));
        evaluate(step, in, made.back());
      }
      together.enqueue();
    });
  }

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("[block] " + name_ + " is for CPU streams.");
  }

  std::vector<mx::array> vjp(
      const Arrays& primals,
      const Arrays& cotangents,
      const std::vector<int>& argnums,
      const Arrays&) override {
    Arrays chosen;
    for (int i : argnums) {
      chosen.push_back(primals[i]);
    }
    const auto given = [&](const Arrays& values) {
      Arrays all = primals;
      for (size_t i = 0; i < argnums.size(); i++) {
        all[argnums[i]] = values[i];
      }
      return chain_(all);
    };
    return mx::vjp(given, chosen, cotangents).second;
  }

  const char* name() const override {
    return name_.c_str();
  }

 private:
  // The arrays of a step: the block's own outputs, or new ones.
  Arrays outputs_of(size_t number, const Arrays& outputs) const {
    const Step& step = program_->steps[number];
    Arrays made;
    for (size_t i = 0; i < step.shapes.size(); i++) {
      made.emplace_back(step.shapes[i], step.dtypes[i], nullptr, Arrays{});
    }
    for (size_t i = 0; i < outputs.size(); i++) {
      const Value& v = program_->outputs[i];
      if (v.step == static_cast<int>(number)) {
        made[v.output] = outputs[i];
      }
    }
    return made;
  }

  void evaluate(const Step& step, const Arrays& in, Arrays& out) {
    const mx::Primitive& primitive = *step.primitive;
    if (is_concatenation(primitive)) {
      const auto& join = static_cast<const mx::Concatenate&>(primitive);
      concatenate(in, join.state(), out[0]);
    } else if (!is_one_of(kRows, primitive)) {
      step.primitive->eval_cpu(in, out);
    } else if (in[0].dtype() == out[0].dtype()) {
      share_rows(in_rows(in[0]), out[0]);
    } else {
      const auto make = [](auto& from, auto& to, cpu::Scratch&, int) {
        return Convert{from[0], to[0]};
      };
      cpu::dispatch(*this, {in_rows(in[0])}, out, make);
    }
  }

  void copy(const mx::array& from, mx::array to) {
    // An array to copy to has its memory, which dispatch would give it anew.
    const auto make = [](auto& in, auto&, cpu::Scratch&, int) {
      return CopyRows{in[0], in[1]};
    };
    Arrays none;
    cpu::dispatch(*this, {from, std::move(to)}, none, make);
  }

  // Returns the array, or a copy whose rows lie back to back.
  mx::array in_rows(const mx::array& a) {
    if (a.flags().row_contiguous) {
      return a;
    }
    Arrays copies = {mx::array(a.shape(), a.dtype(), nullptr, {})};
    cpu::allocate(*this, copies);
    copy(a, copies[0]);
    return copies[0];
  }

  void concatenate(const Arrays& in, int axis, mx::array& out) {
    Arrays whole = {out};
    cpu::allocate(*this, whole);
    int64_t offset = 0;
    for (const mx::array& part : in) {
      mx::array place(part.shape(), part.dtype(), nullptr, {});
      place.copy_shared_buffer(
          out, out.strides(), {false, false, false}, out.data_size(), offset);
      copy(part, place);
      offset += part.shape(axis) * out.strides(axis);
    }
  }

  // Gives `out` the memory of `in`, which is row-contiguous and as large.
  static void share_rows(const mx::array& in, mx::array& out) {
    mx::Strides strides(out.ndim());
    int64_t stride = 1;
    for (int axis = static_cast<int>(out.ndim()) - 1; axis >= 0; axis--) {
      strides[axis] = stride;
      stride *= out.shape(axis);
    }
    const mx::array::Flags flags{
        true, true, out.size() <= 1 || out.size() == size_t(out.shape(-1))};
    out.copy_shared_buffer(in, strides, flags, out.size());
  }

  const std::string name_;
  const std::shared_ptr<const Program> program_;
  const Chain chain_;
};

// The programs of chains that were recorded, by what tells them apart.
class Programs {
 public:
  std::shared_ptr<const Program> find(const Key& key) {
    std::lock_guard lock(mutex_);
    const auto found = programs_.find(key);
    return found == programs_.end() ? nullptr : found->second;
  }

  void keep(Key key, std::shared_ptr<const Program> program) {
    constexpr size_t kMost =
        1024;  // models have some dozens of kinds of layers
    std::lock_guard lock(mutex_);
    if (programs_.size() >= kMost) {
      programs_.clear();
    }
    programs_.insert_or_assign(std::move(key), std::move(program));
  }

 private:
  std::mutex mutex_;
  std::map<Key, std::shared_ptr<const Program>> programs_;
};

// This is never destroyed, as MLX's threads may outlive the module.
Programs& programs() {
  static Programs& programs = *new Programs;
  return programs;
}

Key full_key(
    const std::string& name,
    Key key,
    const Arrays& inputs,
    mx::Stream stream) {
  key.push_back(static_cast<int64_t>(std::hash<std::string>()(name)));
  key.push_back(stream.index);
  for (const mx::array& input : inputs) {
    key.push_back(static_cast<int64_t>(input.dtype().val()));
    key.push_back(static_cast<int64_t>(input.ndim()));
    key.insert(key.end(), input.shape().begin(), input.shape().end());
  }
  return key;
}

std::shared_ptr<const Program>
program_of(const Key& key, const Chain& chain, const Arrays& inputs) {
  if (auto found = programs().find(key)) {
    return found;
  }
  // The chain is given arrays of its own, so that what is kept keeps no weight.
  Arrays in;
  for (const mx::array& input : inputs) {
    in.emplace_back(input.shape(), input.dtype(), nullptr, Arrays{});
  }
  auto made = std::make_shared<const Program>(Recorder(in).record(chain(in)));
  programs().keep(key, made);
  return made;
}

}  // namespace

Arrays block(
    const std::string& name,
    const Key& key,
    const Chain& chain,
    const Arrays& inputs,
    mx::StreamOrDevice s) {
  const mx::Stream stream = mx::to_stream(s);
  const auto program =
      program_of(full_key(name, key, inputs, stream), chain, inputs);
  Arrays all = inputs;
  all.insert(all.end(), program->constants.begin(), program->constants.end());
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (const Value& v : program->outputs) {
    shapes.push_back(program->steps[v.step].shapes[v.output]);
    dtypes.push_back(program->steps[v.step].dtypes[v.output]);
  }
  const Chain of_all = [chain, count = inputs.size()](const Arrays& given) {
    return chain(Arrays(given.begin(), given.begin() + count));
  };
  return mx::array::make_arrays(
      shapes,
      dtypes,
      std::make_shared<Block>(stream, name, program, of_all),
      all);
}

}  // namespace glm_fused
