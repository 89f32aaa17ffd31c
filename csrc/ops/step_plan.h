// What a recorded decode step runs (ops/decode_step.h).
#pragma once

#include <vector>

#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/schedule.h"
#include "ops/program.h"

namespace glm_fused {

// The calls that every step makes alike are evaluated once, by `prepare`. Those
// that append to caches or read them are left to CacheCalls, the last one,
// which makes what a step gives away, to the step, and those that gather what
// other ranks made, too: they divide a step into segments.
struct StepPlan {
  enum class Kind { alike, append, first_rows, read, gather, last };

  // What runs before the next gather.
  struct Segment {
    int first;   // of its units
    int gather;  // the call that ends it, or -1
    cpu::Schedule schedule;
  };

  // `in` are the inputs of the program, of which the last `cache_count` stand
  // for caches; its outputs are the logits, each cache with the rows that were
  // appended, then what else a step gives away. Throws std::runtime_error where
  // other ops than those made for it take cached rows.
  StepPlan(mx::Stream s, Program p, const Arrays& in, int cache_count);

  // Evaluates the calls that are alike, for the node `owner`.
  void prepare(mx::Primitive& owner);

  // Returns which cache an output of a call is, with its new rows, or -1.
  int cache_of(int call, int output) const;
  // Returns the number `i` of what else a step gives away.
  const Value& other(int i) const {
    return program.outputs[1 + caches + i];
  }
  // Whether a call makes the logits in the memory that is given away; else they
  // are copied there.
  bool makes_logits() const {
    return kinds[program.outputs[0].call] == Kind::last;
  }
  // Returns what a call makes, or an input of the program or a constant.
  const mx::array& value(const Value& v) const {
    return v.call < 0 ? input(v.output) : made[v.call][v.output];
  }
  // Returns an input of the program, or a constant.
  const mx::array& input(int number) const;

  mx::Stream stream;
  Program program;
  int caches;
  int others;               // how many outputs there are besides the logits
  int length;               // how many rows a step appends
  Arrays inputs;            // its own ones, to which those of a step are copied
  std::vector<Kind> kinds;  // of the calls
  std::vector<Arrays> made;       // by the calls; of caches without memory
  std::vector<cpu::Tasks> tasks;  // of the calls that are alike
  // Calls with tasks are units of the schedule; views need none.
  std::vector<int> unit_of;              // a call's unit, or -1
  std::vector<const cpu::Tasks*> units;  // null where the call is not alike
  std::vector<Segment> segments;         // of one step at a time

 private:
  Kind kind_of(int number) const;
  bool is_cached(const Value& v) const;
  void check_cache(int cache) const;
  void check_output(int number) const;
  void add(int number, mx::Primitive& owner, cpu::Together& together, int unit);
};

}  // namespace glm_fused
