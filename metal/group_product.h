// Products of some vectors with the rows of a weight, which are decoded in
// threadgroup memory and multiplied by matrix units.
#pragma once

#include "dot_rows.h"
#include "matrix_unit.h"

GLM_CONST int kGroupSimdgroups = 4;
GLM_CONST int kGroupThreads = kGroupSimdgroups * kLanes;

// A threadgroup multiplies some vectors by 64 rows, 32 columns at a time. A
// simdgroup takes every fourth eight of the vectors, so that few vectors occupy
// all simdgroups.
GLM_CONST int kGroupRows = 64;
GLM_CONST int kGroupColumns = 32;
GLM_CONST int kWide = kGroupRows / kSide;
GLM_CONST int kDeep = kGroupColumns / kSide;
// So many eights of rows are summed at once over the columns of a step. These
// sums are added to those of all columns, which keeps their error small.
GLM_CONST int kWideStep = 2;

// Rows of threadgroup memory begin in unlike banks.
GLM_CONST int kRowPitch = kGroupColumns + 4;

// What depends on the type of the vectors. With fp32, whose results show every
// rounding, sums are compensated and take twice the registers.
template <typename T>
struct GroupTile {
  GLM_CONST bool compensated = sizeof(T) == sizeof(float);
  GLM_CONST int vectors = compensated ? 64 : 128;
  GLM_CONST int pitch = kGroupColumns + 16 / int(sizeof(T));
  GLM_CONST int tall = vectors / kSide / kGroupSimdgroups;
  GLM_CONST int deep_step = compensated ? 1 : kDeep;
};

// A simdgroup's sums, [tall, kWide] matrices.
template <typename T>
struct GroupSums {
  typedef GroupTile<T> Tile;
  GLM_CONST int count = Tile::tall * kWide;
  float2 sums[count];
  float2 lost[Tile::compensated ? count : 1];  // by rounding, with its sign

  METAL_FUNC void clear() thread {
    GLM_UNROLL
    for (int i = 0; i < count; i++) {
      sums[i] = float2(0.0f);
      if (Tile::compensated) {
        lost[i] = float2(0.0f);
      }
    }
  }

  METAL_FUNC void add(int at, float2 part) thread {
    if constexpr (Tile::compensated) {
      const float2 more = part - lost[at];
      const float2 sum = sums[at] + more;
      GLM_UNROLL
      for (int i = 0; i < 2; i++) {
        const float error = (sum[i] - sums[at][i]) - more[i];
        lost[at][i] = isnan(error) ? 0.0f : error;  // of an infinite sum
      }
      sums[at] = sum;
    } else {
      sums[at] += part;
    }
  }
};

template <typename T>
struct GroupProduct {
  typedef GroupTile<T> Tile;
  threadgroup T* vectors;   // [Tile::vectors, Tile::pitch]
  threadgroup float* rows;  // [kGroupRows, kRowPitch]
  int count;                // of vectors
  int simdgroup;
  int lane;

  // Gives a lane's vector of an eight, and its place in the group.
  METAL_FUNC int own_vector(int eight) const thread {
    return (simdgroup + eight * kGroupSimdgroups) * kSide + matrix_row(lane);
  }
  METAL_FUNC bool has(int eight) const thread {
    return (simdgroup + eight * kGroupSimdgroups) * kSide < count;
  }

  // Reads columns [column, column + kGroupColumns) of the vectors, which are
  // rows `places` of x; what lies beyond k is 0. With `aligned`, vectors are
  // fours.
  template <bool aligned>
  METAL_FUNC void load_vectors(
      const device T* x,
      const threadgroup int* places,
      int column,
      int k) const thread {
    constexpr int fours = kGroupColumns / 4;
    const int whole = (count + kSide - 1) / kSide * kSide;
    for (int i = simdgroup * kLanes + lane; i < whole * fours;
         i += kGroupThreads) {
      const int vector = i / fours, at = i % fours * 4;
      threadgroup T* to = vectors + vector * Tile::pitch + at;
      const int left = vector < count ? k - column - at : 0;
      const device T* from =
          x + size_t(vector < count ? places[vector] : 0) * k + column + at;
      if (aligned && left > 0) {
        *(threadgroup vec<T, 4>*)to = *(const device vec<T, 4>*)from;
      } else {
        GLM_UNROLL
        for (int j = 0; j < 4; j++) {
          to[j] = j < left ? from[j] : T(0);
        }
      }
    }
  }

