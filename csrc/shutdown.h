// This decides what becomes of threads that still compute when the interpreter
// ends.
#pragma once

namespace glm_fused {

// Call while the interpreter still runs, at the start of its end.
//
// CPython before 3.14 ends a daemon thread that comes back for the GIL by
// pthread_exit. glibc unwinds the thread's stack for that, and the unwinding
// meets the destructor that takes the GIL back after MLX's evaluation, which
// must not throw: std::terminate, and the process aborts whatever exit code was
// asked for. From now on such a thread waits for the end of the process.
void park_threads_that_unwind();

}  // namespace glm_fused
