#include "sim/host/bindings.h"

#include <nanobind/stl/function.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <filesystem>
#include <unordered_set>

#include "mlx/transforms.h"
#include "ops/placement.h"
#include "sim/host/launches.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

namespace glm_fused {

namespace {

// Linux MLX asks every primitive for its CPU code, and gets the GPU's from
// this.
class OnMetal : public mx::Primitive {
 public:
  explicit OnMetal(std::shared_ptr<mx::Primitive> inner)
      : mx::Primitive(inner->stream()), inner_(std::move(inner)) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override {
    std::vector<const void*> allocations;
    for (const auto& input : inputs) {
      allocations.push_back(input.buffer().ptr());
    }
    sim_host::begin_op(allocations);
    inner_->eval_gpu(inputs, outputs);
  }
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override {
    inner_->eval_gpu(inputs, outputs);
  }
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override {
    return inner_->vjp(primals, cotangents, argnums, outputs);
  }
  const char* name() const override {
    return inner_->name();
  }
  mx::Primitive& inner() {
    return *inner_;
  }

 private:
  std::shared_ptr<mx::Primitive> inner_;
};

// The one of the calling thread, as only a stream's own thread may use it.
mx::Stream simulated_stream() {
  static const mx::ThreadLocalStream streams =
      mx::new_thread_local_stream(mx::Device::cpu);
  return mx::stream_from_thread_local_stream(streams);
}

using Size = std::tuple<uint32_t, uint32_t, uint32_t>;
using Outputs = std::map<int, nb::bytes>;
using Taken = std::tuple<std::string, Size, Size, uintptr_t, Outputs>;

std::vector<Taken> take_launches() {
  std::vector<Taken> taken;
  for (const auto& l : sim_host::take()) {
    Outputs outputs;
    for (const auto& [index, bytes] : l.outputs) {
      outputs.emplace(index, nb::bytes(bytes.data(), bytes.size()));
    }
    taken.emplace_back(
        l.kernel,
        Size{l.groups[0], l.groups[1], l.groups[2]},
        Size{l.group[0], l.group[1], l.group[2]},
        reinterpret_cast<uintptr_t>(l.report),
        std::move(outputs));
  }
  return taken;
}

// A node of a graph, with arrays that outlive its evaluation.
struct Node {
  std::string name;
  std::vector<mx::array> inputs, outputs;

  // Whether it made memory, as it did unless each output is a view.
  bool made_memory() const {
    return std::ranges::any_of(outputs, [&](const mx::array& out) {
      return out.size() > 0 &&
          std::ranges::none_of(inputs, [&](const mx::array& in) {
               return in.size() > 0 && in.buffer().ptr() == out.buffer().ptr();
             });
    });
  }
};

// Gives the nodes that `outputs` are made by, but for those that launch kernels
// of ours.
std::vector<Node> nodes_of(std::vector<mx::array> arrays) {
  std::vector<Node> nodes;
  std::unordered_set<std::uintptr_t> seen;
  while (!arrays.empty()) {
    const mx::array a = arrays.back();
    arrays.pop_back();
    if (a.is_available() || !a.has_primitive() ||
        !seen.insert(a.primitive_id()).second) {
      continue;
    }
    arrays.insert(arrays.end(), a.inputs().begin(), a.inputs().end());
    if (dynamic_cast<const OnMetal*>(&a.primitive()) == nullptr) {
      nodes.push_back({a.primitive().name(), a.inputs(), a.outputs()});
    }
  }
  return nodes;
}

std::vector<std::string> stock_launches(std::vector<mx::array> outputs) {
  // Nodes hold on to their arrays, so no result takes over an input's memory.
  const std::vector<Node> nodes = nodes_of(outputs);
  {
    nb::gil_scoped_release release;
    mx::eval(std::move(outputs));
  }
  std::vector<std::string> names;
  for (const Node& node : nodes) {
    // MLX copies the parts of a concatenation one by one.
    const size_t count = node.name == "Concatenate" ? node.inputs.size() : 1;
    if (node.made_memory()) {
      names.insert(names.end(), count, node.name);
    }
  }
  return names;
}

// Tells why `host` cannot work, or "".
std::string obstacle() {
  const std::filesystem::path source = GLM_FUSED_SOURCE_DIR;
  if (std::filesystem::is_regular_file(source / "sim/host/__init__.py")) {
    return "";
  }
  return "the source tree " + source.string() +
      " that this was built from is gone";
}

// Gives the Python half, sim/host/__init__.py. This module alone knows the
// source tree it was made from; the package gets an object and imports no
// simulator.
nb::object load_host(nb::handle native) {
  nb::list path = nb::module_::import_("sys").attr("path");
  path.insert(0, GLM_FUSED_SOURCE_DIR);
  nb::object module;
  try {
    module = nb::module_::import_("sim.host");
  } catch (...) {
    path.attr("pop")(0);
    throw;
  }
  path.attr("pop")(0);
  return module.attr("Host")(native);
}

}  // namespace

mx::StreamOrDevice metal_stream(const mx::StreamOrDevice&) {
  return simulated_stream();
}

bool is_metal(const mx::StreamOrDevice& stream) {
  return mx::to_stream(stream) == simulated_stream();
}

std::shared_ptr<mx::Primitive> place(std::shared_ptr<mx::Primitive> primitive) {
  if (!is_metal(primitive->stream())) {
    return primitive;
  }
  return std::make_shared<OnMetal>(std::move(primitive));
}

mx::Primitive& placed(mx::Primitive& primitive) {
  auto* on_metal = dynamic_cast<OnMetal*>(&primitive);
  return on_metal ? on_metal->inner() : primitive;
}

void bind_simulator(nb::module_& parent) {
  nb::module_ m = parent.def_submodule("_simulator");
  m.def("obstacle", &obstacle);
  m.def("host", [native = nb::handle(m)] { return load_host(native); });
  m.def("load_executor", &sim_host::load_executor, "path"_a);
  m.def(
      "configure",
      [](sim_host::Compile compile,
         uint32_t workers,
         bool in_place,
         bool keep_outputs,
         std::string architecture) {
        sim_host::configure(
            {std::make_shared<const sim_host::Compile>(std::move(compile)),
             workers,
             in_place,
             keep_outputs,
             std::move(architecture)});
      },
      "compile"_a,
      "workers"_a,
      "in_place"_a,
      "keep_outputs"_a,
      "architecture"_a);
  m.def("take_launches", &take_launches);
  m.def("take_waits", &sim_host::take_waits);
  m.def("stock_launches", &stock_launches, "outputs"_a);
}

}  // namespace glm_fused
