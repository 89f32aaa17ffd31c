#include "ops/decode_step.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/runtime/copy.h"
#include "cpu/runtime/dispatch.h"
#include "ops/program.h"
#include "primitives.h"
#include "taken_rows.h"

namespace glm_fused {

namespace {

template <class Primitive>
bool is(const Call& call) {
  return dynamic_cast<const Primitive*>(call.primitive.get()) != nullptr;
}

// Whether `a` could stand where the step was recorded with `b`; caches may be
// of any capacity.
bool fits(const mx::array& a, const mx::array& b, bool is_cache) {
  mx::Shape shape = a.shape();
  if (is_cache && shape.size() == 4) {
    shape[2] = b.shape(2);
  }
  return shape == b.shape() && a.dtype() == b.dtype();
}

}  // namespace

struct DecodeStep::Plan {
  mx::Stream stream;
  Program program;
  int caches;     // how many inputs of the program these are, after `inputs`
  int length;     // how many rows a step appends
  Arrays inputs;  // the step's own, to which those of a step are copied
  std::vector<Arrays> made;       // by the calls; unfilled by those of a step
  std::vector<bool> of_step;      // whether a call is evaluated at every step
  std::vector<cpu::Tasks> tasks;  // of the other calls

  Plan(mx::Stream s, Program p, const Arrays& in, int cache_count)
      : stream(s),
        program(std::move(p)),
        caches(cache_count),
        length(in[0].shape(1)) {
    for (size_t i = 0; i < in.size() - caches; i++) {
      mx::array own(in[i].shape(), in[i].dtype(), nullptr, {});
      own.set_data(mx::allocator::malloc(own.nbytes()));
      inputs.push_back(own);
    }
    inputs.insert(inputs.end(), in.end() - caches, in.end());
  }

  bool is_cache(const Value& v) const {
    const int cached = static_cast<int>(inputs.size());
    return v.call < 0 ? v.output < cached && v.output >= cached - caches
                      : is<AppendRows>(program.calls[v.call]) ||
            is<FirstRows>(program.calls[v.call]);
  }

  bool is_output(int call) const {
    return std::ranges::any_of(
        program.outputs, [&](const Value& v) { return v.call == call; });
  }

  const mx::array& input(int number) const {
    const auto own = static_cast<int>(inputs.size());
    return number < own ? inputs[number] : program.constants[number - own];
  }

  // A view of cached rows would be another one at every step.
  static void check_of_step(const Call& call) {
    if (!is<FusedPrimitive>(call)) {
      throw std::runtime_error(
          std::string("[decode_step] ") + call.primitive->name() +
          " may not take cached rows or give what a step returns.");
    }
  }

  // Evaluates the calls that every step makes alike.
  void prepare(mx::Primitive& node) {
    cpu::Together together(stream);
    for (size_t i = 0; i < program.calls.size(); i++) {
      const Call& call = program.calls[i];
      made.push_back(unfilled(call));
      tasks.emplace_back();
      of_step.push_back(
          is_output(static_cast<int>(i)) ||
          std::ranges::any_of(
              call.inputs, [&](const Value& v) { return is_cache(v); }));
      if (of_step.back()) {
        check_of_step(call);
        if (!is_output(static_cast<int>(i)) && !is<FirstRows>(call)) {
          cpu::allocate(node, made.back());
        }
        continue;
      }
      Arrays in;
      for (const Value& v : call.inputs) {
        in.push_back(v.call < 0 ? input(v.output) : made[v.call][v.output]);
      }
      evaluate(node, call, in, made.back());
      tasks.back() = together.take();
    }
  }
};

namespace {

// inputs: those of the step, then its caches. outputs: the logits, the caches.
class DecodeStepNode : public mx::Primitive {
 public:
  DecodeStepNode(std::shared_ptr<const DecodeStep::Plan> plan, int at)
      : mx::Primitive(plan->stream), plan_(std::move(plan)), at_(at) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    cpu::evaluate(*this, [&] { enqueue(inputs, outputs); });
  }

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("[DecodeStep] runs on a CPU stream.");
  }

  const char* name() const override {
    return "DecodeStep";
  }

