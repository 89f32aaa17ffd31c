// The Metal classes that MLX's host headers and our launchers name, as plain
// structs: enough to compile `eval_gpu` on Linux. On a Mac metal-cpp's header
// of this name is used; the macOS link check compiles against that one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace NS {

using UInteger = unsigned long;
enum StringEncoding { UTF8StringEncoding = 4 };

struct String {
  static String* string(const char*, StringEncoding) {
    return nullptr;
  }
  const char* utf8String() const {
    return "";
  }
};
struct AutoreleasePool {};

// Nothing here is reference counted: the simulated objects live for ever.
template <class T>
class SharedPtr {
 public:
  T* get() const {
    return nullptr;
  }
};

}  // namespace NS

namespace MTL {

struct Device;
struct CommandQueue;
struct CommandBuffer;
struct Fence;
struct Function;
struct LinkedFunctions;
struct Resource;
struct Buffer;
struct Allocation;
struct ResidencySet;
struct Library;

struct Size {
  NS::UInteger width, height, depth;
  Size(NS::UInteger w, NS::UInteger h, NS::UInteger d)
      : width(w), height(h), depth(d) {}
};

enum DataType : NS::UInteger {
  DataTypeFloat = 3,
  DataTypeInt = 29,
  DataTypeUInt = 33,
  DataTypeBool = 53,
};

struct ComputePipelineState {
  std::string name;
  void* pipeline;  // the executor's; null where launches are only noted
  NS::UInteger most_threads;
  NS::UInteger maxTotalThreadsPerThreadgroup() const {
    return most_threads;
  }
  // The executor tells of it once a launch has run.
  NS::UInteger staticThreadgroupMemoryLength() const {
    return 0;
  }
  NS::UInteger threadExecutionWidth() const {
    return 32;
  }
};

// Collects what the next dispatch binds.
struct ComputeCommandEncoder {
  const ComputePipelineState* state = nullptr;
  std::map<int, std::vector<char>> bytes;
  struct Buffer {
    void* data;
    size_t size;
    size_t offset;  // in what Metal allocated
  };
  std::map<int, Buffer> buffers;
  std::set<int> outputs;  // those of `buffers` that the kernel writes
  std::map<int, size_t> threadgroup_memory;

  void setComputePipelineState(const ComputePipelineState* to) {
    state = to;
  }
  void setBytes(const void* from, NS::UInteger length, NS::UInteger index);
  void setThreadgroupMemoryLength(NS::UInteger length, NS::UInteger index) {
    threadgroup_memory[static_cast<int>(index)] = length;
  }
};

}  // namespace MTL
