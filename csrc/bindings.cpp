#include "formats/bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "cpu/attention/attention_kernels.h"
#include "cpu/dot/matrix.h"
#include "cpu/runtime/thread_pool.h"
#include "metal/compile.h"
#include "metal/kernel_list.h"
#include "metal/limits.h"
#include "mlx/scheduler.h"
#include "ops.h"
#include "ops/bindings.h"
#include "ops/metal_blocks.h"
#include "ops/placement.h"
#include "shutdown.h"
#include "slots/bindings.h"
#ifdef GLM_FUSED_METAL_SIM
#include "sim/host/bindings.h"
#endif

namespace nb = nanobind;
using namespace nb::literals;
using namespace glm_fused;

namespace {

// This is glm_fused.ops.Weight: planes and format. It takes a sequence, because
// the caster of a std::vector is noexcept: it ends the process where memory
// runs out.
using WeightTuple =
    std::tuple<nb::typed<nb::sequence, mx::array>, const FormatSpec*>;

Weight weight(const WeightTuple& t) {
  std::vector<mx::array> planes;
  for (nb::handle plane : std::get<0>(t)) {
    if (!nb::isinstance<mx::array>(plane)) {
      throw nb::type_error("a plane of a weight must be an array.");
    }
    planes.push_back(nb::cast<const mx::array&>(plane));
  }
  return {std::move(planes), std::get<1>(t)};
}

// Gate, up and down.
using MlpTuple = std::tuple<WeightTuple, WeightTuple, WeightTuple>;

Mlp mlp(const MlpTuple& t) {
  return {
      weight(std::get<0>(t)), weight(std::get<1>(t)), weight(std::get<2>(t))};
}

// The weight and eps of a norm.
using NormTuple = std::tuple<mx::array, float>;

Norm norm(const NormTuple& t) {
  return {std::get<0>(t), std::get<1>(t)};
}

// The code that runs an op (glm_fused.ops.routes).
enum class Kernel { cpu, metal, loops, mlx };

bool is_reference(Kernel kernel) {
  return kernel == Kernel::loops;
}

// Returns the stream that is asked for, or the default one of the kernel's
// device.
mx::StreamOrDevice on(Kernel kernel, const mx::StreamOrDevice& asked) {
  if (kernel == Kernel::mlx) {
    throw std::invalid_argument("[ops] MLX's own ops are not called here.");
  }
  if (kernel == Kernel::metal) {
    return metal_stream(asked);
  }
  const mx::Device cpu(mx::Device::cpu);
  if (std::holds_alternative<std::monostate>(asked)) {
    return cpu;
  }
  const mx::Stream stream = mx::to_stream(asked);
  return stream.device == cpu ? mx::StreamOrDevice(stream) : cpu;
}

}  // namespace

