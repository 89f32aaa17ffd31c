#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "executor.h"
#include "faults.h"
#include "fiber.h"
#include "memory.h"
#include "report.h"
#include "tracer.h"

namespace sim {

// A loaded copy of a library, whose function constants are global variables.
struct Image {
  const sim_contents* contents;
  uintptr_t base, size;
};

}  // namespace sim

namespace {

using sim::Image;

// Returns the bytes from a loaded library's first segment to the end of its
// last.
uintptr_t extent(uintptr_t base) {
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(base);
  const auto* segments =
      reinterpret_cast<const ElfW(Phdr)*>(base + header->e_phoff);
  uintptr_t end = 0;
  for (int i = 0; i < header->e_phnum; i++) {
    if (segments[i].p_type == PT_LOAD) {
      end = std::max(end, segments[i].p_vaddr + segments[i].p_memsz);
    }
  }
  return end;
}

Image load(const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    throw std::runtime_error(dlerror());
  }
  void* contents = dlsym(handle, "sim_exports");
  Dl_info info{};
  if (!contents || !dladdr(contents, &info)) {
    throw std::runtime_error(path + " is not a shader library");
  }
  const auto base = uintptr_t(info.dli_fbase);
  return {static_cast<const sim_contents*>(contents), base, extent(base)};
}

// Loads a copy of a library: the loader knows a file that it has loaded, so
// another image needs another file.
Image load_copy(const std::string& path) {
  std::string copy = path + ".XXXXXX";
  int fd = mkstemp(copy.data());
  if (fd < 0) {
    throw std::runtime_error("cannot write " + copy);
  }
  close(fd);
  std::ofstream(copy, std::ios::binary)
      << std::ifstream(path, std::ios::binary).rdbuf();
  try {
    Image image = load(copy);
    unlink(copy.c_str());
    return image;
  } catch (...) {
    unlink(copy.c_str());
    throw;
  }
}

void explain(const std::exception& e, char* error, size_t size) {
  if (size) {
    snprintf(error, size, "%s", e.what());
  }
}

}  // namespace

struct sim_pipeline {
  const sim_kernel* kernel;
  const sim_library* library;
  uintptr_t base, size;
};

struct sim_library {
  std::string path;
  Image image;
  std::mutex mutex;
  std::map<std::string, Image> specialized;  // by the values of all constants
  std::map<std::string, sim_pipeline> pipelines;

  std::string constant_values(const sim_constant* given, size_t count) const;
  const Image& specialize(const std::string& values);
};

std::string sim_library::constant_values(
    const sim_constant* given,
    size_t count) const {
  const sim_contents& c = *image.contents;
  std::vector<std::string> values;
  for (uint32_t i = 0; i < c.constant_count; i++) {
    values.push_back(std::string(c.constants[i].size, '\0'));
  }
  for (size_t k = 0; k < count; k++) {
    const sim_constant& g = given[k];
    bool found = false;
    for (uint32_t i = 0; i < c.constant_count; i++) {
      const sim_function_constant& f = c.constants[i];
      if (g.index >= 0 ? f.index != g.index
                       : strcmp(f.name, g.name ? g.name : "") != 0) {
        continue;
      }
      if (f.size != g.size) {
        throw std::invalid_argument(
            std::string("function constant ") + f.name + " is " + f.type +
            " of " + std::to_string(f.size) + " bytes, not " +
            std::to_string(g.size));
      }
      values[i].assign(static_cast<const char*>(g.value), g.size);
      found = true;
    }
    // Metal ignores an index that the shader does not use.
    if (!found && g.index < 0) {
      throw std::invalid_argument(
          std::string("no function constant ") + (g.name ? g.name : "") +
          " in " + path);
    }
  }
  return std::accumulate(values.begin(), values.end(), std::string());
}

const Image& sim_library::specialize(const std::string& values) {
  if (values.find_first_not_of('\0') == std::string::npos) {
    return image;
  }
  auto at = specialized.find(values);
  if (at == specialized.end()) {
    Image copy = load_copy(path);
    size_t offset = 0;
    for (uint32_t i = 0; i < copy.contents->constant_count; i++) {
      const sim_function_constant& f = copy.contents->constants[i];
      memcpy(f.storage, values.data() + offset, f.size);
      offset += f.size;
    }
    at = specialized.emplace(values, copy).first;
  }
  return at->second;
}

namespace {

class Run {
 public:
  Run(sim_pipeline* pipeline, const sim_dispatch& dispatch, sim_report& report)
      : pipeline_(*pipeline), dispatch_(dispatch), report_(report) {}

  void execute() {
    check();
    const sim_contents& contents = *pipeline_.library->image.contents;
    sim::Memory memory(*pipeline_.kernel, dispatch_, contents.traced);
    std::unique_ptr<sim::Tracer> tracer;
    if (contents.traced) {
      tracer = std::make_unique<sim::Tracer>(memory, report_, pipeline_.base);
    }
    sim::Launch launch{
        pipeline_.kernel,
        &dispatch_,
        pipeline_.library->path,
        pipeline_.base,
        pipeline_.size,
        &memory,
        &report_,
        tracer.get(),
        {}};
    for (int k = 0; k < 3; k++) {
      uint32_t n = dispatch_.groups[k], g = dispatch_.group[k];
      launch.groups[k] = dispatch_.threads ? (n + g - 1) / g : n;
    }
    run_threadgroups(launch);
    std::string overrun = memory.copy_back();
    if (!overrun.empty()) {
      report_.fail(std::string(pipeline_.kernel->name) + ": " + overrun);
    }
    if (tracer) {
      report_.traffic = tracer->traffic();
    }
  }

