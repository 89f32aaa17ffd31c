#include "ops/program.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "cpu/dot/add_all.h"
#include "cpu/dot/matrix.h"
#include "cpu/runtime/copy.h"
#include "cpu/runtime/dispatch.h"
#include "primitives.h"

namespace glm_fused {

namespace {

// These primitives of MLX give their input's memory another shape or other
// strides: to evaluate them enqueues nothing.
constexpr std::string_view kViews[] =
    {"Broadcast", "ExpandDims", "Slice", "Squeeze", "Transpose"};
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
bool is(const char* name, const mx::Primitive& primitive) {
  return primitive.name() == std::string_view(name);
}

bool is_known(const mx::Primitive& primitive) {
  return is_one_of(kViews, primitive) || is_one_of(kRows, primitive) ||
      is("Concatenate", primitive) || is("Multiply", primitive) ||
      is("Add", primitive) || is("AllGather", primitive);
}

bool is_ours(const mx::Primitive& primitive) {
  return dynamic_cast<const FusedPrimitive*>(&primitive) != nullptr;
}

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
    if (is("Depends", a.primitive())) {
      // Each output is one of the inputs; the others are outputs themselves.
      return value(a.inputs()[a.sibling_position()]);
    }
    std::vector<Value> inputs;
    for (const mx::array& input : a.inputs()) {
      inputs.push_back(value(input));
    }
    const Arrays outputs = a.outputs();
    if (const auto* whole =
            dynamic_cast<const ProgramPrimitive*>(&a.primitive())) {
      inline_program(whole->program(), inputs, outputs);
    } else if (is_ours(a.primitive()) || is_known(a.primitive())) {
      call(a.primitive_ptr(), std::move(inputs), outputs);
    } else {
      throw std::runtime_error(
          std::string("[program] ") + a.primitive().name() +
          " is none of the ops that a program may have.");
    }
    return values_.at(a.id());
  }

  void call(
      const std::shared_ptr<mx::Primitive>& primitive,
      std::vector<Value> inputs,
      const Arrays& outputs) {
    Call call{primitive, std::move(inputs), {}, {}};
    const int number = static_cast<int>(program_.calls.size());
    for (size_t i = 0; i < outputs.size(); i++) {
      call.shapes.push_back(outputs[i].shape());
      call.dtypes.push_back(outputs[i].dtype());
      values_.insert({outputs[i].id(), {number, static_cast<int>(i)}});
    }
    program_.calls.push_back(std::move(call));
  }

  // `inputs` has the program's constants too, as its node does.
  void inline_program(
      const Program& program,
      const std::vector<Value>& inputs,
      const Arrays& outputs) {
    const int first = static_cast<int>(program_.calls.size());
    const auto moved = [&](const Value& v) {
      return v.call < 0 ? inputs[v.output] : Value{first + v.call, v.output};
    };
    for (Call call : program.calls) {
      std::ranges::transform(call.inputs, call.inputs.begin(), moved);
      program_.calls.push_back(std::move(call));
    }
    for (size_t i = 0; i < outputs.size(); i++) {
      values_.insert({outputs[i].id(), moved(program.outputs[i])});
    }
  }

  const int inputs_;  // how many there are
  std::unordered_map<std::uintptr_t, Value> values_;
  Program program_;
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

// Multiplies floats, which lie back to back, each by its own factor.
struct Multiply {
  const mx::array &x, &y;
  mx::array& out;

  void run() const {
    for (size_t i = 0; i < out.size(); i++) {
      out.data<float>()[i] = x.data<float>()[i] * y.data<float>()[i];
    }
  }
};

// What a program may have of MLX's own ops, run for the node `owner`.
class Evaluation {
 public:
  explicit Evaluation(mx::Primitive& owner) : owner_(owner) {}

  void run(mx::Primitive& primitive, const Arrays& in, Arrays& out) {
    if (is("Concatenate", primitive)) {
      const auto& join = static_cast<const mx::Concatenate&>(primitive);
      concatenate(in, join.state(), out[0]);
    } else if (is("Multiply", primitive)) {
      multiply(in, out);
    } else if (is("Add", primitive)) {
      add(in, out);
    } else if (in[0].dtype() == out[0].dtype()) {
      share_rows(in_rows(in[0]), out[0]);
    } else {
      const auto make = [](auto& from, auto& to, cpu::Scratch&, int) {
        return Convert{from[0], to[0]};
      };
      cpu::dispatch(owner_, {in_rows(in[0])}, out, make);
    }
  }

 private:
  // Returns the array, or a copy whose rows lie back to back.
  mx::array in_rows(const mx::array& a) {
    if (a.flags().row_contiguous) {
      return a;
    }
    const mx::array rows(a.shape(), a.dtype(), nullptr, {});
    cpu::copy(owner_, a, rows);
    return rows;
  }

  void multiply(const Arrays& in, Arrays& out) {
    if (out[0].dtype() != mx::float32) {
      throw std::runtime_error(
          "[program] products must be float32 but are of another type.");
    }
    const auto make = [](auto& from, auto& to, cpu::Scratch&, int) {
      return Multiply{from[0], from[1], to[0]};
    };
    cpu::dispatch(owner_, {in_rows(in[0]), in_rows(in[1])}, out, make);
  }

  void add(const Arrays& in, Arrays& out) {
    if (!mx::issubdtype(out[0].dtype(), mx::floating)) {
      throw std::runtime_error("[program] sums must be floats but are not.");
    }
    const auto make = [](auto& from, auto& to, cpu::Scratch&, int) {
      return cpu::AddAll{from[0], from[1], to[0]};
    };
    cpu::dispatch(owner_, {in_rows(in[0]), in_rows(in[1])}, out, make);
  }

  void concatenate(const Arrays& in, int axis, mx::array& out) {
    Arrays whole = {out};
    cpu::allocate(owner_, whole);
    int64_t offset = 0;
    for (const mx::array& part : in) {
      mx::array place(part.shape(), part.dtype(), nullptr, {});
      place.copy_shared_buffer(
          out, out.strides(), {false, false, false}, out.data_size(), offset);
      cpu::copy(owner_, part, place);
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

  mx::Primitive& owner_;
};

}  // namespace

Program record(const Arrays& inputs, const Arrays& outputs) {
  return Recorder(inputs).record(outputs);
}

bool is_gather(const Call& call) {
  return is("AllGather", *call.primitive);
}

Arrays unfilled(const Call& call) {
  Arrays made;
  for (size_t i = 0; i < call.shapes.size(); i++) {
    made.emplace_back(call.shapes[i], call.dtypes[i], nullptr, Arrays{});
  }
  return made;
}

void evaluate(
    mx::Primitive& owner,
    const Call& call,
    const Arrays& in,
    Arrays& out) {
  mx::Primitive& primitive = *call.primitive;
  if (is_ours(primitive) || is_one_of(kViews, primitive)) {
    primitive.eval_cpu(in, out);
  } else {
    Evaluation(owner).run(primitive, in, out);
  }
}

}  // namespace glm_fused
