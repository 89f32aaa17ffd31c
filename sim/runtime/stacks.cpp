#include "stacks.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

#if defined(__x86_64__)
asm(R"(
.text
.globl sim_switch
.type sim_switch, @function
sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sim_switch, .-sim_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl sim_switch
.type sim_switch, %function
sim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size sim_switch, .-sim_switch
)");
#else
#error "no context switch for this processor"
#endif

namespace sim {

void* fresh_stack(uint8_t* top, void (*entry)()) {
#if defined(__x86_64__)
  auto* at = reinterpret_cast<uint64_t*>(top);
  *--at = 0;  // aligns the stack as after a call
  *--at = reinterpret_cast<uint64_t>(entry);
  at -= 6;
  memset(at, 0, 6 * sizeof *at);
#else
  auto* at = reinterpret_cast<uint64_t*>(top) - 20;
  memset(at, 0, 20 * sizeof *at);
  at[11] = reinterpret_cast<uint64_t>(entry);
#endif
  return at;
}

Stacks::Stacks(size_t count) : size_(count * (kStack + kPage)) {
  void* map = mmap(
      nullptr,
      size_,
      PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
      -1,
      0);
  if (map == MAP_FAILED) {
    throw std::bad_alloc();
  }
  base_ = static_cast<uint8_t*>(map);
  for (size_t i = 0; i < count; i++) {
    mprotect(base_ + i * (kStack + kPage), kPage, PROT_NONE);
  }
}

Stacks::~Stacks() {
  munmap(base_, size_);
}

}  // namespace sim