 private:
  sim_pipeline& pipeline_;
  const sim_dispatch& dispatch_;
  sim_report& report_;

  void check() const {
    const uint32_t* g = dispatch_.group;
    uint64_t threads = uint64_t(g[0]) * g[1] * g[2];
    const uint32_t most = sim_most_threads(&pipeline_);
    if (threads < 1 || threads > most) {
      throw std::invalid_argument(
          "a threadgroup has 1 to " + std::to_string(most) + " threads, not " +
          std::to_string(threads));
    }
    uint64_t groups = 1;
    for (uint32_t n : dispatch_.groups) {
      groups *= n;
    }
    if (groups < 1 || groups >> 32) {
      throw std::invalid_argument("the grid is empty or too large");
    }
    check_threadgroup_memory();
  }

  void check_threadgroup_memory() const {
    uint64_t total = 0;
    for (uint32_t i = 0; i < dispatch_.threadgroup_memory_count; i++) {
      const sim_buffer& m = dispatch_.threadgroup_memory[i];
      const std::string what = "threadgroup memory " + std::to_string(m.index) +
          " of " + std::to_string(m.size) + " bytes: ";
      if (m.index < 0 || m.index > 30) {
        throw std::invalid_argument(what + "the index must be 0 to 30");
      }
      if (m.size % 16) {
        throw std::invalid_argument(what + "must be a multiple of 16");
      }
      total += m.size;
      if (total > sim::ThreadgroupMemory::kLimit) {
        throw std::invalid_argument(
            what + std::to_string(total) + " in all, 32768 is the limit");
      }
    }
  }

  std::vector<uint32_t> threadgroup_order(uint32_t total) const {
    std::vector<uint32_t> order(total);
    std::iota(order.begin(), order.end(), 0u);
    uint64_t random = dispatch_.seed;
    for (uint32_t i = total; dispatch_.seed && i > 1; i--) {
      random = sim::next_random(random);
      std::swap(order[i - 1], order[(random >> 16) % i]);
    }
    return order;
  }

  void run_threadgroups(const sim::Launch& launch) {
    uint32_t total = launch.groups[0] * launch.groups[1] * launch.groups[2];
    std::vector<uint32_t> order = threadgroup_order(total);
    std::atomic<uint32_t> next{0};
    std::mutex counts;
    auto work = [&](uint64_t seed) {
      sim::FaultGuard guard;
      sim::Worker worker(launch, seed);
      for (uint32_t i; (i = next++) < total && worker.run(order[i]);) {
      }
      std::lock_guard lock(counts);
      sim_counts& c = report_.counts;
      c.threads += worker.threads_run;
      c.simd_functions += worker.simd_functions;
      c.barriers += worker.barriers;
      c.threadgroup_bytes =
          std::max(c.threadgroup_bytes, worker.memory().bytes());
    };
    uint32_t workers = launch.tracer ? 1 : std::max(dispatch_.workers, 1u);
    std::vector<std::thread> others;
    for (uint32_t k = 1; k < std::min(workers, total); k++) {
      others.emplace_back(work, dispatch_.seed + k);
    }
    work(dispatch_.seed);
    for (std::thread& t : others) {
      t.join();
    }
    report_.counts.threadgroups = total;
  }
};

}  // namespace

extern "C" {

sim_library* sim_open(const char* path, char* error, size_t error_size) {
  static std::mutex mutex;
  static std::map<std::string, std::unique_ptr<sim_library>> open;
  std::lock_guard lock(mutex);
  try {
    std::unique_ptr<sim_library>& library = open[path];
    if (!library) {
      Image image = load(path);
      library = std::make_unique<sim_library>();
      library->path = path;
      library->image = image;
    }
    return library.get();
  } catch (const std::exception& e) {
    explain(e, error, error_size);
    return nullptr;
  }
}

const sim_contents* sim_library_contents(const sim_library* library) {
  return library->image.contents;
}

sim_pipeline* sim_specialize(
    sim_library* library,
    const char* kernel,
    const sim_constant* constants,
    size_t constant_count,
    char* error,
    size_t error_size) {
  std::lock_guard lock(library->mutex);
  try {
    std::string values = library->constant_values(constants, constant_count);
    std::string key = std::string(kernel) + '\0' + values;
    auto at = library->pipelines.find(key);
    if (at != library->pipelines.end()) {
      return &at->second;
    }
    const Image& image = library->specialize(values);
    for (uint32_t i = 0; i < image.contents->kernel_count; i++) {
      const sim_kernel& k = image.contents->kernels[i];
      if (strcmp(k.name, kernel) == 0) {
        sim_pipeline pipeline{&k, library, image.base, image.size};
        return &library->pipelines.emplace(key, pipeline).first->second;
      }
    }
    throw std::invalid_argument(
        std::string("no kernel ") + kernel + " in " + library->path);
  } catch (const std::exception& e) {
    explain(e, error, error_size);
    return nullptr;
  }
}

uint32_t sim_most_threads(const sim_pipeline* pipeline) {
  const auto most = pipeline->kernel->most_threads;
  return most ? most() : 1024;
}

sim_report* sim_launch(sim_pipeline* pipeline, const sim_dispatch* dispatch) {
  auto report = std::make_unique<sim_report>();
  auto start = std::chrono::steady_clock::now();
  try {
    Run(pipeline, *dispatch, *report).execute();
  } catch (const std::exception& e) {
    report->fail(std::string(pipeline->kernel->name) + ": " + e.what());
  }
  report->close(pipeline->kernel->name, pipeline->library->path);
  std::chrono::duration<double> taken =
      std::chrono::steady_clock::now() - start;
  report->counts.seconds = taken.count();
  return report.release();
}

}  // extern "C"
