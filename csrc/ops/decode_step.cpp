#include "ops/decode_step.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "appended_rows.h"
#include "checks.h"
#include "cpu/runtime/copy.h"
#include "cpu/runtime/dispatch.h"
#include "ops/cache_calls.h"
#include "ops/step_plan.h"
#include "taken_rows.h"

namespace glm_fused {

namespace {

// Whether `a` could stand where the step was recorded with `b`; caches may be
// of any capacity, and tokens unsigned.
bool fits(const mx::array& a, const mx::array& b, bool is_cache) {
  mx::Shape shape = a.shape();
  if (is_cache && shape.size() == 4) {
    shape[2] = b.shape(2);
  }
  const bool tokens = a.dtype() == mx::uint32 && b.dtype() == mx::int32;
  return shape == b.shape() && (a.dtype() == b.dtype() || tokens);
}

}  // namespace

// The plan, and the calls that take cached rows as they were bound last.
struct DecodeStep::Plan {
  StepPlan step;
  std::mutex mutex;
  std::shared_ptr<CacheCalls> bound;  // guarded by `mutex`

  Plan(mx::Stream stream, Program program, const Arrays& inputs, int caches)
      : step(stream, std::move(program), inputs, caches) {}

  std::shared_ptr<CacheCalls> bind(const Arrays& caches, int rows) {
    std::lock_guard lock(mutex);
    if (!bound || !bound->fit(caches, rows)) {
      bound = nullptr;  // its scratch memory can be used again
      bound = std::make_shared<CacheCalls>(step, caches, rows);
    }
    return bound;
  }
};

namespace {

std::atomic<int64_t> run_nanoseconds{0};

// A cache with rows that a step writes to its memory. input: what the step
// gives besides the logits, which says only that it was enqueued.
class CacheAfterStep : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;
  void eval_cpu(const Arrays&, Arrays& outputs) override {
    if (!outputs[0].data_shared_ptr()) {
      throw std::runtime_error(
          "[decode_step] a cache after a step is no function of arrays.");
    }
  }
  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("[decode_step] runs on a CPU stream.");
  }
  const char* name() const override {
    return "CacheAfterStep";
  }
};

// Returns what has to be evaluated before the memory of `cache` may be read.
const mx::array& awaited_by(const mx::array& cache) {
  const bool after = cache.has_primitive() &&
      dynamic_cast<const CacheAfterStep*>(&cache.primitive()) != nullptr;
  return after ? cache.inputs()[0] : cache;
}

// inputs: those of the step, then what is awaited by its caches, which it does
// not take: it holds their memory. outputs: the step's, and nothing.
class DecodeStepNode : public mx::Primitive {
 public:
  DecodeStepNode(
      std::shared_ptr<DecodeStep::Plan> plan,
      int at,
      std::optional<LateCheck> late)
      : mx::Primitive(plan->step.stream),
        plan_(std::move(plan)),
        at_(at),
        late_(std::move(late)) {}

  // Takes the rows that the step writes, and returns the caches with them:
  // where others hold rows in their place, in new memory.
  Arrays place(const std::vector<mx::array*>& caches) {
    Arrays placed;
    for (mx::array* cache : caches) {
      placed.push_back(placed_rows(*cache));
      memory_.push_back(placed.back().data_shared_ptr());
    }
    calls_ = plan_->bind(placed, at_ + plan_->step.length);
    return placed;
  }

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
  // Rows that are to be copied to other memory.
  struct Moved {
    mx::array from, to;
  };

  mx::array placed_rows(const mx::array& cache) {
    const int rows = at_ + plan_->step.length;
    if (take_rows(cache, at_, plan_->step.length)) {
      return cache;
    }
    Arrays other = {mx::array(cache.shape(), cache.dtype(), nullptr, {})};
    cpu::allocate(*this, other);
    take_new_rows(other[0], rows);
    moved_.push_back(
        {rows_between(cache, 0, at_), rows_between(other[0], 0, at_)});
    return other[0];
  }

  // A step on its way through the stream.
  struct Run {
    std::shared_ptr<DecodeStep::Plan> plan;
    std::shared_ptr<CacheCalls> calls;
    int rows;
    std::vector<cpu::Tasks> before;  // the segments
    cpu::Tasks logits, others;
    std::vector<std::shared_ptr<mx::array::Data>> memory;

    void begin() noexcept {
      calls->begin(rows, logits);
    }

    void segment(size_t number) noexcept {
      for (const auto& task : before[number]) {
        task->run();
      }
      using Clock = std::chrono::steady_clock;
      const auto start = Clock::now();
      calls->run(plan->step.segments[number]);
      run_nanoseconds += std::chrono::nanoseconds(Clock::now() - start).count();
    }

    void end() noexcept {
      for (const auto& task : others) {
        task->run();
      }
    }
  };

  void enqueue(const Arrays& inputs, Arrays& outputs) {
    StepPlan& step = plan_->step;
    const size_t count = step.segments.size();
    const auto run = std::make_shared<Run>(
        plan_, calls_, at_ + step.length, std::vector<cpu::Tasks>(count));
    run->memory = memory_;
    cpu::Together together(stream());
    for (size_t i = 0; i < step.inputs.size() - step.caches; i++) {
      cpu::copy(*this, inputs[i], step.inputs[i]);
    }
    for (const auto& [from, to] : moved_) {
      cpu::copy(*this, from, to);
    }
    run->before[0] = together.take();
    if (step.makes_logits()) {
      run->logits = logits_task(outputs[0], together);
    } else {
      give(0, outputs[0]);
    }
    for (int i = 0; i < step.others; i++) {
      give(1 + step.caches + i, outputs[1 + i]);
    }
    run->others = together.take();
    outputs.back().set_data(mx::allocator::malloc(0));
    for (size_t i = 0; i < count; i++) {
      cpu::enqueue(stream(), [run, i, count]() noexcept {
        if (i == 0) {
          run->begin();
        }
        run->segment(i);
        if (i + 1 == count) {
          run->end();
        }
      });
      if (i + 1 < count) {
        gather(step.segments[i].gather);
        run->before[i + 1] = together.take();
      }
    }
  }

