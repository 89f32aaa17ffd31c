// Every allocation of a bank's requests fails in turn, alone or with all that
// follow (tests/test_crashes.py).
//
//   slots_memory FILE POLICY
//
// FILE is as for slots_stress. Each request gives the right slots or one error,
// and the next one is served. Prints how many requests failed.
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <new>

#include "slots/bank.h"

using namespace glm_fused::slots;

namespace {

std::atomic<int> left{0};  // allocations until one fails, 0 where none does
std::atomic<bool> onwards{false};

bool fails() {
  int now = left.load();
  while (now > 0) {
    const int next = now == 1 && onwards ? 1 : now - 1;
    if (left.compare_exchange_weak(now, next)) {
      return now == 1;
    }
  }
  return false;
}

constexpr int kExperts = 16, kSlots = 6, kSpares = 2;
constexpr int64_t kBytes[2] = {4096, 100};
std::vector<std::byte> memory[2];

void check(const int32_t* experts, const int32_t* slots, int count) {
  for (int i = 0; i < count; i++) {
    for (int part = 0; part < 2; part++) {
      if (memory[part][slots[i] * kBytes[part]] != std::byte(experts[i])) {
        std::fprintf(stderr, "expert %d is not in its slot\n", experts[i]);
        std::abort();
      }
    }
  }
}

void request(Bank& bank, const int32_t* experts) {
  int32_t slots[3];
  bank.prefetch(experts + 1, 2);
  auto lease = bank.try_acquire(experts, 1, 3, slots);
  if (!lease || !bank.hold(*lease)) {
    lease = bank.acquire(experts, 1, 3, slots);
  }
  bank.wait(slots, 3);
  check(experts, slots, 3);
}

// Serves a request once there is memory again. It may meet reads that began
// without, and is then made again.
void serve(Bank& bank, const int32_t* experts) {
  for (int tries = 3;; tries--) {
    try {
      request(bank, experts);
      return;
    } catch (const std::runtime_error&) {
      if (tries == 1) {
        throw;
      }
    }
  }
}

}  // namespace

void* operator new(size_t bytes) {
  void* memory = fails() ? nullptr : std::malloc(bytes);
  if (!memory) {
    throw std::bad_alloc();
  }
  return memory;
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, size_t) noexcept {
  std::free(memory);
}

int main(int, char** argv) {
  alarm(120);  // ends the program where a slot loads for ever
  const int64_t size = std::filesystem::file_size(argv[1]);
  BankOptions options;
  options.layer = 3;
  options.files = std::make_shared<Files>(
      std::vector<std::string>{argv[1]}, std::vector<int64_t>{size}, false);
  options.patience = std::chrono::milliseconds(5000);
  for (int i = 0; i < 2; i++) {
    memory[i].resize(kSlots * kBytes[i]);
    options.parts.push_back({kBytes[i], memory[i].data()});
  }
  for (int64_t e = 0; e < kExperts; e++) {
    options.locations.push_back({0, e * (kBytes[0] + kBytes[1])});
    options.locations.push_back({0, e * (kBytes[0] + kBytes[1]) + kBytes[0]});
  }
  auto policy = make_policy(argv[2], kExperts, kSlots - kSpares, {1});
  auto table =
      std::make_unique<SlotTable>(kExperts, kSlots, kSpares, std::move(policy));
  Bank bank(
      std::make_shared<Reader>(2, 4096), std::move(options), std::move(table));
  bank.take_requests();  // records
  int failed = 0;
  for (int n = 0; n < 240; n++) {
    const int32_t experts[3] = {n % 16, (n * 7 + 3) % 16, (n * 5 + 9) % 16};
    onwards = n % 2;
    left = 1 + n / 3;
    try {
      request(bank, experts);
    } catch (const std::exception&) {
      failed++;
    }
    left = 0;
    serve(bank, experts);
  }
  std::printf("%d\n", failed);
}
