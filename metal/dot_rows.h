// Multiplies rows of one slot by several vectors; every weight is read once.
#pragma once

#include "numbers.h"

template <typename F>
struct Matrix {
  const device uint8_t* weight;
  const device typename F::scale_type* scales;
  const device typename F::scale_type* biases;

  // Gives row 0 of a slot's n rows, from a lane's first column on.
  METAL_FUNC Matrix<F> at(int slot, int n, int k, int lane) const thread {
    const int column = lane * F::values;
    const int shared = (n + F::scale_rows - 1) / F::scale_rows;
    const size_t scale =
        size_t(slot) * shared * F::row_scales(k) + F::column_scales(column);
    return {
        weight + size_t(slot) * n * F::row_bytes(k) + F::column_bytes(column),
        scales + scale,
        biases + (F::factors ? slot * sizeof(float) : scale)};
  }
  // The rows of a tile, 1 to 8 from a multiple of their number on, share their
  // scales where rows do.
  METAL_FUNC Matrix<F> skip(int rows, int columns, int k) const thread {
    const int scale =
        rows / F::scale_rows * F::row_scales(k) + F::column_scales(columns);
    return {
        weight + rows * F::row_bytes(k) + F::column_bytes(columns),
        scales + scale,
        biases + (F::factors ? 0 : scale)};
  }
};

// A lane holds this many results at once; more would leave the registers.
GLM_CONST int kMaxResults = 16;

// A lane holds so many bytes of the next block while it adds one.
GLM_CONST int kMaxAhead = 128;

constexpr int rows_at_once(int rows, int width) {
  return rows * width <= kMaxResults ? rows : kMaxResults / width;
}

// Vectors in memory: vector m starts offsets[m] values after x.
template <typename T>
struct Vectors {
  const device T* x;
  const thread int* offsets;

  template <typename F>
  METAL_FUNC float load(int m, int column, thread float* x_thread)
      const thread {
    return F::load_x(x + offsets[m] + column, x_thread);
  }
  template <typename F>
  METAL_FUNC float
  load_safe(int m, int column, int left, thread float* x_thread) const thread {
    return F::load_x_safe(x + offsets[m] + column, left, x_thread);
  }
};

// Reads a lane's cells of `depth` blocks from `column` on; unless `whole`, of
// those that begin before `end`.
template <typename F, int matrices, int rows, int depth, bool whole>
METAL_FUNC void load_blocks(
    const thread Matrix<F>* w,
    int k,
    int used,
    int own,
    int column,
    int end,
    thread typename F::Cells* cells) {
  constexpr int all = matrices * rows;
  GLM_UNROLL
  for (int i = 0; i < depth * all; i++) {
    const int at = column + i / all * F::block;
    if ((whole || at < end) && (F::whole_tiles || i % rows < used)) {
      const Matrix<F> from = w[i % all / rows].skip(i % rows, at, k);
      F::load(from.weight, from.scales, from.biases, at + own, cells[i]);
    }
  }
}

// Adds these blocks to the sums of dot_rows.
template <
    typename V,
    typename F,
    int matrices,
    int rows,
    int width,
    int depth,
    bool whole>
METAL_FUNC void dot_blocks(
    const thread typename F::Cells* cells,
    int used,
    const thread V& x,
    int own,
    int column,
    int end,
    thread float* result) {
  constexpr int all = matrices * rows;
  thread float x_thread[F::values];
  GLM_UNROLL
  for (int d = 0; d < depth; d++) {
    const int at = column + d * F::block;
    GLM_UNROLL
    for (int m = 0; m < width && (whole || at < end); m++) {
      const float sum = x.template load<F>(m, at + own, x_thread);
      GLM_UNROLL
      for (int i = 0; i < all; i++) {
        if (F::whole_tiles || i % rows < used) {
          F::dot(cells[d * all + i], x_thread, sum, result[i * width + m]);
        }
      }
    }
  }
}

