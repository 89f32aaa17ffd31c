// Runs the kernels of compiled shaders (`python -m sim compile`) on the CPU.
//
// A shader library is a shared object that exports `sim_exports` and needs
// this executor; load the executor first, with its symbols global (link to it,
// or dlopen it with RTLD_GLOBAL). `python -m sim runtime` prints its path.
//
//   sim_library* library = sim_open("kernels.so", error, sizeof error);
//   int yes = 1;
//   sim_constant constants[] = {{.index = 20, .value = &yes, .size = 1}};
//   sim_pipeline* pipeline =
//       sim_specialize(library, "copy", constants, 1, error, sizeof error);
//   sim_buffer buffers[] = {{.index = 0, .data = x, .size = 64}, …};
//   sim_dispatch dispatch = {.groups = {2, 1, 1}, .group = {32, 1, 1}, …};
//   sim_report* report = sim_launch(pipeline, &dispatch);
//   if (sim_report_error(report)) …
//   sim_report_free(report);
//
// Every function may be called from any thread, also at the same time;
// launches do not share state. Nothing is kept of the pointers passed in.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sim_library sim_library;
typedef struct sim_pipeline sim_pipeline;
typedef struct sim_report sim_report;

enum sim_argument_kind {
  SIM_BUFFER = 0,       // a device or constant pointer or reference
  SIM_THREADGROUP = 1,  // threadgroup memory, sized by the dispatch
  SIM_POSITION = 2,     // a grid or thread position; index is -1
};

typedef struct {
  int32_t kind;
  int32_t index;
  int32_t writable;
  int32_t reference;
  const char* name;
  const char* type;   // as spelled in the source
  const char* space;  // "device", "constant", "threadgroup" or ""
} sim_argument;

typedef struct {
  const char* name;  // the host name
  void (
      *entry)(const uint64_t* buffers, const uint64_t* groups, const void* at);
  const sim_argument* arguments;
  uint32_t argument_count;
  // Gives its max_total_threads_per_threadgroup; null where it has none.
  uint32_t (*most_threads)(void);
} sim_kernel;

typedef struct {
  const char* name;
  const char* type;
  int32_t index;
  uint32_t size;  // bytes
  void* storage;
} sim_function_constant;

// A shader library exports one of these as `sim_exports`.
typedef struct {
  const sim_kernel* kernels;
  const sim_function_constant* constants;
  uint32_t kernel_count;
  uint32_t constant_count;
  uint32_t traced;  // compiled so that its memory accesses can be traced
} sim_contents;

// Opens a compiled shader library; on failure returns NULL, with the reason in
// `error`. A library stays loaded for the life of the process.
sim_library* sim_open(const char* path, char* error, size_t error_size);
const sim_contents* sim_library_contents(const sim_library* library);

// A value for a function constant, which is found by index, or by name where
// the index is -1.
typedef struct {
  int32_t index;
  const char* name;
  const void* value;
  size_t size;  // bytes; must be the constant's own
} sim_constant;

// Returns a kernel with its function constants set; those not named are zero.
// Equal requests give the same pipeline, which is never freed. Returns NULL on
// failure.
sim_pipeline* sim_specialize(
    sim_library* library,
    const char* kernel,
    const sim_constant* constants,
    size_t constant_count,
    char* error,
    size_t error_size);

// Returns how many threads a threadgroup of the kernel may have: what its
// attribute says, or 1024.
uint32_t sim_most_threads(const sim_pipeline* pipeline);

typedef struct {
  int32_t index;
  void* data;
  uint64_t size;   // bytes
  uint32_t phase;  // the copy's address modulo 16
} sim_buffer;

typedef struct {
  uint32_t groups[3];  // threadgroups; with `threads` set: threads in the grid
  uint32_t group[3];   // threads in a threadgroup, at most sim_most_threads
  uint32_t threads;    // 1: dispatchThreads, with ragged last threadgroups
  // Buffers may overlap, as with a donated input. A buffer that no entry names
  // reads as zeroes through a reference and is an error through a pointer.
  // Bytes that are set inline (setBytes) are a buffer too.
  const sim_buffer* buffers;
  uint32_t buffer_count;
  const sim_buffer* threadgroup_memory;  // index and size; data is ignored
  uint32_t threadgroup_memory_count;
  // With 0, threads run in a fixed order; else in a pseudo-random one of this
  // seed.
  uint64_t seed;
  uint32_t workers;  // OS threads, untraced only; 0 and 1 both mean one
  // With 1, the kernel runs on the caller's memory; with 0, on copies whose
  // ends meet guard pages, so that a stray access is an error with a name. The
  // copies are copied back afterwards.
  uint32_t in_place;
} sim_dispatch;

// Runs the kernel to its end. The result is never NULL; free it.
sim_report* sim_launch(sim_pipeline* pipeline, const sim_dispatch* dispatch);

enum sim_finding_kind {
  SIM_RACE = 0,
  SIM_OUT_OF_BOUNDS = 1,
  SIM_UNINITIALISED = 2,  // threadgroup memory read before it is written
  SIM_DIVERGENCE = 3,  // threads wait at different barriers or simd functions
  SIM_MISALIGNED = 4,  // an address that is no multiple of the type's alignment
};

enum { SIM_THREADGROUP_MEMORY = -1, SIM_NO_BUFFER = -2 };

// A finding stands for all that are equal to it, of the same kind, places and
// buffer: they are counted, and the rest tells of the first.
typedef struct {
  int32_t kind;
  int32_t buffer;  // index, or SIM_THREADGROUP_MEMORY, or SIM_NO_BUFFER
  int64_t offset;  // byte in the buffer
  uint64_t count;
  uint32_t threadgroup, thread;              // linear ids
  uint32_t other_threadgroup, other_thread;  // races: the earlier access
  const char* file;                          // "" where not known
  uint32_t line;
  const char* other_file;
  uint32_t other_line;
  const char* text;  // one line that says it all
} sim_finding;

// The bytes of one buffer that were accessed, with each access counted, and
// with each byte counted once.
typedef struct {
  int32_t buffer;
  uint64_t read, written;
  uint64_t unique_read, unique_written;
} sim_traffic;

typedef struct {
  uint64_t threadgroups, threads;
  uint64_t simd_functions, barriers;
  uint64_t threadgroup_bytes;  // of threadgroup memory, per threadgroup
  // Bytes of threadgroup memory that were accessed; of a traced launch.
  uint64_t threadgroup_read, threadgroup_written;
  double seconds;
} sim_counts;

// Returns why the launch failed or stopped early (a stray access, bad
// arguments), or NULL. An untraced launch finds divergence alone and has no
// traffic.
const char* sim_report_error(const sim_report* report);
const sim_finding* sim_report_findings(const sim_report* report, size_t* count);
const sim_traffic* sim_report_traffic(const sim_report* report, size_t* count);
const sim_counts* sim_report_counts(const sim_report* report);
void sim_report_free(sim_report* report);

#ifdef __cplusplus
}
#endif
