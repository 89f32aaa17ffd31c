#include "ops/step_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "cache_primitives.h"

namespace glm_fused {

namespace {

template <class Primitive>
bool is(const Call& call) {
  return dynamic_cast<const Primitive*>(call.primitive.get()) != nullptr;
}

}  // namespace

StepPlan::StepPlan(mx::Stream s, Program p, const Arrays& in, int cache_count)
    : stream(s),
      program(std::move(p)),
      caches(cache_count),
      others(static_cast<int>(program.outputs.size()) - 1 - cache_count),
      length(in[0].shape(1)) {
  for (size_t i = 0; i < in.size() - caches; i++) {
    mx::array own(in[i].shape(), in[i].dtype(), nullptr, {});
    own.set_data(mx::allocator::malloc(own.nbytes()));
    inputs.push_back(own);
  }
  inputs.insert(inputs.end(), in.end() - caches, in.end());
  for (size_t i = 0; i < program.calls.size(); i++) {
    kinds.push_back(kind_of(static_cast<int>(i)));
  }
  for (int i = 0; i < caches; i++) {
    check_cache(i);
  }
  for (int i = 0; i < others; i++) {
    check_other(i);
  }
}

void StepPlan::prepare(mx::Primitive& owner) {
  cpu::Together together(stream);
  std::vector<std::vector<int>> needs;  // by unit
  std::vector<std::vector<int>> after;  // by call: the units it comes after
  for (size_t i = 0; i < program.calls.size(); i++) {
    const int unit = static_cast<int>(needs.size());
    add(static_cast<int>(i), owner, together, unit);
    after.emplace_back();
    for (const Value& v : program.calls[i].inputs) {
      if (v.call >= 0) {
        const auto& before = after[v.call];
        after.back().insert(after.back().end(), before.begin(), before.end());
      }
    }
    const bool is_view = kinds[i] == Kind::first_rows ||
        (kinds[i] == Kind::alike && tasks[i].empty());
    unit_of.push_back(is_view ? -1 : unit);
    if (!is_view) {
      needs.push_back(std::exchange(after.back(), {unit}));
    }
  }
  schedule = std::make_unique<cpu::Schedule>(needs);
  units.resize(needs.size());
  for (size_t i = 0; i < tasks.size(); i++) {
    if (unit_of[i] >= 0 && kinds[i] == Kind::alike) {
      units[unit_of[i]] = &tasks[i];
    }
  }
}

// Makes the arrays and, where they are alike in every step, the tasks of a
// call.
void StepPlan::add(
    int number,
    mx::Primitive& owner,
    cpu::Together& together,
    int unit) {
  const Call& call = program.calls[number];
  made.push_back(unfilled(call));
  tasks.emplace_back();
  if (kinds[number] == Kind::alike) {
    Arrays in;
    for (const Value& v : call.inputs) {
      in.push_back(v.call < 0 ? input(v.output) : made[v.call][v.output]);
    }
    together.use_slot(unit % cpu::Schedule::kSlots);
    evaluate(owner, call, in, made.back());
    tasks.back() = together.take();
  } else if (kinds[number] == Kind::read) {
    cpu::allocate(owner, made.back());
  }
}

int StepPlan::cache_of(int call, int output) const {
  for (int i = 0; i < caches; i++) {
    const Value& v = program.outputs[1 + i];
    if (v.call == call && v.output == output) {
      return i;
    }
  }
  return -1;
}

const mx::array& StepPlan::input(int number) const {
  const auto own = static_cast<int>(inputs.size());
  return number < own ? inputs[number] : program.constants[number - own];
}

// A view of cached rows would be another one at every step, and other ops do
// not know how many there are.
StepPlan::Kind StepPlan::kind_of(int number) const {
  const Call& call = program.calls[number];
  const bool cached = std::ranges::any_of(
      call.inputs, [&](const Value& v) { return is_cached(v); });
  const bool last = number == program.outputs[0].call;
  if (last && !cached && is<FusedPrimitive>(call)) {
    return Kind::last;
  }
  if (!last && !cached) {
    return Kind::alike;
  }
  if (!last && is<Append>(call)) {
    return Kind::append;
  }
  if (!last && is<FirstRows>(call)) {
    return Kind::first_rows;
  }
  if (!last && is<ReadRows>(call)) {
    return Kind::read;
  }
  throw std::runtime_error(
      std::string("[decode_step] ") + call.primitive->name() +
      " may not take cached rows or give what a step returns.");
}

bool StepPlan::is_cached(const Value& v) const {
  const int cached = static_cast<int>(inputs.size());
  return v.call < 0
      ? v.output < cached && v.output >= cached - caches
      : kinds[v.call] == Kind::append || kinds[v.call] == Kind::first_rows;
}

// Output 1 + i of the program has to be input i of the caches, appended to.
void StepPlan::check_cache(int cache) const {
  const auto [call, output] = program.outputs[1 + cache];
  const int from = static_cast<int>(inputs.size()) - caches + cache;
  if (call >= 0 && kinds[call] == Kind::append) {
    const Value& buffer = program.calls[call].inputs[2 * output];
    if (buffer.call < 0 && buffer.output == from) {
      return;
    }
  }
  throw std::runtime_error(
      "[decode_step] cache " + std::to_string(cache) +
      " must be appended to, once, but is not.");
}

// What a step gives away besides the logits has to be made in its memory.
void StepPlan::check_other(int number) const {
  const auto [call, output] = other(number);
  if (call < 0 || (kinds[call] != Kind::alike && kinds[call] != Kind::read)) {
    throw std::runtime_error(
        "[decode_step] output " + std::to_string(1 + number) +
        " must be made by the step, but is not.");
  }
}

}  // namespace glm_fused
