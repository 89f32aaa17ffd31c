// A policy decides which resident expert gives way to one that is needed.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace glm_fused::slots {

// This is one layer's policy. It is not thread-safe: a bank calls it under its
// lock. All its memory is allocated when it is made, and no call below throws,
// so that a failed allocation never leaves a request half way.
class Policy {
 public:
  virtual ~Policy() = default;

  // Is called before the hits, evictions and admissions of a request for
  // `experts`, which differ.
  virtual void begin_request(const std::vector<int>&) {}
  // Is told that a request used a resident expert.
  virtual void hit(int expert) = 0;
  // Is told that the expert has become resident.
  virtual void admit(int expert) = 0;
  // Is told that the expert is no longer resident, which the policy did not
  // choose.
  virtual void drop(int expert) = 0;
  // Takes out and returns a resident expert for which `evictable` holds. It is
  // called only if there is one that `may_evict`.
  virtual int evict(const std::function<bool(int)>& evictable) = 0;
  virtual bool may_evict(int) const {
    return true;
  }
  // Returns how many experts it never evicts.
  virtual int pinned() const {
    return 0;
  }
};

// Makes the policy `name`: learned, lru, s3fifo, or pinned (LRU over all
// experts but those in `pinned`). Throws std::invalid_argument for other names
// and impossible counts.
std::unique_ptr<Policy> make_policy(
    const std::string& name,
    int experts,
    int slots,
    const std::vector<int>& pinned);

}  // namespace glm_fused::slots
