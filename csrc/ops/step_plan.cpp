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
  check_output(0);
  for (int i = 0; i < others; i++) {
    check_output(1 + caches + i);
  }
}

void StepPlan::prepare(mx::Primitive& owner) {
  cpu::Together together(stream);
  std::vector<std::vector<int>> needs;  // by unit of the segment at hand
  std::vector<std::vector<int>> after;  // by call: the units it comes after
  int first = 0;                        // unit of the segment
  const auto end_segment = [&](int gather) {
    segments.push_back({first, gather, cpu::Schedule(needs)});
    first += static_cast<int>(needs.size());
    needs.clear();
  };
  for (size_t i = 0; i < program.calls.size(); i++) {
    const int number = static_cast<int>(i);
    const int unit = first + static_cast<int>(needs.size());
    add(number, owner, together, unit);
    std::vector<int> before;
    for (const Value& v : program.calls[i].inputs) {
      if (v.call >= 0) {
        before.insert(before.end(), after[v.call].begin(), after[v.call].end());
      }
    }
    const bool is_view = kinds[i] == Kind::first_rows ||
        (kinds[i] == Kind::alike && tasks[i].empty());
    if (kinds[i] == Kind::gather) {
      end_segment(number);
      unit_of.push_back(-1);
      after.emplace_back();  // all that comes next comes after it
    } else if (is_view) {
      unit_of.push_back(-1);
      after.push_back(std::move(before));
    } else {
      std::vector<int> here;
      for (int other : before) {
        if (other >= first) {
          here.push_back(other - first);
        }
      }
      needs.push_back(std::move(here));
      unit_of.push_back(unit);
      after.push_back({unit});
    }
  }
  end_segment(-1);
  units.resize(first);
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
      in.push_back(value(v));
    }
    together.use_slot(unit % cpu::Schedule::kSlots);
    evaluate(owner, call, in, made.back());
    tasks.back() = together.take();
  } else if (kinds[number] == Kind::read || kinds[number] == Kind::gather) {
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
  if (!cached && is_gather(call)) {
    if (call.primitive->stream() != stream) {
      throw std::runtime_error(
          "[decode_step] ranks must be gathered from on the step's stream.");
    }
    return Kind::gather;
  }
  if (!cached) {
    const bool is_last = number == program.outputs[0].call;
    return is_last && is<FusedPrimitive>(call) ? Kind::last : Kind::alike;
  }
  if (is<Append>(call)) {
    return Kind::append;
  }
  if (is<FirstRows>(call)) {
    return Kind::first_rows;
  }
  if (is<ReadRows>(call)) {
    return Kind::read;
  }
  throw std::runtime_error(
      std::string("[decode_step] ") + call.primitive->name() +
      " may not take cached rows.");
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

// What a step gives away has to be made by it, and is no cache.
void StepPlan::check_output(int number) const {
  const int call = program.outputs[number].call;
  if (call < 0 || kinds[call] == Kind::append ||
      kinds[call] == Kind::first_rows) {
    throw std::runtime_error(
        "[decode_step] output " + std::to_string(number) +
        " must be made by the step, but is not.");
  }
}

}  // namespace glm_fused