 private:
  void enqueue(const Arrays& inputs, Arrays& outputs) {
    const size_t own = inputs.size() - plan_->caches;
    cpu::Together together(stream());
    Arrays in(
        inputs.begin(), inputs.begin() + static_cast<std::ptrdiff_t>(own));
    Arrays copies(
        plan_->inputs.begin(),
        plan_->inputs.begin() + static_cast<std::ptrdiff_t>(own));
    for (size_t i = 0; i < own; i++) {
      copy(in[i], copies[i]);
    }
    // What is made at this step, by call; a step has a few dozen such calls.
    std::vector<std::pair<int, Arrays>> made;
    std::vector<cpu::Tasks> tasks;
    tasks.push_back(together.take());
    const auto value = [&](const Value& v) -> const mx::array& {
      if (v.call < 0) {
        const auto number = static_cast<size_t>(v.output);
        return number >= own && number < inputs.size() ? inputs[number]
                                                       : plan_->input(v.output);
      }
      for (const auto& [call, arrays] : made) {
        if (call == v.call) {
          return arrays[v.output];
        }
      }
      return plan_->made[v.call][v.output];
    };
    const Program& program = plan_->program;
    for (int i = 0; i < static_cast<int>(program.calls.size()); i++) {
      if (!plan_->of_step[i]) {
        continue;
      }
      const Call& call = program.calls[i];
      Arrays from;
      for (const Value& v : call.inputs) {
        from.push_back(value(v));
      }
      Arrays to = plan_->made[i];
      for (size_t o = 0; o < outputs.size(); o++) {
        if (program.outputs[o].call == i) {
          to[program.outputs[o].output] = outputs[o];
        }
      }
      if (is<AppendRows>(call)) {
        AppendRows(stream(), at_).eval_cpu(from, to);
        made.emplace_back(i, std::move(to));
      } else if (is<FirstRows>(call)) {
        to[0] = mx::array(
            {from[0].shape(0), at_ + plan_->length, from[0].shape(3)},
            from[0].dtype(),
            nullptr,
            {});
        evaluate(*this, call, from, to);
        made.emplace_back(i, std::move(to));
      } else {
        evaluate(*this, call, from, to);
      }
      tasks.push_back(together.take());
    }
    cpu::enqueue(stream(), [plan = plan_, tasks = std::move(tasks)]() noexcept {
      run(tasks[0]);
      size_t next = 1;
      for (size_t i = 0; i < plan->program.calls.size(); i++) {
        run(plan->of_step[i] ? tasks[next++] : plan->tasks[i]);
      }
    });
  }

  static void run(const cpu::Tasks& tasks) noexcept {
    for (const auto& task : tasks) {
      task->run();
    }
  }

  void copy(const mx::array& from, const mx::array& to) {
    const auto make = [](auto& in, auto& out, cpu::Scratch&, int) {
      return cpu::Copy(in[0], out[0]);
    };
    Arrays target = {to};
    cpu::dispatch(*this, {from}, target, make);
  }

  const std::shared_ptr<const DecodeStep::Plan> plan_;
  const int at_;
};

}  // namespace

DecodeStep::DecodeStep(
    const Arrays& inputs,
    const Arrays& caches,
    const mx::array& logits,
    const Arrays& appended,
    mx::StreamOrDevice s) {
  Arrays in = inputs, out = {logits};
  in.insert(in.end(), caches.begin(), caches.end());
  out.insert(out.end(), appended.begin(), appended.end());
  const auto plan = std::make_shared<Plan>(
      mx::to_stream(s), record(in, out), in, static_cast<int>(caches.size()));
  DecodeStepNode node(plan, 0);
  plan->prepare(node);
  plan_ = plan;
}

bool DecodeStep::takes(const Arrays& arrays) {
  return std::ranges::none_of(
      arrays, [](const mx::array& a) { return a.is_tracer(); });
}

mx::array DecodeStep::operator()(const Arrays& inputs, Arrays& caches, int at)
    const {
  const Plan& plan = *plan_;
  Arrays all = inputs;
  all.insert(all.end(), caches.begin(), caches.end());
  if (all.size() != plan.inputs.size()) {
    invalid(
        "decode_step",
        "expected ",
        plan.inputs.size(),
        " arrays but got ",
        all.size(),
        ".");
  }
  for (size_t i = 0; i < all.size(); i++) {
    if (!fits(all[i], plan.inputs[i], i >= inputs.size())) {
      invalid(
          "decode_step",
          "array ",
          i,
          " must be ",
          plan.inputs[i].dtype(),
          " of shape ",
          shape_of(plan.inputs[i]),
          " but is ",
          all[i].dtype(),
          " of shape ",
          shape_of(all[i]),
          ".");
    }
  }
  const Value& last = plan.program.outputs[0];
  const Call& call = plan.program.calls[last.call];
  std::vector<mx::Shape> shapes = {call.shapes[last.output]};
  std::vector<mx::Dtype> dtypes = {call.dtypes[last.output]};
  for (const mx::array& cache : caches) {
    shapes.push_back(cache.shape());
    dtypes.push_back(cache.dtype());
  }
  const Arrays made = mx::array::make_arrays(
      shapes, dtypes, std::make_shared<DecodeStepNode>(plan_, at), all);
  for (size_t i = 0; i < caches.size(); i++) {
    caches[i] = made[i + 1];
  }
  return made[0];
}

}  // namespace glm_fused
