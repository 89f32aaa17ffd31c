// Products of some vectors with the rows of a weight, which are decoded in
// threadgroup memory and multiplied by matrix units.
#pragma once

#include "dot_rows.h"
#include "matrix_unit.h"

GLM_CONST int kGroupSimdgroups = 4;
GLM_CONST int kGroupThreads = kGroupSimdgroups * kLanes;

// A threadgroup multiplies up to 128 vectors by 64 rows, 32 columns at a time.
// A simdgroup takes every fourth eight of the vectors, so that few vectors
// occupy all simdgroups.
GLM_CONST int kGroupVectors = 128;
GLM_CONST int kGroupRows = 64;
GLM_CONST int kGroupColumns = 32;
GLM_CONST int kTall = kGroupVectors / kSide / kGroupSimdgroups;
GLM_CONST int kWide = kGroupRows / kSide;
// So many eights of rows are summed at once over the columns of a step. These
// sums are added to those of all columns, which keeps their error small.
GLM_CONST int kWideStep = 2;
GLM_CONST int kSums = kTall * kWide;

// Rows of threadgroup memory begin in unlike banks.
GLM_CONST int kRowPitch = kGroupColumns + 4;
template <typename T>
METAL_FUNC constexpr int vector_pitch() {
  return kGroupColumns + 16 / int(sizeof(T));
}

template <typename T>
struct GroupProduct {
  threadgroup T* vectors;   // [kGroupVectors, vector_pitch]
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
      threadgroup T* to = vectors + vector * vector_pitch<T>() + at;
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
        if (left >= F::values) {
          F::load(from.weight, from.scales, from.biases, column + at, cells);
        } else {
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

  // Adds the products of these columns to the sums, [kTall, kWide] matrices.
  METAL_FUNC void multiply(thread float2* sums) const thread {
    constexpr int deep = kGroupColumns / kSide;
    const threadgroup T* a = vectors + matrix_column(lane);
    const threadgroup float* b =
        rows + matrix_column(lane) * kRowPitch + matrix_row(lane);
    GLM_UNROLL
    for (int j = 0; j < kWide; j += kWideStep) {
      thread float2 part[kTall * kWideStep];
      GLM_UNROLL
      for (int i = 0; i < kTall * kWideStep; i++) {
        part[i] = float2(0.0f);
      }
      GLM_UNROLL
      for (int d = 0; d < deep; d++) {
        thread float2 right[kWideStep];
        GLM_UNROLL
        for (int n = 0; n < kWideStep; n++) {
          // A row of the weight is a column of the matrix.
          const threadgroup float* from =
              b + (j + n) * kSide * kRowPitch + d * kSide;
          right[n] = float2(from[0], from[kRowPitch]);
        }
        GLM_UNROLL
        for (int i = 0; i < kTall; i++) {
          if (has(i)) {
            const threadgroup T* from =
                a + own_vector(i) * vector_pitch<T>() + d * kSide;
            const float2 left = float2(
                static_cast<float>(from[0]), static_cast<float>(from[1]));
            GLM_UNROLL
            for (int n = 0; n < kWideStep; n++) {
              multiply_matrices(left, right[n], part[i * kWideStep + n]);
            }
          }
        }
      }
      GLM_UNROLL
      for (int i = 0; i < kTall * kWideStep; i++) {
        sums[i / kWideStep * kWide + j + i % kWideStep] += part[i];
      }
    }
  }
};
