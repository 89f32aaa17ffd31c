// Hands a graph node's work to MLX's CPU stream.
//
// MLX keeps what a task throws with its stream and raises it at whatever the
// main thread enqueues next: between a node's task and the list of buffers that
// keeps the task's memory, or after the task was counted and before it is
// there. So no task of ours throws. Whatever may fail, because memory or
// threads cannot be had or no kernel takes the data, fails on the thread that
// evaluates, before the task is enqueued.
#pragma once

#include <atomic>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/runtime/scratch.h"
#include "cpu/runtime/staged.h"
#include "cpu/runtime/thread_pool.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"

namespace glm_fused::cpu {

using Arrays = std::vector<mlx::core::array>;

// ThreadSanitizer does not see that MLX waits for a stream's tasks, because MLX
// is not instrumented: a count of them tells it.
#if defined(__SANITIZE_THREAD__)
inline std::atomic<uint64_t> tasks_done{0};
inline void task_done() {
  tasks_done.fetch_add(1, std::memory_order_release);
}
inline void tasks_awaited() {
  static_cast<void>(tasks_done.load(std::memory_order_acquire));
}
#else
inline void task_done() {}
inline void tasks_awaited() {}
#endif

// Returns when all that is enqueued on `stream` has run. It may wait for a GPU,
// whose work MLX does not begin while nodes are enqueued: it is begun here.
inline void finish(mlx::core::Stream stream) {
  for (const auto& other : mlx::core::get_streams()) {
    if (other.device == mlx::core::Device::gpu) {
      try {
        mlx::core::synchronize(other);
      } catch (const std::runtime_error&) {
        // The stream is another thread's.
      }
    }
  }
  mlx::core::synchronize(stream);
  tasks_awaited();
}

// Does the same where another error is on its way already.
inline void settle(mlx::core::Stream stream) noexcept {
  try {
    finish(stream);
  } catch (...) {
  }
}

// Returns when `a`, an input of a node that is evaluated on `stream`, has its
// values. `is_available` would be true too early of an array that another node
// of this evaluation gives, because such an array has no event.
inline void wait_for(const mlx::core::array& a, mlx::core::Stream stream) {
  if (a.status() != mlx::core::array::Status::available) {
    finish(stream);
  }
}

// Returns the same array without its place in the graph; it keeps the buffer.
inline mlx::core::array holding(const mlx::core::array& a) {
  if (!a.has_primitive() && a.siblings().empty()) {
    return a;
  }
  mlx::core::array held(a.shape(), a.dtype(), nullptr, {});
  held.copy_shared_buffer(a);
  return held;
}

// Enqueues `work` with all that it holds, or throws and lets go of it. It does
// not take MLX's encoder, which counts a task before it has the memory for it,
// and waits for ever for those that were counted and are not there.
template <class Work>
void enqueue(mlx::core::Stream stream, Work work) {
  auto held = std::make_unique<Work>(std::move(work));
  mlx::core::scheduler::enqueue(stream, [work = held.get()] {
    const std::unique_ptr<Work> owned(work);
    (*owned)();
    task_done();
  });
  static_cast<void>(held.release());
}

// What a kernel does, with all that it holds. It may be run again.
class Task {
 public:
  virtual ~Task() = default;
  virtual void run() noexcept = 0;
  // The kernel, where it does its work in stages, else null.
  virtual Staged* staged() noexcept = 0;
  // How many threads it has scratch memory for.
  virtual int workers() const noexcept = 0;
};
using Tasks = std::vector<std::unique_ptr<Task>>;

// While one lives on a thread, what that thread would enqueue on the stream is
// kept instead, to be enqueued as one task or taken.
class Together {
 public:
  explicit Together(mlx::core::Stream stream) : stream_(stream) {
    outer_ = std::exchange(current_, this);
  }
  ~Together() {
    current_ = outer_;
  }
  Together(const Together&) = delete;
  Together& operator=(const Together&) = delete;

  static Together* current() {
    return current_;
  }

  // What is added from now on takes its scratch memory from this slot.
  void use_slot(int slot) {
    slot_ = slot;
  }
  static int slot() {
    return current_ == nullptr ? 0 : current_->slot_;
  }

  template <class Work>
  void add(Work work) {
    tasks_.push_back(std::make_unique<Held<Work>>(std::move(work)));
  }

