#include "ops/block.h"

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "cpu/runtime/dispatch.h"
#include "ops/program.h"

namespace glm_fused {

namespace {

class Block : public ProgramPrimitive {
 public:
  Block(
      mx::Stream stream,
      std::string name,
      std::shared_ptr<const Program> program,
      Chain chain)
      : ProgramPrimitive(stream, std::move(program)),
        name_(std::move(name)),
        chain_(std::move(chain)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    cpu::evaluate(*this, [&] {
      cpu::Together together(stream());
      std::vector<Arrays> made;
      for (size_t i = 0; i < program().calls.size(); i++) {
        const Call& call = program().calls[i];
        Arrays in;
        for (const Value& v : call.inputs) {
          in.push_back(v.call < 0 ? inputs[v.output] : made[v.call][v.output]);
        }
        made.push_back(outputs_of(i, outputs));
        glm_fused::evaluate(*this, call, in, made.back());
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
  // The arrays of a call: the block's own outputs, or new ones.
  Arrays outputs_of(size_t number, const Arrays& outputs) const {
    Arrays made = unfilled(program().calls[number]);
    for (size_t i = 0; i < outputs.size(); i++) {
      const Value& v = program().outputs[i];
      if (v.call == static_cast<int>(number)) {
        made[v.output] = outputs[i];
      }
    }
    return made;
  }

  const std::string name_;
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
  auto made = std::make_shared<const Program>(record(in, chain(in)));
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
    shapes.push_back(program->calls[v.call].shapes[v.output]);
    dtypes.push_back(program->calls[v.call].dtypes[v.output]);
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
