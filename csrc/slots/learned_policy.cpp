#include "slots/learned_policy.h"

#include <cmath>

namespace glm_fused::slots {

namespace {

constexpr float kFollowerDecay = 0.99f;   // per request of the expert followed
constexpr double kFrequencyDecay = 0.96;  // per request
constexpr double kPrior = 16;  // requests for which frequency stands in
constexpr double kRate = 0.5;

}  // namespace

LearnedPolicy::LearnedPolicy(int experts)
    : experts_(experts),
      resident_(experts),
      used_(experts),
      followers_(static_cast<size_t>(experts) * experts),
      requests_(experts),
      frequency_(experts),
      last_use_(experts, -1),
      features_(experts),
      logits_(experts),
      follows_(experts),
      weights_{-std::log(experts), 1, 0, -0.5},
      squares_{1, 1, 1, 1} {
  request_.reserve(experts);
}

void LearnedPolicy::begin_request(const std::vector<int>& request) {
  used_.assign(experts_, false);
  for (int expert : request) {
    used_[expert] = true;
  }
  if (now_ >= 0) {
    learn();
  }
  now_++;
  count(request);
  request_ = request;
  predict();
}

void LearnedPolicy::learn() {
  Features gradient{};
  for (int e = 0; e < experts_; e++) {
    const double error = 1 / (1 + std::exp(-logits_[e])) - used_[e];
    for (int i = 0; i < kFeatures; i++) {
      gradient[i] += error * features_[e][i];
    }
  }
  for (int i = 0; i < kFeatures; i++) {
    const double step = gradient[i] / static_cast<double>(request_.size());
    squares_[i] += step * step;
    weights_[i] -= kRate * step / std::sqrt(squares_[i]);
  }
}

void LearnedPolicy::count(const std::vector<int>& request) {
  for (int leader : request_) {
    float* followers = &followers_[static_cast<size_t>(leader) * experts_];
    for (int e = 0; e < experts_; e++) {
      followers[e] = followers[e] * kFollowerDecay + (used_[e] ? 1.0f : 0.0f);
    }
    requests_[leader] = requests_[leader] * kFollowerDecay + 1;
  }
  for (int e = 0; e < experts_; e++) {
    frequency_[e] =
        frequency_[e] * kFrequencyDecay + used_[e] * (1 - kFrequencyDecay);
  }
  for (int expert : request) {
    last_use_[expert] = now_;
  }
}

void LearnedPolicy::predict() {
  follows_.assign(experts_, 0);
  for (int leader : request_) {
    const float* followers =
        &followers_[static_cast<size_t>(leader) * experts_];
    const double weight = 1 /
        ((requests_[leader] + kPrior) * static_cast<double>(request_.size()));
    for (int e = 0; e < experts_; e++) {
      follows_[e] += (followers[e] + kPrior * frequency_[e]) * weight;
    }
  }
  for (int e = 0; e < experts_; e++) {
    const double age = static_cast<double>(now_ - last_use_[e]);
    // Shares as multiples of 1 / experts, kept from the logarithm's pole.
    features_[e] = {
        1,
        std::log(0.5 + experts_ * follows_[e]),
        std::log(0.5 + experts_ * frequency_[e]),
        std::log(1 + age)};
    logits_[e] = 0;
    for (int i = 0; i < kFeatures; i++) {
      logits_[e] += weights_[i] * features_[e][i];
    }
  }
}

void LearnedPolicy::admit(int expert) {
  resident_[expert] = true;
}

void LearnedPolicy::drop(int expert) {
  resident_[expert] = false;
}

int LearnedPolicy::evict(const std::function<bool(int)>& evictable) {
  int victim = -1;
  for (int e = 0; e < experts_; e++) {
    if (resident_[e] && (victim < 0 || logits_[e] < logits_[victim]) &&
        evictable(e)) {
      victim = e;
    }
  }
  drop(victim);
  return victim;
}

}  // namespace glm_fused::slots
