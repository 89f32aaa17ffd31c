#include "taken_rows.h"

#include <memory>
#include <mutex>
#include <unordered_map>

namespace glm_fused {

namespace {

using mlx::core::array;

// The rows of a buffer are taken up to `end`. Other views of the same memory
// have rows elsewhere, so it speaks of that view alone.
struct Taken {
  std::weak_ptr<array::Data> memory;
  int64_t offset;
  mlx::core::Shape shape;
  mlx::core::Strides strides;
  int end;

  bool is_of(const array& buffer) const {
    const auto& other = buffer.data_shared_ptr();  // to lock ours costs more
    return !memory.owner_before(other) && !other.owner_before(memory) &&
        offset == buffer.offset() && shape == buffer.shape() &&
        strides == buffer.strides();
  }
};

class Table {
 public:
  bool take(const array& buffer, int at, int end) {
    std::lock_guard lock(mutex_);
    const auto found = taken_.find(buffer.data_shared_ptr().get());
    if (found != taken_.end() && found->second.end <= at &&
        found->second.is_of(buffer)) {
      found->second.end = end;
      return true;
    }
    if (!buffer.is_donatable()) {
      return false;
    }
    keep(buffer, end);
    return true;
  }

  void take_new(const array& buffer, int end) {
    std::lock_guard lock(mutex_);
    keep(buffer, end);
  }

 private:
  void keep(const array& buffer, int end) {
    const auto& memory = buffer.data_shared_ptr();
    const auto found = taken_.find(memory.get());
    if (found != taken_.end() && found->second.is_of(buffer)) {
      found->second.end = end;
      return;
    }
    if (taken_.size() >= limit_) {
      std::erase_if(
          taken_, [](const auto& t) { return t.second.memory.expired(); });
      limit_ = 2 * taken_.size() + 64;
    }
    taken_.insert_or_assign(
        memory.get(),
        Taken{memory, buffer.offset(), buffer.shape(), buffer.strides(), end});
  }

  std::mutex mutex_;
  std::unordered_map<const array::Data*, Taken> taken_;
  size_t limit_ = 64;
};

// This is never destroyed, as MLX's threads may outlive the module.
Table& table() {
  static Table& table = *new Table;
  return table;
}

}  // namespace

bool take_rows(const array& buffer, int at, int count) {
  return table().take(buffer, at, at + count);
}

void take_new_rows(const array& buffer, int count) {
  table().take_new(buffer, count);
}

}  // namespace glm_fused
