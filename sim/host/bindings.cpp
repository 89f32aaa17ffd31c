#include "sim/host/bindings.h"

#include <nanobind/stl/function.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "ops/placement.h"
#include "sim/host/launches.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

namespace glm_fused {

namespace {

// Linux MLX asks every primitive for its CPU code; it gets the GPU's.
class OnMetal : public mx::Primitive {
 public:
  explicit OnMetal(std::shared_ptr<mx::Primitive> inner)
      : mx::Primitive(inner->stream()), inner_(std::move(inner)) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override {
    inner_->eval_gpu(inputs, outputs);
  }
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override {
    inner_->eval_gpu(inputs, outputs);
  }
  const char* name() const override {
    return inner_->name();
  }

 private:
  std::shared_ptr<mx::Primitive> inner_;
};

mx::Stream simulated_stream() {
  static const mx::Stream stream = mx::new_stream(mx::Device::cpu);
  return stream;
}

using Size = std::tuple<uint32_t, uint32_t, uint32_t>;

std::vector<std::tuple<std::string, Size, Size, uintptr_t>> take_launches() {
  std::vector<std::tuple<std::string, Size, Size, uintptr_t>> taken;
  for (const auto& l : sim_host::take()) {
    taken.emplace_back(
        l.kernel,
        Size{l.groups[0], l.groups[1], l.groups[2]},
        Size{l.group[0], l.group[1], l.group[2]},
        reinterpret_cast<uintptr_t>(l.report));
  }
  return taken;
}

}  // namespace

mx::StreamOrDevice metal_stream() {
  return simulated_stream();
}

std::shared_ptr<mx::Primitive> place(std::shared_ptr<mx::Primitive> primitive) {
  if (primitive->stream() != simulated_stream()) {
    return primitive;
  }
  return std::make_shared<OnMetal>(std::move(primitive));
}

void bind_simulator(nb::module_& parent) {
  nb::module_ m = parent.def_submodule("_simulator");
  m.attr("source_dir") = GLM_FUSED_SOURCE_DIR;
  m.def("load_executor", &sim_host::load_executor, "path"_a);
  m.def(
      "configure",
      [](std::string variant, sim_host::Compile compile, uint32_t workers) {
        sim_host::configure({std::move(variant), std::move(compile), workers});
      },
      "variant"_a,
      "compile"_a,
      "workers"_a);
  m.def("take_launches", &take_launches);
}

}  // namespace glm_fused
