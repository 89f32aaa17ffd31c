#include "fiber.h"

#include <algorithm>
#include <cstring>

#include "lines.h"
#include "stacks.h"
#include "tracer.h"

namespace sim {
namespace {

thread_local Worker* running_worker = nullptr;

}  // namespace

Worker* Worker::running() {
  return running_worker;
}

Worker::Worker(const Launch& launch, uint64_t seed)
    : launch_(launch), random_(seed * 0x9e3779b97f4a7c15ull) {
  const uint32_t* n = launch.dispatch->group;
  stacks_ = std::make_unique<Stacks>(size_t(n[0]) * n[1] * n[2]);
  for (uint32_t i = 0; i < launch.dispatch->threadgroup_memory_count; i++) {
    const sim_buffer& b = launch.dispatch->threadgroup_memory[i];
    if (group_arguments_.size() <= size_t(b.index)) {
      group_arguments_.resize(b.index + 1);
    }
    // These ids are out of the way, as the shader numbers its variables from 0.
    uint8_t* data = threadgroup_memory_.variable(4096 + b.index, b.size);
    group_arguments_[b.index] = uint64_t(data);
  }
  group_arguments_.resize(std::max<size_t>(group_arguments_.size(), 32));
}

Worker::~Worker() = default;

bool Worker::on_stack(uint64_t address) const {
  return stacks_->contains(address);
}

bool Worker::on_guard_page(uint64_t address) const {
  return stacks_->guards(address);
}

bool Worker::owns(uint64_t address) const {
  auto in = [&](const void* start, size_t size) {
    return address - uint64_t(start) < size;
  };
  auto holds = [&](const auto& table) {
    return in(table.data(), table.size() * sizeof table[0]);
  };
  bool partial = false;
  for (const Exchange& x : partial_exchanges_) {
    partial |= in(&x, sizeof x);
  }
  return partial || holds(threads_) || holds(simdgroups_) ||
      holds(group_arguments_) || holds(launch_.memory->table()) ||
      address - launch_.library_base < launch_.library_size;
}

// Sets up threadgroup number `id`: its threads, their positions, simdgroups.
void Worker::place(uint32_t id) {
  const sim_dispatch& d = *launch_.dispatch;
  const uint32_t* grid = launch_.groups;
  uint32_t at[3] = {
      id % grid[0], id / grid[0] % grid[1], id / grid[0] / grid[1]};
  uint32_t n[3];
  for (int k = 0; k < 3; k++) {
    n[k] = d.threads ? std::min(d.group[k], d.groups[k] - at[k] * d.group[k])
                     : d.group[k];
  }
  uint32_t count = n[0] * n[1] * n[2], simdgroups = (count + 31) / 32;
  threads_.resize(count);
  simdgroups_.resize(simdgroups);
  for (uint32_t i = 0; i < count; i++) {
    Thread& t = threads_[i];
    t = Thread{};
    Position& p = t.position;
    uint32_t in_group[3] = {i % n[0], i / n[0] % n[1], i / n[0] / n[1]};
    for (int k = 0; k < 3; k++) {
      p.threadgroup_position[k] = at[k];
      p.thread_position_in_threadgroup[k] = in_group[k];
      p.thread_position_in_grid[k] = at[k] * d.group[k] + in_group[k];
      p.threadgroups_per_grid[k] = grid[k];
      p.threads_per_threadgroup[k] = n[k];
      p.threads_per_grid[k] = d.threads ? d.groups[k] : grid[k] * d.group[k];
    }
    p.thread_index = i;
    p.simdgroup_index = i / 32;
    p.lane = i % 32;
    p.simdgroups = simdgroups;
  }
  for (uint32_t g = 0; g < simdgroups; g++) {
    Simdgroup& s = simdgroups_[g];
    s.first = g * 32;
    s.count = s.alive = std::min(32u, count - g * 32);
    s.waiting = s.mask = 0;
    s.divergent = false;
    s.turn = 0;
  }
  alive_ = count;
  at_barrier_ = 0;
}

bool Worker::run(uint32_t id) {
  id_ = id;
  place(id);
  threadgroup_memory_.poison();
  partial_exchanges_.clear();
  ready_.clear();
  for (uint32_t i = threads_.size(); i-- > 0;) {
    threads_[i].stack_pointer = fresh_stack(stacks_->top(i), fiber);
    ready_.push_back(i);
  }
  if (launch_.tracer) {
    launch_.tracer->begin_threadgroup();
  }
  threads_run += threads_.size();
  running_worker = this;
  current_ = take_ready();
  sim_switch(&main_stack_pointer_, current_->stack_pointer);
  running_worker = nullptr;
  return !launch_.report->failed();
}

void Worker::fiber() {
  Worker* worker = running_worker;
  worker->launch_.kernel->entry(
      worker->launch_.memory->table().data(),
      worker->group_arguments_.data(),
      &worker->current_->position);
  worker->finish();
  __builtin_unreachable();
}

void Worker::make_ready(Thread& thread) {
  thread.state = Thread::kReady;
  ready_.push_back(thread.position.thread_index);
}

// Takes the thread that was made ready last: so a simdgroup stays in the cache,
// and its threads, which are pushed from the last one on, run in order.
Thread* Worker::take_ready() {
  if (ready_.empty()) {
    return nullptr;
  }
  if (launch_.dispatch->seed) {
    random_ = next_random(random_);
    std::swap(ready_[(random_ >> 16) % ready_.size()], ready_.back());
  }
  Thread* thread = &threads_[ready_.back()];
  ready_.pop_back();
  return thread;
}

void Worker::switch_from(Thread& from) {
  Thread* next = take_ready();
  while (!next && unblock()) {
    next = take_ready();
  }
  current_ = next;
  if (next != &from) {
    sim_switch(
        &from.stack_pointer, next ? next->stack_pointer : main_stack_pointer_);
  }
}

Exchange* Worker::exchange(const Site& site, const void* value) {
  Thread& me = *current_;
  Simdgroup& group = simdgroups_[me.position.simdgroup_index];
  me.state = Thread::kExchange;
  me.site = site;
  me.value = value;
  if (group.waiting == 0) {
    group.site = site;
  } else if (!(group.site == site)) {
    group.divergent = true;
  }
  memcpy(
      group.exchanges[group.turn].values + me.position.lane * site.size,
      value,
      site.size);
  group.waiting++;
  group.mask |= 1u << me.position.lane;
  if (group.waiting == group.alive && !group.divergent) {
    complete(group);
  }
  switch_from(me);
  return me.exchange;
}

// Completes an exchange: every thread of the group that is still alive came to
// the same call. Two exchanges in turn are enough, because a thread that brings
// a value to the next one has read the last.
void Worker::complete(Simdgroup& group) {
  Exchange& x = group.exchanges[group.turn];
  group.turn ^= 1;
  x.mask = group.mask;
  x.combined = 0;
  simd_functions++;
  for (uint32_t i = group.first + group.count; i-- > group.first;) {
    if (threads_[i].state == Thread::kExchange) {
      threads_[i].exchange = &x;
      make_ready(threads_[i]);
    }
  }
  group.waiting = group.mask = 0;
}

// Lets the threads go on that wait at the call of the first one that waits.
bool Worker::complete_partially(Simdgroup& group) {
  Thread* first = nullptr;
  for (uint32_t i = group.first; i < group.first + group.count && !first; i++) {
    first = threads_[i].state == Thread::kExchange ? &threads_[i] : nullptr;
  }
  if (!first) {
    return false;
  }
  report_divergence(
      *first,
      "threads of the simdgroup are not all at this simdgroup function");
  Site site = first->site;
  Exchange& x = partial_exchanges_.emplace_back();
  memset(x.values, 0xff, sizeof x.values);
  for (uint32_t i = group.first + group.count; i-- > group.first;) {
    Thread& t = threads_[i];
    if (t.state == Thread::kExchange && t.site == site) {
      memcpy(x.values + t.position.lane * site.size, t.value, site.size);
      x.mask |= 1u << t.position.lane;
      t.exchange = &x;
      make_ready(t);
      group.waiting--;
      group.mask &= ~(1u << t.position.lane);
    }
  }
  simd_functions++;
  group.divergent = group.waiting > 0;
  return true;
}

void Worker::simd_barrier(const Site& site, uint32_t flags) {
  exchange(site, nullptr);
  Thread& me = *current_;
  me.simd_epoch[kDevice] += flags & 1;
  me.simd_epoch[kThreadgroup] += flags >> 1 & 1;
}

void Worker::barrier(const Site& site, uint32_t flags) {
  Thread& me = *current_;
  me.state = Thread::kBarrier;
  me.site = site;
  if (++at_barrier_ == alive_) {
    release_barrier();
  }
  switch_from(me);
  for (MemoryKind kind : {kThreadgroup, kDevice}) {
    uint32_t ordered = flags >> (kind == kThreadgroup ? 1 : 0) & 1;
    me.group_epoch[kind] += ordered;
    me.simd_epoch[kind] += ordered;
  }
}

void Worker::release_barrier() {
  const Thread* first = nullptr;
  bool same = true;
  for (const Thread& t : threads_) {
    if (t.state == Thread::kBarrier) {
      first = first ? first : &t;
      same = same && t.site == first->site;
    }
  }
  if (!same) {
    report_divergence(*first, "threads wait at different barriers");
  } else if (alive_ < threads_.size()) {
    report_divergence(
        *first,
        "barrier reached after " + std::to_string(threads_.size() - alive_) +
            " of " + std::to_string(threads_.size()) + " threads returned");
  }
  barriers++;
  at_barrier_ = 0;
  for (uint32_t i = threads_.size(); i-- > 0;) {
    if (threads_[i].state == Thread::kBarrier) {
      make_ready(threads_[i]);
    }
  }
}

// Finds threads to go on where nothing can run: some simdgroup is divergent, or
// all is done.
bool Worker::unblock() {
  bool any = false;
  for (Simdgroup& group : simdgroups_) {
    any |= complete_partially(group);
  }
  return any;
}

void Worker::finish() {
  Thread& me = *current_;
  Simdgroup& group = simdgroups_[me.position.simdgroup_index];
  me.state = Thread::kDone;
  group.alive--;
  alive_--;
  if (group.waiting && group.waiting == group.alive && !group.divergent) {
    complete(group);
  }
  if (at_barrier_ && at_barrier_ == alive_) {
    release_barrier();
  }
  switch_from(me);
}

void Worker::report_divergence(const Thread& at, const std::string& text) {
  Finding finding{};
  finding.kind = SIM_DIVERGENCE;
  finding.buffer = SIM_NO_BUFFER;
  finding.threadgroup = id_;
  finding.thread = at.position.thread_index;
  finding.place = {0, at.site.file, at.site.line};
  finding.text = text;
  launch_.report->add(finding);
}

uint8_t* Worker::threadgroup_variable(uint32_t id, uint64_t size) {
  uint8_t* data = threadgroup_memory_.variable(id, size);
  if (!data) {
    uint64_t total = threadgroup_memory_.bytes() + size;
    abandon(
        "threadgroup memory: " + std::to_string(total) +
        " bytes are needed, 32768 is the limit");
  }
  return data;
}

void Worker::abandon(const std::string& problem, uintptr_t pc) {
  std::string place = launch_.kernel->name;
  if (pc) {
    auto [file, line] = Lines(launch_.library).find(pc - launch_.library_base);
    place += line ? " at " + file + ":" + std::to_string(line) : "";
  }
  launch_.report->fail(
      place + ": " + problem + ", by threadgroup " + std::to_string(id_) +
      " thread " + std::to_string(current_->position.thread_index));
  void* nowhere;
  sim_switch(&nowhere, main_stack_pointer_);
  __builtin_unreachable();
}

}  // namespace sim