// Adds all whole blocks, which end at `end`. A lane asks for weights before it
// needs them: for the next block's while it adds one, or for those of `depth`
// blocks at once.
template <typename V, typename F, int matrices, int rows, int width, int depth>
METAL_FUNC void dot_whole_blocks(
    const thread Matrix<F>* w,
    int k,
    int used,
    const thread V& x,
    int own,
    int end,
    thread float* result) {
  constexpr int count = depth * matrices * rows;
  thread typename F::Cells cells[count];
  int column = 0;
  if constexpr (depth == 1 && count * int(sizeof(cells[0])) <= kMaxAhead) {
    thread typename F::Cells next[count];
    load_blocks<F, matrices, rows, 1, false>(w, k, used, own, 0, end, next);
    for (; column < end; column += F::block) {
      GLM_UNROLL
      for (int i = 0; i < count; i++) {
        cells[i] = next[i];
      }
      load_blocks<F, matrices, rows, 1, false>(
          w, k, used, own, column + F::block, end, next);
      dot_blocks<V, F, matrices, rows, width, 1, true>(
          cells, used, x, own, column, end, result);
    }
  } else {
    for (; column + depth * F::block <= end; column += depth * F::block) {
      load_blocks<F, matrices, rows, depth, true>(
          w, k, used, own, column, end, cells);
      dot_blocks<V, F, matrices, rows, width, depth, true>(
          cells, used, x, own, column, end, result);
    }
    if constexpr (depth > 1) {
      load_blocks<F, matrices, rows, depth, false>(
          w, k, used, own, column, end, cells);
      dot_blocks<V, F, matrices, rows, width, depth, false>(
          cells, used, x, own, column, end, result);
    }
  }
}

// Sets result[(i * rows + r) * width + m] to row r of matrix i times vector m,
// for every r < used. w[i] points to the lane's first column of row 0. `depth`
// blocks of columns are read at once.
template <
    typename V,
    typename F,
    int matrices,
    int rows,
    int width,
    int depth = 1>
METAL_FUNC void dot_rows(
    const thread Matrix<F>* w,
    int k,
    int used,
    const thread V& x,
    int lane,
    thread float* result) {
  thread float x_thread[F::values];
  GLM_UNROLL
  for (int i = 0; i < matrices * rows * width; i++) {
    result[i] = 0;
  }

  const int own = lane * F::values;  // the lane's first column of a block
  const int end = F::whole_blocks(k) * F::block;
  dot_whole_blocks<V, F, matrices, rows, width, depth>(
      w, k, used, x, own, end, result);

  if constexpr (F::partial_lanes) {
    const int left = min(k - end - own, F::values);
    GLM_UNROLL
    for (int i = 0; i < matrices * rows && left > 0; i++) {
      if (i % rows < used) {
        thread typename F::Cells tail;
        const Matrix<F> from = w[i / rows].skip(i % rows, end, k);
        F::load_safe(
            from.weight, from.scales, from.biases, end + own, left, tail);
        GLM_UNROLL
        for (int m = 0; m < width; m++) {
          const float sum =
              x.template load_safe<F>(m, end + own, left, x_thread);
          F::dot(tail, x_thread, sum, result[i * width + m]);
        }
      }
    }
  } else if constexpr (!F::whole_tiles) {
    if (end + own < k) {
      thread typename F::Cells tail[matrices * rows];
      load_blocks<F, matrices, rows, 1, true>(w, k, used, own, end, k, tail);
      dot_blocks<V, F, matrices, rows, width, 1, true>(
          tail, used, x, own, end, k, result);
    }
  }

  GLM_UNROLL
  for (int i = 0; i < matrices * rows * width; i++) {
    result[i] = F::total(F::reduce(result[i]), w[i / (rows * width)].biases);
  }
}

// Gate and up read x once where they share a format.
template <int rows, int width, typename V, typename F>
METAL_FUNC void dot_pair(
    Matrix<F> a,
    Matrix<F> b,
    int k,
    int used,
    const thread V& x,
    int lane,
    thread float* result) {
  const thread Matrix<F> both[2] = {a, b};
  dot_rows<V, F, 2, rows, width>(both, k, used, x, lane, result);
}

template <int rows, int width, typename V, typename A, typename B>
METAL_FUNC void dot_pair(
    Matrix<A> a,
    Matrix<B> b,
    int k,
    int used,
    const thread V& x,
    int lane,
    thread float* result) {
  dot_rows<V, A, 1, rows, width>(&a, k, used, x, lane, result);
  dot_rows<V, B, 1, rows, width>(&b, k, used, x, lane, result + rows * width);
}
