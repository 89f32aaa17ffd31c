// Decides what becomes of threads that still compute when the interpreter ends.
#pragma once

namespace glm_fused {

// Has threads wait for the end of the process where CPython would unwind them.
// It is called while the interpreter still runs, when it begins to end.
//
// CPython before 3.14 ends a daemon thread that comes back for the GIL by
// pthread_exit. glibc unwinds the thread's stack for that, and the unwinding
// meets the destructor that takes the GIL back after MLX's evaluation, which
// must not throw. So std::terminate is called, and the process aborts whatever
// exit code was asked for.
void park_threads_that_unwind();

}  // namespace glm_fused
