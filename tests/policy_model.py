"""Eviction policies in plain Python, written as their definitions say."""

import math

import numpy as np


class Lru:
    def __init__(self, experts, pinned=()):
        self.order, self.pinned = [], set(pinned)

    def begin_request(self, experts):
        pass

    def use(self, expert):
        if expert in self.order:
            self.order.remove(expert)
        self.order.append(expert)

    def victims(self):
        """The experts that may give way, the first to go first."""
        return [e for e in self.order if e not in self.pinned]


class Learned:
    def __init__(self, experts, pinned=()):
        self.experts, self.now, self.request = experts, -1, []
        self.followers = np.zeros((experts, experts), np.float32)
        self.requests, self.frequency = [0.0] * experts, [0.0] * experts
        self.last_use = [-1] * experts
        self.weights, self.squares = [-math.log(experts), 1.0, 0.0, -0.5], [1.0] * 4

    def begin_request(self, experts):
        if self.now >= 0:
            self._learn(set(experts))
        self.now += 1
        for leader in self.request:
            self.followers[leader] *= np.float32(0.99)
            self.followers[leader, experts] += np.float32(1)
            self.requests[leader] = self.requests[leader] * float(np.float32(0.99)) + 1
        for e in range(self.experts):
            self.frequency[e] = self.frequency[e] * 0.96 + (e in experts) * (1 - 0.96)
        for e in experts:
            self.last_use[e] = self.now
        self.request = list(experts)
        self.features = [self._features(e) for e in range(self.experts)]
        self.logits = [self._logit(f) for f in self.features]

    def _learn(self, used):
        for i in range(4):
            gradient = 0.0
            for e, logit in enumerate(self.logits):
                gradient += (1 / (1 + math.exp(-logit)) - (e in used)) * self.features[e][i]
            step = gradient / len(self.request)
            self.squares[i] += step * step
            self.weights[i] -= 0.5 * step / math.sqrt(self.squares[i])

    def _features(self, e):
        follows = 0.0
        for leader in self.request:
            weight = 1 / ((self.requests[leader] + 16) * len(self.request))
            follows += (float(self.followers[leader, e]) + 16 * self.frequency[e]) * weight
        return [
            1.0,
            math.log(0.5 + self.experts * follows),
            math.log(0.5 + self.experts * self.frequency[e]),
            math.log(1 + self.now - self.last_use[e]),
        ]

    def _logit(self, features):
        logit = 0.0
        for weight, feature in zip(self.weights, features, strict=True):
            logit += weight * feature
        return logit

    def use(self, expert):
        pass

    def victims(self):
        return sorted(range(self.experts), key=self.logits.__getitem__)


POLICIES = {"learned": Learned, "lru": Lru, "pinned": Lru}


class Table:
    """Which experts are resident in a bank of ``slots``."""

    def __init__(self, policy, experts, slots, pinned=()):
        self.policy = POLICIES[policy](experts, pinned if policy == "pinned" else ())
        self.slots, self.resident = slots, set()

    def reserve(self, experts, leased):
        """Make ``experts`` resident; those ``leased`` stay."""
        self.policy.begin_request(experts)
        hits = [e for e in experts if e in self.resident]
        for e in hits:
            self.policy.use(e)
        for e in experts:
            if e in hits:
                continue
            if len(self.resident) == self.slots:
                self.resident.remove(self._victim({*experts, *leased}))
            self.resident.add(e)
            self.policy.use(e)

    def _victim(self, kept):
        return next(e for e in self.policy.victims() if e in self.resident - kept)