  // Decodes the same columns of `most` rows, of which there are `used`, to
  // rows [first, first + most); `w` is at the first row.
  template <typename F, int most>
  METAL_FUNC void load_rows(
      const thread Matrix<F>& w,
      int first,
      int used,
      int column,
      int k) const thread {
    constexpr int cells_of_row = kGroupColumns / F::values;
    for (int i = simdgroup * kLanes + lane; i < most * cells_of_row;
         i += kGroupThreads) {
      const int row = i / cells_of_row, at = i % cells_of_row * F::values;
      const int left = row < used ? k - column - at : 0;
      thread float values[F::values];
      if (left > 0) {
        const Matrix<F> from = w.skip(row, column + at, k);
        thread typename F::Cells cells;
        if (!F::partial_lanes || left >= F::values) {
          F::load(from.weight, from.scales, from.biases, column + at, cells);
        } else if constexpr (F::partial_lanes) {
          F::load_safe(
              from.weight, from.scales, from.biases, column + at, left, cells);
        }
        F::decode(cells, values);
      }
      threadgroup float* to = rows + (first + row) * kRowPitch + at;
      GLM_UNROLL
      for (int j = 0; j < F::values; j += 4) {
        *(threadgroup float4*)(to + j) = left > 0
            ? float4(values[j], values[j + 1], values[j + 2], values[j + 3])
            : float4(0.0f);
      }
    }
  }

  // Adds the products of these columns to the sums.
  METAL_FUNC void multiply(thread GroupSums<T>& sums) const thread {
    const threadgroup T* a = vectors + matrix_column(lane);
    const threadgroup float* b =
        rows + matrix_column(lane) * kRowPitch + matrix_row(lane);
    GLM_UNROLL
    for (int i = 0; i < kWide / kWideStep * kDeep; i += Tile::deep_step) {
      add_parts(a, b, i / kDeep * kWideStep, i % kDeep, sums);
    }
  }

  // Adds those of kWideStep eights of rows and Tile::deep_step of columns.
  METAL_FUNC void add_parts(
      const threadgroup T* a,
      const threadgroup float* b,
      int wide,
      int deep,
      thread GroupSums<T>& sums) const thread {
    thread float2 part[Tile::tall * kWideStep];
    GLM_UNROLL
    for (int i = 0; i < Tile::tall * kWideStep; i++) {
      part[i] = float2(0.0f);
    }
    GLM_UNROLL
    for (int d = deep; d < deep + Tile::deep_step; d++) {
      thread float2 right[kWideStep];
      GLM_UNROLL
      for (int n = 0; n < kWideStep; n++) {
        // A row of the weight is a column of the matrix.
        const threadgroup float* from =
            b + (wide + n) * kSide * kRowPitch + d * kSide;
        right[n] = float2(from[0], from[kRowPitch]);
      }
      GLM_UNROLL
      for (int i = 0; i < Tile::tall; i++) {
        if (has(i)) {
          const threadgroup T* from =
              a + own_vector(i) * Tile::pitch + d * kSide;
          const float2 left =
              float2(static_cast<float>(from[0]), static_cast<float>(from[1]));
          GLM_UNROLL
          for (int n = 0; n < kWideStep; n++) {
            multiply_matrices(left, right[n], part[i * kWideStep + n]);
          }
        }
      }
    }
    GLM_UNROLL
    for (int i = 0; i < Tile::tall * kWideStep; i++) {
      sums.add(i / kWideStep * kWide + wide + i % kWideStep, part[i]);
    }
  }
};
