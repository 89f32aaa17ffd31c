// A lane's bytes of a packed row are read once, in the widest units that their
// alignment allows, and kept as the cells that MLX's qdot picks apart.
#pragma once

#include "numbers.h"

template <int bytes>
struct UnitOf;
template <>
struct UnitOf<1> {
  typedef uint8_t type;
};
template <>
struct UnitOf<2> {
  typedef uint16_t type;
};
template <>
struct UnitOf<4> {
  typedef uint32_t type;
};

// Rows start on 4 bytes and a lane's first byte is a multiple of `bytes`.
template <typename Cell, int bytes>
METAL_FUNC void load_cells(const device uint8_t* from, thread Cell* cells) {
  constexpr int unit = bytes % 4 == 0 ? 4 : bytes % 2 == 0 ? 2 : 1;
  constexpr int cells_per_unit = unit / sizeof(Cell);
  typedef typename UnitOf<unit>::type Unit;
  const device Unit* units = (const device Unit*)from;
  for (int i = 0; i < bytes / unit; i++) {
    const Unit u = units[i];
    for (int j = 0; j < cells_per_unit; j++) {
      cells[i * cells_per_unit + j] =
          static_cast<Cell>(u >> (8 * sizeof(Cell) * j));
    }
  }
}

// qdot reads 4-bit values two bytes at a time, all others by the byte.
template <int bits>
struct CellOf {
  typedef uint8_t type;
};
template <>
struct CellOf<4> {
  typedef uint16_t type;
};