  // Returns what was kept since the last call.
  Tasks take() {
    return std::exchange(tasks_, {});
  }

  void enqueue() {
    current_ = outer_;
    glm_fused::cpu::enqueue(stream_, [tasks = take()]() noexcept {
      for (const auto& task : tasks) {
        task->run();
      }
    });
  }

 private:
  template <class Work>
  struct Held : Task {
    explicit Held(Work w) : work(std::move(w)) {}
    void run() noexcept override {
      work();
    }
    Staged* staged() noexcept override {
      if constexpr (std::is_base_of_v<Staged, decltype(Work::kernel)>) {
        return &work.kernel;
      } else {
        return nullptr;
      }
    }
    int workers() const noexcept override {
      return work.workers;
    }
    Work work;
  };

  static inline thread_local Together* current_ = nullptr;

  mlx::core::Stream stream_;
  Together* outer_;
  int slot_ = 0;
  Tasks tasks_;
};

// Evaluates a node by `run`. What `run` throws is thrown on only once the
// stream's tasks have run: MLX then lets go of the node's inputs, to which a
// task might still write.
template <class Run>
void evaluate(mlx::core::Primitive& primitive, const Run& run) {
  try {
    run();
  } catch (const std::bad_alloc&) {
    settle(primitive.stream());
    throw std::runtime_error(
        "[" + std::string(primitive.name()) + "] out of memory.");
  } catch (...) {
    settle(primitive.stream());
    throw;
  }
}

// Gives memory to the outputs that have none yet.
inline void allocate(mlx::core::Primitive& primitive, Arrays& outputs) {
  for (auto& output : outputs) {
    if (output.data_shared_ptr()) {
      continue;
    }
    output.set_data(mlx::core::allocator::malloc(output.nbytes()));
    if (output.nbytes() > 0 && output.buffer().ptr() == nullptr) {
      throw std::runtime_error(  // MLX itself does not check the buffer
          "[" + std::string(primitive.name()) + "] out of memory for " +
          std::to_string(output.nbytes()) + " bytes of output.");
    }
  }
}

// Allocates the outputs that have no memory and enqueues make(inputs, outputs,
// scratch, workers) .run(), unless the outputs are empty. `make` takes what the
// kernel needs from `scratch`, for at most `workers` threads; it is called
// twice, first to measure. With `here` the kernel runs on this thread once
// those before it have, and may throw and allocate.
template <class Make>
void dispatch(
    mlx::core::Primitive& primitive,
    const Arrays& inputs,
    Arrays& outputs,
    const Make& make,
    bool here = false) {
  using Kernel =
      std::invoke_result_t<const Make&, Arrays&, Arrays&, Scratch&, int>;
  // The kernel refers to the arrays, so they are held here: MLX holds no node's
  // outputs, and lets go of them where an evaluation ends early. Until the task
  // has run, the next node then cannot take over an output's memory, which
  // costs a prompt one to two percent more memory.
  struct Work {
    Arrays in, out;
    Block block;
    int workers;
    Kernel kernel;
    void operator()() noexcept {
      kernel.run();
    }
  };
  evaluate(primitive, [&] {
    allocate(primitive, outputs);
    if (!outputs.empty() && outputs[0].size() == 0) {
      return;
    }
    Arrays in, out;
    in.reserve(inputs.size());
    for (const auto& input : inputs) {
      in.push_back(holding(input));
    }
    out.reserve(outputs.size());
    for (const auto& output : outputs) {
      out.push_back(holding(output));
    }
    const int workers = num_threads();
    Scratch measured;
    make(in, out, measured, workers);
    Block block;
    if (measured.used() > 0) {
      block =
          scratch_block(primitive.stream(), Together::slot(), measured.used());
    }
    Scratch scratch(block.get(), measured.used());
    Kernel kernel = make(in, out, scratch, workers);
    if (here) {
      finish(primitive.stream());
      kernel.run();
      return;
    }
    Work work{
        std::move(in),
        std::move(out),
        std::move(block),
        workers,
        std::move(kernel)};
    if (Together* together = Together::current()) {
      together->add(std::move(work));
    } else {
      enqueue(primitive.stream(), std::move(work));
    }
  });
}

}  // namespace glm_fused::cpu