NB_MODULE(_ext, m) {
  m.doc() = "Compiled kernels of glm_fused; call them through glm_fused.ops.";
  m.attr("built_with_mlx") = GLM_FUSED_MLX_VERSION;
  m.attr("metal_max_tokens") = metal::kMaxTokens;
  m.attr("built_with_nanobind") = GLM_FUSED_NANOBIND_VERSION;

  bind_formats(m);
  nb::enum_<Kernel>(m, "Kernel", "Which code runs an op: see ops.routes.")
      .value("cpu", Kernel::cpu, "This package's CPU kernels.")
      .value("metal", Kernel::metal, "This package's Metal kernels.")
      .value("loops", Kernel::loops, "Plain loops, the reference.")
      .value("mlx", Kernel::mlx, "Stock MLX ops.");
  m.def(
      "probe",
      [](const mx::array& a) { return a; },
      "a"_a,
      "Return `a`: fails where this build and the installed mlx disagree.");
  m.def(
      "check_tokens",
      [](const mx::array& tokens, int vocabulary) {
        return check_tokens(tokens, vocabulary, mx::Device::cpu);
      },
      "tokens"_a,
      "vocabulary"_a,
      "`tokens` [b, l]; raises where one is outside the vocabulary, now or "
      "when they are evaluated.");
  m.def(
      "embed",
      [](const mx::array& tokens, const WeightTuple& table, int hidden) {
        return embed(tokens, weight(table), hidden, mx::Device::cpu);
      },
      "tokens"_a,
      "table"_a,
      "hidden"_a);
  m.def(
      "quantized_matvec",
      [](const mx::array& x,
         const WeightTuple& w,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return quantized_matvec(
            x, weight(w), is_reference(kernel), on(kernel, stream));
      },
      "x"_a,
      "w"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "moe_decode",
      [](const mx::array& x,
         const WeightTuple& gate,
         const WeightTuple& up,
         const WeightTuple& down,
         const mx::array& slots,
         const mx::array& scores,
         const slots::UseHandle* use,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return moe_decode(
            x,
            weight(gate),
            weight(up),
            weight(down),
            slots,
            scores,
            is_reference(kernel),
            use ? use->value->use() : nullptr,
            on(kernel, stream));
      },
      "x"_a,
      "gate"_a,
      "up"_a,
      "down"_a,
      "slots"_a,
      "scores"_a,
      "use"_a.none(),
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "swiglu",
      [](const mx::array& gate,
         const mx::array& up,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return swiglu(gate, up, on(kernel, stream));
      },
      "gate"_a,
      "up"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "expert_sum",
      [](const mx::array& y,
         const mx::array& scores,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return expert_sum(y, scores, on(kernel, stream));
      },
      "y"_a,
      "scores"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "rms_norm",
      [](const mx::array& x,
         const mx::array& weight,
         float eps,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return rms_norm(
            x, weight, eps, is_reference(kernel), on(kernel, stream));
      },
      "x"_a,
      "weight"_a,
      "eps"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "layer_norm",
      [](const mx::array& x,
         const mx::array& weight,
         const mx::array& bias,
         float eps,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return layer_norm(
            x, weight, bias, eps, is_reference(kernel), on(kernel, stream));
      },
      "x"_a,
      "weight"_a,
      "bias"_a,
      "eps"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "rotate",
      [](const mx::array& x,
         const mx::array& cosines,
         const mx::array& sines,
         bool interleaved,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return rotate(
            x,
            cosines,
            sines,
            interleaved,
            is_reference(kernel),
            on(kernel, stream));
      },
      "x"_a,
      "cosines"_a,
      "sines"_a,
      "interleaved"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "router_topk",
      [](const mx::array& x,
         const mx::array& weight,
         const mx::array& correction_bias,
         int top_k,
         int n_group,
         int topk_group,
         bool norm_topk_prob,
         float routed_scaling_factor,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return router_topk(
            x,
            weight,
            correction_bias,
            {top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor},
            is_reference(kernel),
            on(kernel, stream));
      },
      "x"_a,
      "weight"_a,
      "correction_bias"_a,
      "top_k"_a,
      "n_group"_a,
      "topk_group"_a,
      "norm_topk_prob"_a,
      "routed_scaling_factor"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "attention_project",
      [](const mx::array& x,
         const mx::array& cosines,
         const mx::array& sines,
         const NormTuple& input_norm,
         const WeightTuple& q_a,
         const NormTuple& q_a_norm,
         const WeightTuple& q_b,
         const WeightTuple& kv_a,
         const NormTuple& kv_a_norm,
         const WeightTuple& embed_q,
         int nope_dim,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        const AttentionProjections p{
            norm(input_norm),
            weight(q_a),
            norm(q_a_norm),
            weight(q_b),
            weight(kv_a),
            norm(kv_a_norm),
            weight(embed_q),
            nope_dim,
            std::nullopt};
        const auto project = kernel == Kernel::metal ? metal_attention_project
                                                     : attention_project;
        return project(x, p, cosines, sines, false, on(kernel, stream));
      },
      "x"_a,
      "cos"_a,
      "sin"_a,
      "input_norm"_a,
      "q_a"_a,
      "q_a_norm"_a,
      "q_b"_a,
      "kv_a"_a,
      "kv_a_norm"_a,
      "embed_q"_a,
      "nope_dim"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "full_attention_project",
      [](const mx::array& x,
         const mx::array& cosines,
         const mx::array& sines,
         const NormTuple& input_norm,
         const WeightTuple& q_a,
         const NormTuple& q_a_norm,
         const WeightTuple& q_b,
         const WeightTuple& kv_a,
         const NormTuple& kv_a_norm,
         const WeightTuple& embed_q,
         int nope_dim,
         const WeightTuple& wk,
         const NormTuple& k_norm,
         const mx::array& k_norm_bias,
         const WeightTuple& wq_b,
         const WeightTuple& weights_proj,
         int heads,
         bool interleaved,
         bool score,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        const AttentionProjections p{
            norm(input_norm),
            weight(q_a),
            norm(q_a_norm),
            weight(q_b),
            weight(kv_a),
            norm(kv_a_norm),
            weight(embed_q),
            nope_dim,
            IndexerProjections{
                weight(wk),
                norm(k_norm),
                k_norm_bias,
                weight(wq_b),
                weight(weights_proj),
                heads,
                interleaved}};
        const auto project = kernel == Kernel::metal ? metal_attention_project
                                                     : attention_project;
        return project(x, p, cosines, sines, score, on(kernel, stream));
      },
      "x"_a,
      "cos"_a,
      "sin"_a,
      "input_norm"_a,
      "q_a"_a,
      "q_a_norm"_a,
      "q_b"_a,
      "kv_a"_a,
      "kv_a_norm"_a,
      "embed_q"_a,
      "nope_dim"_a,
      "wk"_a,
      "k_norm"_a,
      "k_norm_bias"_a,
      "wq_b"_a,
      "weights_proj"_a,
      "heads"_a,
      "interleaved"_a,
      "score"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "append_rows",
      [](mx::array& buffer,
         const mx::array& rows,
         int at,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        const auto [whole, first] =
            append_rows(buffer, rows, at, on(kernel, stream));
        buffer.overwrite_descriptor(whole);
        return first;
      },
      "buffer"_a,
      "rows"_a,
      "at"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "append_pair",
      [](mx::array& buffer,
         const mx::array& rows,
         mx::array& other_buffer,
         const mx::array& other_rows,
         int at,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        const auto made = append_pair(
            buffer, rows, other_buffer, other_rows, at, on(kernel, stream));
        buffer.overwrite_descriptor(made[0]);
        other_buffer.overwrite_descriptor(made[1]);
        return std::pair(made[2], made[3]);
      },
      "buffer"_a,
      "rows"_a,
      "other_buffer"_a,
      "other_rows"_a,
      "at"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "append_packed",
      [](mx::array& buffer,
         const mx::array& values,
         const std::optional<mx::array>& ropes,
         int at,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        const auto [whole, first] =
            append_packed(buffer, values, ropes, at, on(kernel, stream));
        buffer.overwrite_descriptor(whole);
        return first;
      },
      "buffer"_a,
      "values"_a,
      "ropes"_a.none(),
      "at"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "attention_output",
      [](const mx::array& x,
         const mx::array& attended,
         const WeightTuple& unembed_out,
         const WeightTuple& o_proj,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        const auto output =
            kernel == Kernel::metal ? metal_attention_output : attention_output;
        return output(
            x,
            attended,
            weight(unembed_out),
            weight(o_proj),
            on(kernel, stream));
      },
      "x"_a,
      "attended"_a,
      "unembed_out"_a,
      "o_proj"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "metal_attend",
      [](const mx::array& x,
         const mx::array& q,
         const mx::array& latents,
         const std::optional<mx::array>& ropes,
         const std::optional<mx::array>& selected,
         const WeightTuple& unembed_out,
         const WeightTuple& o_proj,
         int rank,
         float scale,
         const std::optional<mx::array>& start,
         const mx::StreamOrDevice& stream) {
        return metal_attend(
            x,
            q,
            latents,
            ropes,
            selected,
            weight(unembed_out),
            weight(o_proj),
            rank,
            scale,
            start,
            on(Kernel::metal, stream));
      },
      "x"_a,
      "q"_a,
      "latents"_a,
      "ropes"_a.none(),
      "selected"_a.none(),
      "unembed_out"_a,
      "o_proj"_a,
      "rank"_a,
      "scale"_a,
      "start"_a.none(),
      "stream"_a.none());
  m.def(
      "mlp_block",
      [](const mx::array& x,
         const NormTuple& input_norm,
         const MlpTuple& weights,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        const auto block =
            kernel == Kernel::metal ? metal_mlp_block : mlp_block;
        return block(x, norm(input_norm), mlp(weights), on(kernel, stream));
      },
      "x"_a,
      "input_norm"_a,
      "weights"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "moe_block",
      [](const mx::array& x,
         const NormTuple& input_norm,
         const mx::array& router_weight,
         const mx::array& correction_bias,
         int top_k,
         int n_group,
         int topk_group,
         bool norm_topk_prob,
         float routed_scaling_factor,
         const MlpTuple& experts,
         const std::optional<MlpTuple>& shared,
         const slots::UseHandle* use,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        const Router router{
            router_weight,
            correction_bias,
            {top_k,
             n_group,
             topk_group,
             norm_topk_prob,
             routed_scaling_factor}};
        if (use) {
          return use->value->release(metal_streamed_moe(
              x,
              norm(input_norm),
              router,
              mlp(experts),
              shared ? std::optional(mlp(*shared)) : std::nullopt,
              use->value->use(),
              use->value->last(),
              on(kernel, stream)));
        }
        const auto block =
            kernel == Kernel::metal ? metal_moe_block : moe_block;
        return block(
            x,
            norm(input_norm),
            router,
            mlp(experts),
            shared ? std::optional(mlp(*shared)) : std::nullopt,
            on(kernel, stream));
      },
      "x"_a,
      "input_norm"_a,
      "router_weight"_a,
      "correction_bias"_a,
      "top_k"_a,
      "n_group"_a,
      "topk_group"_a,
      "norm_topk_prob"_a,
      "routed_scaling_factor"_a,
      "experts"_a,
      "shared"_a.none(),
      "use"_a.none(),
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "indexer_topk",
      [](const mx::array& q,
         const mx::array& keys,
         const mx::array& weights,
         int k,
         float scale,
         float weight_scale,
         const std::optional<mx::array>& start,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return indexer_topk(
            q,
            keys,
            weights,
            k,
            scale,
            weight_scale,
            start,
            is_reference(kernel),
            on(kernel, stream));
      },
      "q"_a,
      "keys"_a,
      "weights"_a,
      "k"_a,
      "scale"_a,
      "weight_scale"_a,
      "start"_a.none(),
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "sparse_mla_decode",
      [](const mx::array& q,
         const mx::array& latents,
         const std::optional<mx::array>& ropes,
         const std::optional<mx::array>& selected,
         int rank,
         float scale,
         const std::optional<mx::array>& start,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return sparse_mla_decode(
            q,
            latents,
            ropes,
            selected,
            rank,
            scale,
            start,
            is_reference(kernel),
            on(kernel, stream));
      },
      "q"_a,
      "latents"_a,
      "ropes"_a.none(),
      "selected"_a.none(),
      "rank"_a,
      "scale"_a,
      "start"_a.none(),
      "kernel"_a,
      "stream"_a.none());
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
      "active_tasks",
      [] { return mx::scheduler::n_active_tasks(); },
      "Tasks that MLX counts as running; what an error cuts short it counts "
      "for "
      "good.");
  nb::module_::import_("atexit").attr("register")(
      nb::cpp_function(&park_threads_that_unwind));
  bind_decode_step(m);
  slots::bind(m);
#ifdef GLM_FUSED_METAL_SIM
  bind_simulator(m);
#endif
}
