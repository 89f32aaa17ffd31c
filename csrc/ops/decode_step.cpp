#include "ops/decode_step.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/runtime/copy.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/schedule.h"
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
  std::vector<cpu::Tasks> tasks;  // of the other calls
  // The calls that are evaluated at every step, and the place of each among
  // them, or -1.
  enum class Kind { append, first_rows, other };
  struct OfStep {
    int call;
    Kind kind;
  };
  std::vector<OfStep> each_step;
  std::vector<int> place;
  // Calls with tasks are units of the schedule; views need none.
  std::vector<int> unit_of;                 // a call's unit, or -1
  std::vector<const cpu::Tasks*> units;     // null where they are a step's
  std::unique_ptr<cpu::Schedule> schedule;  // of one step at a time

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
                      : is<Append>(program.calls[v.call]) ||
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
    std::vector<std::vector<int>> needs;  // by unit
    std::vector<std::vector<int>> after;  // by call: the units it comes after
    for (size_t i = 0; i < program.calls.size(); i++) {
      const Call& call = program.calls[i];
      const int number = static_cast<int>(i);
      const int unit = static_cast<int>(needs.size());
      made.push_back(unfilled(call));
      tasks.emplace_back();
      const bool of_step = is_output(number) ||
          std::ranges::any_of(call.inputs,
                              [&](const Value& v) { return is_cache(v); });
      place.push_back(of_step ? static_cast<int>(each_step.size()) : -1);
      if (of_step) {
        check_of_step(call);
        each_step.push_back({number, kind_of(call)});
        if (!is_output(number) && !is<FirstRows>(call)) {
          cpu::allocate(node, made.back());
        }
      } else {
        together.use_slot(unit % cpu::Schedule::kSlots);
        evaluate(node, call, inputs_of(call), made.back());
        tasks.back() = together.take();
      }
      after.emplace_back();
      for (const Value& v : call.inputs) {
        if (v.call >= 0) {
          const auto& units_before = after[v.call];
          after.back().insert(
              after.back().end(), units_before.begin(), units_before.end());
        }
      }
      const bool runs = of_step || !tasks.back().empty();
      unit_of.push_back(runs ? unit : -1);
      if (runs) {
        needs.push_back(std::exchange(after.back(), {unit}));
      }
    }
    schedule = std::make_unique<cpu::Schedule>(needs);
    units.resize(needs.size());
    for (size_t i = 0; i < tasks.size(); i++) {
      if (unit_of[i] >= 0 && place[i] < 0) {
        units[unit_of[i]] = &tasks[i];
      }
    }
  }

 private:
  static Kind kind_of(const Call& call) {
    return is<Append>(call)   ? Kind::append
        : is<FirstRows>(call) ? Kind::first_rows
                              : Kind::other;
  }

  Arrays inputs_of(const Call& call) const {
    Arrays in;
    for (const Value& v : call.inputs) {
      in.push_back(v.call < 0 ? input(v.output) : made[v.call][v.output]);
    }
    return in;
  }
};

namespace {

std::atomic<int64_t> run_nanoseconds{0};

// inputs: those of the step, then its caches. outputs: the logits, the caches.
class DecodeStepNode : public mx::Primitive {
 public:
  DecodeStepNode(
      std::shared_ptr<const DecodeStep::Plan> plan,
      int at,
      std::optional<LateCheck> late)
      : mx::Primitive(plan->stream),
        plan_(std::move(plan)),
        at_(at),
        late_(std::move(late)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    cpu::evaluate(*this, [&] {
      enqueue(inputs, outputs);
      if (late_) {
        (*late_)();
      }
    });
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
    using Kind = DecodeStep::Plan::Kind;
    std::vector<Arrays> made(plan_->each_step.size());  // by those calls
    std::vector<std::pair<int, cpu::Tasks>> tasks;      // with their units
    cpu::Tasks copied = together.take();
    const auto value = [&](const Value& v) -> const mx::array& {
      if (v.call < 0) {
        const auto number = static_cast<size_t>(v.output);
        return number >= own && number < inputs.size() ? inputs[number]
                                                       : plan_->input(v.output);
      }
      const int place = plan_->place[v.call];
      return place >= 0 && !made[place].empty() ? made[place][v.output]
                                                : plan_->made[v.call][v.output];
    };
    const Program& program = plan_->program;
    for (size_t place = 0; place < made.size(); place++) {
      const auto [number, kind] = plan_->each_step[place];
      const Call& call = program.calls[number];
      const int unit = plan_->unit_of[number];
      together.use_slot(unit % cpu::Schedule::kSlots);
      Arrays from;
      for (const Value& v : call.inputs) {
        from.push_back(value(v));
      }
      Arrays to = plan_->made[number];
      for (size_t o = 0; o < outputs.size(); o++) {
        if (program.outputs[o].call == number) {
          to[program.outputs[o].output] = outputs[o];
        }
      }
      if (kind == Kind::append) {
        static_cast<Append&>(*call.primitive).append(from, to, at_);
        made[place] = std::move(to);
      } else if (kind == Kind::first_rows) {
        const mx::Shape shape = {
            from[0].shape(0), at_ + plan_->length, from[0].shape(3)};
        to[0] = mx::array(shape, from[0].dtype(), nullptr, {});
        call.primitive->eval_cpu(from, to);
        made[place] = std::move(to);
      } else {
        call.primitive->eval_cpu(from, to);
      }
      tasks.emplace_back(unit, together.take());
    }
    std::vector<const cpu::Tasks*> units = plan_->units;
    for (const auto& [unit, of_unit] : tasks) {
      units[unit] = &of_unit;
    }
    cpu::enqueue(
        stream(),
        [plan = plan_,
         copied = std::move(copied),
         tasks = std::move(tasks),
         units = std::move(units)]() noexcept {
          for (const auto& task : copied) {
            task->run();
          }
          using Clock = std::chrono::steady_clock;
          const auto start = Clock::now();
          plan->schedule->run(units);
          run_nanoseconds +=
              std::chrono::nanoseconds(Clock::now() - start).count();
        });
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
  const std::optional<LateCheck> late_;
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
  DecodeStepNode node(plan, 0, std::nullopt);
  plan->prepare(node);
  plan_ = plan;
}

double DecodeStep::run_seconds() {
  return 1e-9 * static_cast<double>(run_nanoseconds);
}

bool DecodeStep::takes(const Arrays& arrays) {
  return std::ranges::none_of(
      arrays, [](const mx::array& a) { return a.is_tracer(); });
}

mx::array DecodeStep::operator()(
    const Arrays& inputs,
    Arrays& caches,
    int at,
    const std::optional<LateCheck>& late) const {
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
      shapes, dtypes, std::make_shared<DecodeStepNode>(plan_, at, late), all);
  for (size_t i = 0; i < caches.size(); i++) {
    caches[i] = made[i + 1];
  }
  return made[0];
}

}  // namespace glm_fused
