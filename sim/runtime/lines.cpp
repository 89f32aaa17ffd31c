#include "lines.h"

#include <elf.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>

namespace sim {
namespace {

// Reads little-endian fields; it stops at the end and does not run past it.
struct Cursor {
  const uint8_t* at;
  const uint8_t* end;

  template <typename T>
  T fixed() {
    T value{};
    if (size_t(end - at) < sizeof(T)) {
      at = end;
      return value;
    }
    memcpy(&value, at, sizeof(T));
    at += sizeof(T);
    return value;
  }
  uint64_t uleb() {
    uint64_t value = 0;
    for (int shift = 0; at < end; shift += 7) {
      uint8_t byte = *at++;
      value |= uint64_t(byte & 0x7f) << shift;
      if (!(byte & 0x80)) {
        break;
      }
    }
    return value;
  }
  int64_t sleb() {
    int64_t value = 0;
    int shift = 0;
    uint8_t byte = 0x80;
    while (at < end && (byte & 0x80)) {
      byte = *at++;
      value |= int64_t(byte & 0x7f) << shift;
      shift += 7;
    }
    return shift < 64 && (byte & 0x40) ? value | -(int64_t(1) << shift) : value;
  }
  std::string text() {
    const uint8_t* stop = std::find(at, end, 0);
    std::string value(at, stop);
    at = std::min(stop + 1, end);
    return value;
  }
};

struct Header {
  uint8_t minimum_length, maximum_operations, default_is_stmt;
  int8_t line_base;
  uint8_t line_range, opcode_base;
};

enum {
  kCopy = 1,
  kAdvancePc,
  kAdvanceLine,
  kSetFile,
  kSetColumn,
  kNegateStatement,
  kSetBasicBlock,
  kConstAddPc,
  kFixedAdvancePc,
};
enum { kEndSequence = 1, kSetAddress = 2 };

}  // namespace

void Lines::read_unit(const uint8_t* begin, const uint8_t* end) {
  Cursor c{begin, end};
  if (c.fixed<uint16_t>() != 4) {
    return;
  }
  uint32_t header_length = c.fixed<uint32_t>();
  const uint8_t* program = c.at + header_length;
  Header h = c.fixed<Header>();
  c.at += h.opcode_base - 1;
  std::vector<std::string> directories{""};
  while (c.at < program && *c.at) {
    directories.push_back(c.text());
  }
  c.at++;
  size_t first_file = files_.size();
  files_.push_back("");
  while (c.at < program && *c.at) {
    std::string name = c.text();
    uint64_t directory = c.uleb();
    c.uleb();  // modification time
    c.uleb();  // length
    bool rooted =
        name[0] == '/' || directory == 0 || directory >= directories.size();
    files_.push_back(rooted ? name : directories[directory] + "/" + name);
  }
  c.at = program;
  Row row{0, 1, 1, false};
  auto emit = [&](bool last) {
    rows_.push_back(
        {row.address, uint32_t(first_file) + row.file, row.line, last});
  };
  while (c.at < end) {
    uint8_t op = *c.at++;
    if (op >= h.opcode_base) {
      uint8_t adjusted = op - h.opcode_base;
      row.address += adjusted / h.line_range * h.minimum_length;
      row.line += h.line_base + adjusted % h.line_range;
      emit(false);
    } else if (op == 0) {
      uint64_t length = c.uleb();
      const uint8_t* next = c.at + length;
      uint8_t extended = c.fixed<uint8_t>();
      if (extended == kSetAddress) {
        row.address = c.fixed<uint64_t>();
      } else if (extended == kEndSequence) {
        emit(true);
        row = {0, 1, 1, false};
      }
      c.at = std::min(next, end);
    } else if (op == kCopy) {
      emit(false);
    } else if (op == kAdvancePc) {
      row.address += c.uleb() * h.minimum_length;
    } else if (op == kAdvanceLine) {
      row.line += int32_t(c.sleb());
    } else if (op == kSetFile) {
      row.file = uint32_t(c.uleb());
    } else if (op == kConstAddPc) {
      row.address += (255 - h.opcode_base) / h.line_range * h.minimum_length;
    } else if (op == kFixedAdvancePc) {
      row.address += c.fixed<uint16_t>();
    } else {
      for (int n = begin[6 + sizeof(Header) + op - 1]; n > 0; n--) {
        c.uleb();
      }
    }
  }
}

Lines::Lines(const std::string& library) {
  std::ifstream in(library, std::ios::binary);
  std::vector<uint8_t> bytes(
      (std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  if (bytes.size() < sizeof(Elf64_Ehdr)) {
    return;
  }
  auto* elf = reinterpret_cast<const Elf64_Ehdr*>(bytes.data());
  auto* sections =
      reinterpret_cast<const Elf64_Shdr*>(bytes.data() + elf->e_shoff);
  auto* names = reinterpret_cast<const char*>(
      bytes.data() + sections[elf->e_shstrndx].sh_offset);
  for (int i = 0; i < elf->e_shnum; i++) {
    const Elf64_Shdr& s = sections[i];
    if (strcmp(names + s.sh_name, ".debug_line") != 0) {
      continue;
    }
    Cursor c{
        bytes.data() + s.sh_offset, bytes.data() + s.sh_offset + s.sh_size};
    while (c.at < c.end) {
      uint64_t left = c.end - c.at;
      uint64_t length = std::min<uint64_t>(c.fixed<uint32_t>(), left - 4);
      read_unit(c.at, c.at + length);
      c.at += length;
    }
  }
  std::stable_sort(rows_.begin(), rows_.end(), [](auto& a, auto& b) {
    return a.address < b.address;
  });
}

std::pair<std::string, uint32_t> Lines::find(uintptr_t pc) const {
  // The return address belongs to the instruction after the call.
  auto next = std::upper_bound(
      rows_.begin(), rows_.end(), pc - 1, [](uint64_t at, const Row& row) {
        return at < row.address;
      });
  while (next != rows_.begin()) {
    const Row& row = *--next;
    if (row.end) {
      break;
    }
    if (row.line != 0) {
      return {files_[std::min<size_t>(row.file, files_.size() - 1)], row.line};
    }
  }
  return {"", 0};
}

}  // namespace sim
