// This policy keeps the experts that are likeliest to be in the next request.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "slots/policy.h"

namespace glm_fused::slots {

// A logistic regression, learned online from every request, gives the odds that
// an expert is in the next one, from how often it followed the experts of this
// one, how often it was used lately, and how long ago. It needs 4 * experts^2
// bytes.
class LearnedPolicy : public Policy {
 public:
  explicit LearnedPolicy(int experts);

  void begin_request(const std::vector<int>& experts) override;
  void hit(int) override {}
  void admit(int expert) override;
  void drop(int expert) override;
  int evict(const std::function<bool(int)>& evictable) override;

 private:
  static constexpr int kFeatures = 4;
  using Features = std::array<double, kFeatures>;

  // Takes a gradient step (AdaGrad) from what the last request foretold.
  void learn();
  // Counts who followed whom and who was used.
  void count(const std::vector<int>& request);
  void predict();

  const int experts_;
  std::vector<bool> resident_;
  std::vector<int> request_;       // the latest
  std::vector<bool> used_;         // in it
  std::vector<float> followers_;   // [expert, follower], decayed counts
  std::vector<double> requests_;   // of an expert, decayed as its followers
  std::vector<double> frequency_;  // decayed share of requests
  std::vector<int64_t> last_use_;
  int64_t now_ = -1;
  std::vector<Features> features_;
  std::vector<double> logits_;   // of being in the next request
  std::vector<double> follows_;  // scratch: the shares of `predict`
  Features weights_, squares_;
};

}  // namespace glm_fused::slots