  // Enqueues what waits for the other ranks, and makes the copy of what it
  // gathers to where the step's calls expect it.
  void gather(int number) {
    StepPlan& step = plan_->step;
    const Call& call = step.program.calls[number];
    Arrays gathered = unfilled(call);
    call.primitive->eval_cpu({step.value(call.inputs[0])}, gathered);
    cpu::copy(*this, gathered[0], step.made[number][0]);
  }

  // Returns what makes the logits of what the step's other calls make.
  cpu::Tasks logits_task(const mx::array& logits, cpu::Together& together) {
    const StepPlan& step = plan_->step;
    const auto [number, output] = step.program.outputs[0];
    const Call& call = step.program.calls[number];
    Arrays in, out = step.made[number];
    for (const Value& v : call.inputs) {
      in.push_back(step.value(v));
    }
    out[output] = logits;
    together.use_slot(step.unit_of[number] % cpu::Schedule::kSlots);
    call.primitive->eval_cpu(in, out);
    return together.take();
  }

  // Copies an output of the program from where the step's calls make it.
  void give(int number, mx::array& output) {
    Arrays given = {output};
    cpu::allocate(*this, given);
    cpu::copy(
        *this, plan_->step.value(plan_->step.program.outputs[number]), output);
  }

  const std::shared_ptr<DecodeStep::Plan> plan_;
  const int at_;
  const std::optional<LateCheck> late_;
  std::shared_ptr<CacheCalls> calls_;
  std::vector<std::shared_ptr<mx::array::Data>> memory_;  // of the caches
  std::vector<Moved> moved_;
};

// Evaluates the caches that have no memory yet.
void give_memory(const std::vector<mx::array*>& caches) {
  Arrays pending;
  for (const mx::array* cache : caches) {
    if (!cache->data_shared_ptr()) {
      pending.push_back(*cache);
    }
  }
  if (!pending.empty()) {
    mx::async_eval(pending);
  }
}

}  // namespace

DecodeStep::DecodeStep(
    const Arrays& inputs,
    const Arrays& caches,
    const Arrays& outputs,
    const Arrays& appended,
    mx::StreamOrDevice s) {
  Arrays in = inputs, out = {outputs.at(0)};
  in.insert(in.end(), caches.begin(), caches.end());
  out.insert(out.end(), appended.begin(), appended.end());
  out.insert(out.end(), outputs.begin() + 1, outputs.end());
  plan_ = std::make_shared<Plan>(
      mx::to_stream(s), record(in, out), in, static_cast<int>(caches.size()));
  DecodeStepNode node(plan_, 0, std::nullopt);
  plan_->step.prepare(node);
}

double DecodeStep::run_seconds() {
  return 1e-9 * static_cast<double>(run_nanoseconds);
}

bool DecodeStep::takes(const Arrays& arrays) {
  return std::ranges::none_of(
      arrays, [](const mx::array& a) { return a.is_tracer(); });
}

void DecodeStep::check(
    const Arrays& inputs,
    const std::vector<mx::array*>& caches) const {
  const Arrays& expected = plan_->step.inputs;
  const size_t count = inputs.size() + caches.size();
  if (count != expected.size()) {
    invalid(
        "decode_step",
        "expected ",
        expected.size(),
        " arrays but got ",
        count,
        ".");
  }
  for (size_t i = 0; i < count; i++) {
    const bool is_cache = i >= inputs.size();
    const mx::array& found = is_cache ? *caches[i - inputs.size()] : inputs[i];
    if (!fits(found, expected[i], is_cache)) {
      invalid(
          "decode_step",
          "array ",
          i,
          " must be ",
          expected[i].dtype(),
          " of shape ",
          shape_of(expected[i]),
          " but is ",
          found.dtype(),
          " of shape ",
          shape_of(found),
          ".");
    }
  }
}

Arrays DecodeStep::operator()(
    const Arrays& inputs,
    const std::vector<mx::array*>& caches,
    int at,
    const std::optional<LateCheck>& late) const {
  check(inputs, caches);
  give_memory(caches);
  const auto node = std::make_shared<DecodeStepNode>(plan_, at, late);
  const Arrays placed = node->place(caches);
  Arrays all = inputs;
  for (const mx::array* cache : caches) {
    const mx::array& awaited = awaited_by(*cache);
    if (all.back().id() != awaited.id()) {  // mostly it is that of them all
      all.push_back(awaited);
    }
  }
  const StepPlan& plan = plan_->step;
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  const auto add = [&](const Value& v) {
    shapes.push_back(plan.program.calls[v.call].shapes[v.output]);
    dtypes.push_back(plan.program.calls[v.call].dtypes[v.output]);
  };
  add(plan.program.outputs[0]);
  for (int i = 0; i < plan.others; i++) {
    add(plan.other(i));
  }
  shapes.push_back({0});
  dtypes.push_back(mx::bool_);
  Arrays made = mx::array::make_arrays(shapes, dtypes, node, all);
  const auto after = std::make_shared<CacheAfterStep>(plan.stream);
  for (size_t i = 0; i < caches.size(); i++) {
    mx::array cache(placed[i].shape(), placed[i].dtype(), after, {made.back()});
    cache.copy_shared_buffer(placed[i]);
    caches[i]->overwrite_descriptor(cache);
  }
  made.pop_back();
  return made;
}

}  // namespace glm_fused
