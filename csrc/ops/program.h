// What a chain of ops did, recorded so that it can be done again.
#pragma once

#include <memory>
#include <vector>

#include "mlx/primitives.h"

namespace glm_fused {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;

// An output of a call, or an input of the program where `call` is -1.
struct Value {
  int call;
  int output;
};

struct Call {
  std::shared_ptr<mx::Primitive> primitive;
  std::vector<Value> inputs;
  std::vector<mx::Shape> shapes;  // of the outputs
  std::vector<mx::Dtype> dtypes;
};

struct Program {
  std::vector<Call> calls;  // each after those that it needs
  std::vector<Value> outputs;
  Arrays constants;  // of the chain; they follow its inputs
};

// A node that runs a program, which another program takes apart.
class ProgramPrimitive : public mx::Primitive {
 public:
  ProgramPrimitive(mx::Stream stream, std::shared_ptr<const Program> program)
      : mx::Primitive(stream), program_(std::move(program)) {}

  const Program& program() const {
    return *program_;
  }

 private:
  const std::shared_ptr<const Program> program_;
};

// Returns how `outputs` were made of `inputs`, by ops of this package and views
// of arrays. Throws std::runtime_error for others.
Program record(const Arrays& inputs, const Arrays& outputs);

// Whether a call gathers what several ranks made. It waits for them, on the
// stream, and makes new memory each time it is evaluated.
bool is_gather(const Call& call);

// Returns arrays for what a call makes.
Arrays unfilled(const Call& call);

// Runs a call on the CPU for the node `owner`. Outputs that have memory keep
// it, unless they are views.
void evaluate(
    mx::Primitive& owner,
    const Call& call,
    const Arrays& in,
    Arrays& out);

}  // namespace glm_fused
