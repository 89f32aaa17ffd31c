// Counts the instructions that other threads execute in a range of addresses:
// each traps after every instruction, so this needs no counters of the
// processor's, no permission, and knows every instruction set. x86-64 Linux.
#include <dirent.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace {

constexpr long long kTrapFlag = 0x100;

uintptr_t low, high;
std::atomic<uint64_t> executed{0};
std::atomic<int> trapping{0};
std::atomic<bool> counting{false};

void set_trap(void* context, bool on) {
  auto& flags = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_EFL];
  flags = on ? flags | kTrapFlag : flags & ~kTrapFlag;
}

void begin(int, siginfo_t*, void* context) {
  set_trap(context, true);
  trapping++;
}

// Comes before each instruction.
void step(int, siginfo_t*, void* context) {
  if (!counting.load(std::memory_order_relaxed)) {
    set_trap(context, false);
    return;
  }
  const auto at = static_cast<uintptr_t>(
      static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
  if (low <= at && at < high) {
    executed.fetch_add(1, std::memory_order_relaxed);
  }
}

void handle(int signal, void (*handler)(int, siginfo_t*, void*)) {
  struct sigaction action = {};
  action.sa_sigaction = handler;
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  sigaction(signal, &action, nullptr);
}

}  // namespace

// Has every thread but the caller's trap from now on.
extern "C" void begin_counting(uint64_t from, uint64_t to) {
  low = from;
  high = to;
  executed = 0;
  trapping = 0;
  counting = true;
  handle(SIGTRAP, step);
  handle(SIGUSR1, begin);
  const pid_t process = getpid(), self = gettid();
  int asked = 0;
  DIR* threads = opendir("/proc/self/task");
  while (const dirent* entry = readdir(threads)) {
    const pid_t thread = std::atoi(entry->d_name);
    if (thread > 0 && thread != self) {
      asked += syscall(SYS_tgkill, process, thread, SIGUSR1) == 0;
    }
  }
  closedir(threads);
  while (trapping < asked) {
    usleep(100);
  }
}

// Returns how many instructions in the range the threads have executed.
extern "C" uint64_t end_counting() {
  counting = false;
  return executed;
}
