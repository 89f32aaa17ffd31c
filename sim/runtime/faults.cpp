#include "faults.h"

#include <signal.h>
#include <ucontext.h>

#include <iterator>
#include <mutex>

#include "fiber.h"

namespace sim {
namespace {

constexpr size_t kAlternateStack = 256 * 1024;
constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
constexpr int kCount = std::size(kSignals);
struct sigaction previous[kCount];

uintptr_t program_counter(const void* context) {
  auto* machine = &static_cast<const ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  return machine->gregs[REG_RIP];
#else
  return machine->pc;
#endif
}

// The fault came from compiled shader code, which holds no locks, so the
// handler may allocate, and may leave by switching away from the fiber.
void on_fault(int signal, siginfo_t* info, void* context) {
  Worker* worker = Worker::running();
  if (!worker) {
    // The fault is not ours: the previous handler sees it when the instruction
    // runs again.
    for (int i = 0; i < kCount; i++) {
      if (kSignals[i] == signal) {
        sigaction(signal, &previous[i], nullptr);
      }
    }
    return;
  }
  auto address = uint64_t(info->si_addr);
  std::string problem = signal == SIGFPE ? "integer division by zero"
      : signal == SIGILL || signal == SIGTRAP
      ? "undefined behaviour, such as an index outside an array"
      : worker->on_guard_page(address)
      ? "a thread's stack overflows 64 KB"
      : "stray access: " + worker->launch().memory->describe(address);
  worker->abandon(problem, program_counter(context) + 1);
}

void install() {
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < kCount; i++) {
    sigaction(kSignals[i], &action, &previous[i]);
  }
}

}  // namespace

struct FaultGuard::Stack {
  std::unique_ptr<char[]> memory{new char[kAlternateStack]};
  stack_t before{};
};

FaultGuard::FaultGuard() : stack_(std::make_unique<Stack>()) {
  static std::once_flag once;
  std::call_once(once, install);
  stack_t now{};
  now.ss_sp = stack_->memory.get();
  now.ss_size = kAlternateStack;
  sigaltstack(&now, &stack_->before);
}

FaultGuard::~FaultGuard() {
  sigaltstack(&stack_->before, nullptr);
}

}  // namespace sim
