#include "formats/bindings.h"

#include <nanobind/stl/unordered_map.h>

#include "binding_types.h"
#include "cpu/attention/attention_kernels.h"
#include "cpu/dot/matrix.h"
#include "cpu/runtime/scratch.h"
#include "cpu/runtime/thread_pool.h"
#include "deadline.h"
#include "headed_file.h"
#include "huge_pages.h"
#include "metal/compile.h"
#include "metal/kernel_list.h"
#include "metal/limits.h"
#include "mlx/scheduler.h"
#include "ops/bindings.h"
#include "shutdown.h"
#include "slots/bindings.h"
#ifdef GLM_FUSED_METAL_SIM
#include "sim/host/bindings.h"
#endif

namespace nb = nanobind;
using namespace nb::literals;
using namespace glm_fused;

NB_MODULE(_ext, m) {
  m.doc() = "Compiled kernels of glm_fused; call them through glm_fused.ops.";
  m.attr("built_with_mlx") = GLM_FUSED_MLX_VERSION;
  m.attr("metal_max_tokens") = metal::kMaxTokens;
  m.attr("built_with_nanobind") = GLM_FUSED_NANOBIND_VERSION;

  bind_formats(m);
  nb::enum_<Kernel>(m, "Kernel", "Which code runs an op: see ops.routes.")
      .value("cpu", Kernel::cpu, "This package's CPU kernels.")
      .value("metal", Kernel::metal, "This package's Metal kernels.")
      .value(
          "metal_prompt",
          Kernel::metal_prompt,
          "This package's Metal kernels for prompts, on matrix units.")
      .value("loops", Kernel::loops, "Plain loops, the reference.")
      .value("mlx", Kernel::mlx, "Stock MLX ops.");
  bind_ops(m);
  bind_blocks(m);
  bind_decode_step(m);
  bind_decoding(m);
  m.def(
      "take_metal_launches",
      &metal::take_launches,
      "How many launches of our kernels were encoded since the last call.");
  m.def(
      "metal_kernels",
      [] {
        nb::list list;
        for (const auto& kernel : metal::listed_kernels()) {
          nb::dict d;
          d["kernel"] = kernel.name;
          d["most_threads"] = kernel.most_threads;
          d["threadgroup_bytes"] = kernel.threadgroup_bytes;
          d["seconds"] = kernel.seconds;
          list.append(d);
        }
        return list;
      },
      nb::sig("def metal_kernels() -> list[dict[str, object]]"),
      "The Metal kernels that have been compiled, with what compiling took.");
  m.def(
      "compile_kernels",
      &metal::compile_kernels,
      "outputs"_a,
      "progress"_a,
      nb::call_guard<nb::gil_scoped_release>(),
      "Compile the Metal kernels that evaluating ``outputs`` would launch.\n\n"
      "Nothing is evaluated. Returns how many were not there already; "
      "``progress``"
      "\nis called with how many are done, from 0 on, and of how many.");
  m.def(
      "moe_decode_obstacle",
      [](int tokens, int top_k) {
        return metal::moe_decode_obstacle(tokens, top_k);
      },
      "tokens"_a,
      "top_k"_a,
      "Why moe_decode has no Metal kernel for these counts; empty if it has.");
  m.def(
      "router_topk_obstacle",
      [](int experts) { return metal::router_topk_obstacle(experts); },
      "experts"_a,
      "Why router_topk has no Metal kernel for this count; empty if it has.");
  m.def(
      "mla_prompt_takes",
      &metal::mla_prompt_takes,
      "rank"_a,
      "rope"_a,
      "Whether a prompt's attention on Metal takes rows so wide.");
  m.def(
      "index_prompt_takes",
      &metal::index_prompt_takes,
      "dim"_a,
      "Whether a prompt's indexer on Metal takes keys of so many dimensions.");
  m.def(
      "index_scratch_bytes",
      &metal::index_scratch_bytes,
      "queries"_a,
      "keys"_a,
      "top_k"_a,
      "The scratch memory with which indexer_topk takes so many queries of a "
      "sequence on Metal.");
  m.def(
      "sparse_mla_decode_obstacle",
      [](int listed) { return metal::sparse_mla_decode_obstacle(listed); },
      "listed"_a,
      "Why sparse_mla_decode has no Metal kernel for lists of this length; "
      "empty "
      "if it has.");
  m.def(
      "num_threads",
      &cpu::num_threads,
      "Threads of the CPU kernels; ValueError if GLM_FUSED_NUM_THREADS is "
      "bad.");
  m.def(
      "set_num_threads",
      &cpu::set_num_threads,
      "n"_a,
      "Set the threads of the CPU kernels, 1 to 1024; ValueError for others.");
  nb::class_<Deadline>(
      m, "Deadline", "Ends the process unless it is lifted in time.")
      .def(
          nb::init<double, std::string, int>(),
          "seconds"_a,
          "last_words"_a,
          "code"_a,
          "The process writes its last words to stderr and exits with a code, "
          "whoever holds\nPython's lock.")
      .def("lift", &Deadline::lift, "It has come in time.");
  m.def(
      "stream_read",
      [](mx::array a) {
        a.eval();
        nb::gil_scoped_release release;
        return cpu::stream_read(a);
      },
      "a"_a,
      "Read the array's bytes once on all threads: the yardstick of "
      "benchmarks.");
  m.def(
      "huge_page_setting",
      &huge_page_setting,
      "What the system's owner chose for huge pages: always, madvise or never; "
      "empty\nwhere the system has none.");
  m.def(
      "move_to_huge_pages",
      [](mx::array a) {
        a.eval();
        nb::gil_scoped_release release;
        return move_to_huge_pages(a.data<uint8_t>(), a.nbytes());
      },
      "a"_a,
      "Move the array's bytes to huge pages where the system lets; returns how "
      "many.");
  m.def(
      "load_with_header",
      &load_with_header,
      "path"_a,
      "header"_a,
      "The arrays that ``header``, the text of a safetensors header, describes "
      "in a\nfile of another format, from whose beginning its offsets count. "
      "Each is read when\nit is first evaluated. RuntimeError if the file "
      "cannot be opened.");
  m.def(
      "multiply_adds",
      [](int64_t rounds) {
        nb::gil_scoped_release release;
        return cpu::multiply_adds(rounds);
      },
      "rounds"_a,
      "Multiply-adds in registers on all threads; returns how many.");
  m.def(
      "cpu_kernels",
      [] { return std::string(cpu::kernels().name); },
      "The instruction set of the CPU kernels: avx512, avx2 or portable.");
  m.def(
      "peak_scratch_bytes",
      &cpu::peak_scratch_bytes,
      "The most bytes that CPU kernels have held besides arrays, since the "
      "start "
      "or the last reset.");
  m.def(
      "reset_peak_scratch",
      &cpu::reset_peak_scratch,
      "Have ``peak_scratch_bytes`` begin anew, with what is held now.");
  m.def(
      "active_tasks",
      [] { return mx::scheduler::n_active_tasks(); },
      "Tasks that MLX counts as running; what an error cuts short it counts "
      "for "
      "good.");
  nb::module_::import_("atexit").attr("register")(
      nb::cpp_function(&park_threads_that_unwind));
  slots::bind(m);
#ifdef GLM_FUSED_METAL_SIM
  bind_simulator(m);
#endif
}
