// Source lines of a shader library's code, from its DWARF 4 line table.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace sim {

class Lines {
 public:
  explicit Lines(const std::string& library);
  // Returns file and line of the call that returns to `pc`, an offset into the
  // library; {"", 0} where the table does not say.
  std::pair<std::string, uint32_t> find(uintptr_t pc) const;

 private:
  struct Row {
    uint64_t address;
    uint32_t file, line;
    bool end;
  };
  std::vector<std::string> files_;
  std::vector<Row> rows_;

  void read_unit(const uint8_t* at, const uint8_t* end);
};

}  // namespace sim
