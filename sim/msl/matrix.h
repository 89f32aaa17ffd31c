// simdgroup_matrix is 8x8: each lane holds two neighbours of one row.
#pragma once

#include "simd.h"

namespace metal {

// These give the row and the (even) column of the pair that a lane holds, and
// the lane that holds a pair.
MSL_FUNC uint msl_matrix_row(uint lane) {
  return (lane / 4 & 4) + (lane / 2) % 4;
}
MSL_FUNC uint msl_matrix_column(uint lane) {
  return (lane / 4 & 2) * 2 + (lane % 2) * 2;
}
MSL_FUNC uint msl_matrix_lane(uint row, uint column) {
  return (row & 4) << 2 | (column & 4) << 1 | (row & 3) << 1 |
      (column >> 1 & 1);
}

template <typename T, int rows, int columns>
struct simdgroup_matrix {
  static_assert(rows == 8 && columns == 8, "simdgroup_matrix must be 8x8");
  vec<T, 2> msl_pair;
  simdgroup_matrix() = default;
  // Makes a diagonal matrix.
  MSL_FUNC explicit simdgroup_matrix(T value) {
    int offset = (int)msl_matrix_row(sim_rt_lane()) -
        (int)msl_matrix_column(sim_rt_lane());
    msl_pair =
        vec<T, 2>(offset == 0 ? value : T(0), offset == 1 ? value : T(0));
  }
  MSL_FUNC thread vec<T, 2>& thread_elements() thread {
    return msl_pair;
  }
  MSL_FUNC const thread vec<T, 2>& thread_elements() const thread {
    return msl_pair;
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <typename T, int rows, int columns>
MSL_FUNC simdgroup_matrix<T, rows, columns> make_filled_simdgroup_matrix(
    T value) {
  simdgroup_matrix<T, rows, columns> m;
  m.msl_pair = vec<T, 2>(value, value);
  return m;
}

MSL_FUNC ulong
msl_matrix_offset(ulong stride, ulong2 origin, uint i, bool transposed) {
  ulong r = msl_matrix_row(sim_rt_lane());
  ulong c = msl_matrix_column(sim_rt_lane()) + i;
  return transposed ? (origin.y + c) * stride + origin.x + r
                    : (origin.y + r) * stride + origin.x + c;
}

#define MSL_MATRIX_MEMORY(space)                                    \
  template <typename T>                                             \
  MSL_FUNC void simdgroup_load(                                     \
      thread simdgroup_matrix<T, 8, 8>& m,                          \
      const space T* source,                                        \
      ulong stride = 8,                                             \
      ulong2 origin = ulong2(0),                                    \
      bool transposed = false,                                      \
      MSL_SITE) {                                                   \
    msl_share(msl_op_matrix, 0u, MSL_HERE);                         \
    for (uint i = 0; i < 2; i++) {                                  \
      m.msl_pair.data[i] =                                          \
          source[msl_matrix_offset(stride, origin, i, transposed)]; \
    }                                                               \
  }                                                                 \
  template <typename T>                                             \
  MSL_FUNC void simdgroup_store(                                    \
      thread simdgroup_matrix<T, 8, 8>& m,                          \
      space T* target,                                              \
      ulong stride = 8,                                             \
      ulong2 origin = ulong2(0),                                    \
      bool transposed = false,                                      \
      MSL_SITE) {                                                   \
    msl_share(msl_op_matrix, 0u, MSL_HERE);                         \
    for (uint i = 0; i < 2; i++) {                                  \
      target[msl_matrix_offset(stride, origin, i, transposed)] =    \
          m.msl_pair.data[i];                                       \
    }                                                               \
  }
MSL_MATRIX_MEMORY(device)
MSL_MATRIX_MEMORY(threadgroup)
#undef MSL_MATRIX_MEMORY

template <typename A, typename B>
struct msl_matrix_pairs {
  vec<A, 2> a;
  vec<B, 2> b;
};

// Computes d = a b + c, with products accumulated in float32 from k = 0 up.
template <typename D, typename A, typename B, typename C>
MSL_FUNC void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<D, 8, 8>& d,
    thread simdgroup_matrix<A, 8, 8>& a,
    thread simdgroup_matrix<B, 8, 8>& b,
    thread simdgroup_matrix<C, 8, 8>& c,
    MSL_SITE) {
  typedef msl_matrix_pairs<A, B> pairs;
  pairs mine = {a.msl_pair, b.msl_pair};
  thread msl_exchange* x = msl_share(msl_op_matrix, mine, MSL_HERE);
  const thread pairs* all = msl_values<pairs>(x);
  uint row = msl_matrix_row(sim_rt_lane());
  uint column = msl_matrix_column(sim_rt_lane());
  float sum0 = (float)c.msl_pair.data[0], sum1 = (float)c.msl_pair.data[1];
  for (uint k = 0; k < 8; k++) {
    float left = (float)all[msl_matrix_lane(row, k)].a.data[k & 1];
    const thread pairs& right = all[msl_matrix_lane(k, column)];
    sum0 = __builtin_fmaf(left, (float)right.b.data[0], sum0);
    sum1 = __builtin_fmaf(left, (float)right.b.data[1], sum1);
  }
  d.msl_pair = vec<D, 2>(D(sum0), D(sum1));
}
template <typename D, typename A, typename B>
MSL_FUNC void simdgroup_multiply(
    thread simdgroup_matrix<D, 8, 8>& d,
    thread simdgroup_matrix<A, 8, 8>& a,
    thread simdgroup_matrix<B, 8, 8>& b,
    MSL_SITE) {
  simdgroup_matrix<float, 8, 8> zero(0.0f);
  simdgroup_multiply_accumulate(d, a, b, zero, MSL_HERE);
}

}  // namespace metal
