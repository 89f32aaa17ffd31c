// Makes concurrent requests on one bank, for ThreadSanitizer
// (tests/test_slots.py).
//
//   slots_stress FILE EXPERTS SLOTS SPARES POLICY SEED
//
// FILE holds EXPERTS experts of two parts, of 4096 and 100 bytes, every byte of
// an expert being its number; every eighth is looked for past the file's end
// and fails. Prints the number of requests served.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <thread>

#include "slots/bank.h"

using namespace glm_fused::slots;

namespace {

constexpr int kThreads = 4, kRequests = 400, kTopK = 3;
constexpr int64_t kBytes[2] = {4096, 100};

struct Fixture {
  int experts, slots;
  std::vector<std::byte> memory[2];
  std::unique_ptr<Bank> bank;

  Fixture(char** argv)
      : experts(std::atoi(argv[2])), slots(std::atoi(argv[3])) {
    const int64_t size = std::filesystem::file_size(argv[1]);
    BankOptions options;
    options.layer = 3;
    options.files = std::make_shared<Files>(
        std::vector<std::string>{argv[1]}, std::vector<int64_t>{size}, false);
    for (int i = 0; i < 2; i++) {
      memory[i].resize(slots * kBytes[i]);
      options.parts.push_back({kBytes[i], memory[i].data()});
    }
    for (int64_t e = 0; e < experts; e++) {
      options.locations.push_back({0, e * (kBytes[0] + kBytes[1])});
      // Every eighth expert cannot be read.
      const int64_t second = e * (kBytes[0] + kBytes[1]) + kBytes[0];
      options.locations.push_back({0, e % 8 == 7 ? size : second});
    }
    bank = std::make_unique<Bank>(
        std::make_shared<Reader>(3, 4096),
        std::move(options),
        std::make_unique<SlotTable>(
            experts,
            slots,
            std::atoi(argv[4]),
            make_policy(argv[5], experts, slots, {1})));
  }

  void check(int expert, int slot) const {
    for (int i = 0; i < 2; i++) {
      for (int64_t b = 0; b < kBytes[i]; b++) {
        if (memory[i][slot * kBytes[i] + b] != std::byte(expert)) {
          std::fprintf(stderr, "slot %d is not expert %d\n", slot, expert);
          std::abort();
        }
      }
    }
  }
};

// Checks each slot once it is read; counts in `partial` the times that others
// were still being read.
void take_each(
    Fixture& f,
    const int32_t* experts,
    const int32_t* slots,
    std::atomic<int>& partial) {
  std::vector<int> pending(slots, slots + kTopK);
  while (!pending.empty()) {
    const auto ready = f.bank->take(pending);
    if (ready.empty()) {
      std::abort();
    }
    for (int slot : ready) {
      f.check(experts[std::find(slots, slots + kTopK, slot) - slots], slot);
    }
    partial += !pending.empty();
  }
}

void serve(
    Fixture& f,
    int seed,
    std::atomic<int>& served,
    std::atomic<int>& partial,
    std::atomic<int>& taken_back) {
  std::mt19937 random(seed);
  for (int i = 0; i < kRequests; i++) {
    int32_t experts[kTopK], slots[kTopK];
    bool readable = true;
    for (int& e : experts) {
      // Most are among a few, so that there are hits.
      e = static_cast<int>(random() % (random() % 4 ? 6 : f.experts));
      readable &= e % 8 != 7;
    }
    if (i % 5 == 0) {
      f.bank->prefetch(experts, kTopK);
    }
    // It does as a graph does: it takes a lease that is open, if there is one,
    // and holds it when its turn comes.
    auto lease = f.bank->try_acquire(experts, 1, kTopK, slots);
    if (i % 17 == 0) {
      continue;  // a graph that is dropped while its experts are read
    }
    if (i % 3 == 0) {
      std::this_thread::yield();  // others may take the lease back
    }
    if (!lease || !f.bank->hold(*lease)) {
      taken_back += lease != nullptr;
      const bool again = lease != nullptr;
      lease.reset();
      lease = f.bank->acquire(experts, 1, kTopK, slots, again);
    }
    try {
      take_each(f, experts, slots, partial);
    } catch (const std::runtime_error&) {
      if (readable) {
        std::abort();
      }
      continue;
    }
    if (!readable) {
      std::abort();
    }
    f.bank->wait(slots, kTopK);
    for (int j = 0; j < kTopK; j++) {
      f.check(experts[j], slots[j]);
    }
    served++;
  }
}

}  // namespace

int main(int, char** argv) {
  Fixture fixture(argv);
  std::atomic<int> served{0}, partial{0}, taken_back{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; i++) {
    threads.emplace_back([&, i] {
      serve(fixture, std::atoi(argv[6]) + i, served, partial, taken_back);
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  const BankStats stats = fixture.bank->stats();
  if (stats.hits == 0 || stats.misses == 0 || partial == 0 ||
      (fixture.slots == kTopK + 1 && taken_back == 0)) {
    std::abort();
  }
  std::printf("%d\n", served.load());
}
