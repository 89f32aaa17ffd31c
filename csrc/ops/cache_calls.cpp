#include "ops/cache_calls.h"

#include <algorithm>
#include <span>

#include "appended_rows.h"
#include "cache_primitives.h"

namespace glm_fused {

namespace {

// There is scratch memory for a multiple of so many rows.
constexpr int kRows = 256;

int most_rows(const Arrays& caches, int rows) {
  int most = (rows + kRows - 1) / kRows * kRows;
  for (const mx::array& cache : caches) {
    most = std::min(most, cache.shape(2));
  }
  return most;
}

}  // namespace

CacheCalls::CacheCalls(const StepPlan& plan, const Arrays& caches, int rows)
    : plan_(plan),
      most_(most_rows(caches, rows)),
      tasks_(plan.program.calls.size()),
      units_(plan.units) {
  for (const mx::array& cache : caches) {
    caches_.push_back(mx::array::unsafe_weak_copy(cache));
  }
  cpu::Together together(plan.stream);
  std::vector<Arrays> first_rows(tasks_.size());
  for (size_t i = 0; i < tasks_.size(); i++) {
    const int number = static_cast<int>(i), unit = plan.unit_of[i];
    together.use_slot(unit % cpu::Schedule::kSlots);
    add(number, first_rows);
    tasks_[i] = together.take();
    if (!tasks_[i].empty()) {
      units_[unit] = &tasks_[i];
    }
  }
}

void CacheCalls::add(int number, std::vector<Arrays>& rows) {
  const Call& call = plan_.program.calls[number];
  Arrays in;
  for (const Value& v : call.inputs) {
    in.push_back(value(v, rows));
  }
  Arrays out = plan_.made[number];
  switch (plan_.kinds[number]) {
    case StepPlan::Kind::append: {
      Arrays targets = targets_of(number);
      static_cast<Append&>(*call.primitive).write(in, targets);
      return;
    }
    case StepPlan::Kind::first_rows: {
      mx::array first(
          {in[0].shape(0), most_, in[0].shape(3)}, in[0].dtype(), nullptr, {});
      share_first_rows(in[0], first);
      rows[number] = {first};
      return;
    }
    case StepPlan::Kind::read:
      return static_cast<ReadRows&>(*call.primitive).read(in, out, &filled_);
    default:
      return;
  }
}

const mx::array& CacheCalls::value(
    const Value& v,
    const std::vector<Arrays>& rows) const {
  if (v.call < 0) {
    return plan_.input(v.output);
  }
  if (const int cache = plan_.cache_of(v.call, v.output); cache >= 0) {
    return caches_[cache];
  }
  return rows[v.call].empty() ? plan_.made[v.call][v.output]
                              : rows[v.call][v.output];
}

// The arrays to which an append writes; `run` says where in their caches they
// lie.
Arrays CacheCalls::targets_of(int number) {
  Arrays targets;
  for (size_t o = 0; o < plan_.made[number].size(); o++) {
    const int cache = plan_.cache_of(number, static_cast<int>(o));
    targets.push_back(rows_between(caches_[cache], 0, plan_.length));
    targets_.push_back({cache, targets.back()});
  }
  return targets;
}

bool CacheCalls::fit(const Arrays& caches, int rows) const {
  const auto same = [](const mx::array& a, const mx::array& b) {
    return a.data<void>() == b.data<void>() && a.shape() == b.shape() &&
        a.strides() == b.strides();
  };
  return rows <= most_ && std::ranges::equal(caches, caches_, same);
}

void CacheCalls::begin(int rows, const cpu::Tasks& logits) noexcept {
  filled_ = rows;
  for (Target& target : targets_) {
    share_rows(caches_[target.cache], rows - plan_.length, target.rows);
  }
  if (plan_.makes_logits()) {
    units_[plan_.unit_of[plan_.program.outputs[0].call]] = &logits;
  }
}

void CacheCalls::run(StepPlan::Segment& segment) noexcept {
  segment.schedule.run(std::span(units_).subspan(segment.first));
}

}  // namespace glm_fused
