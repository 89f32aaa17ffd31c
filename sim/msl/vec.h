// Defines vec<T, N> and packed_vec<T, N>. A swizzle that names neighbouring
// elements (.xy, .yzw, …) is a packed_vec at their place; there are no others.
#pragma once

#include "limits.h"

namespace metal {

template <typename T, int N>
struct vec;
template <typename T, int N>
struct packed_vec;

// Tells the element type and the count of a scalar, vec or packed_vec.
template <typename V>
struct msl_lanes {
  typedef V element;
  static constexpr constant int count = 1;
  static constexpr constant bool vector = false;
};
template <typename T, int N>
struct msl_lanes<vec<T, N>> {
  typedef T element;
  static constexpr constant int count = N;
  static constexpr constant bool vector = true;
};
template <typename T, int N>
struct msl_lanes<packed_vec<T, N>> : msl_lanes<vec<T, N>> {};

template <typename V>
constexpr constant bool msl_is_vector = msl_lanes<V>::vector;
template <typename V>
constexpr constant bool msl_is_scalar = is_arithmetic_v<V>;
template <typename... V>
constexpr constant int msl_count = (msl_lanes<V>::count + ... + 0);

template <typename V>
MSL_FUNC constexpr typename msl_lanes<V>::element msl_lane(V v, int i) {
  if constexpr (msl_is_vector<V>) {
    return v.data[i];
  } else {
    return v;
  }
}

#define MSL_SWIZZLES_2(T) \
  T data[2];              \
  struct {                \
    T x, y;               \
  };                      \
  struct {                \
    T r, g;               \
  };
#define MSL_SWIZZLES_3(T) \
  T data[3];              \
  struct {                \
    T x, y, z;            \
  };                      \
  struct {                \
    T r, g, b;            \
  };                      \
  packed_vec<T, 2> xy;    \
  struct {                \
    T msl_skip_x_;        \
    packed_vec<T, 2> yz;  \
  };
#define MSL_SWIZZLES_4(T)   \
  T data[4];                \
  struct {                  \
    T x, y, z, w;           \
  };                        \
  struct {                  \
    T r, g, b, a;           \
  };                        \
  packed_vec<T, 2> xy;      \
  packed_vec<T, 3> xyz;     \
  packed_vec<T, 3> rgb;     \
  struct {                  \
    T msl_skip_x_;          \
    union {                 \
      packed_vec<T, 2> yz;  \
      packed_vec<T, 3> yzw; \
    };                      \
  };                        \
  struct {                  \
    T msl_skip_xy_[2];      \
    packed_vec<T, 2> zw;    \
  };

#define MSL_INDEX(space)                                \
  MSL_FUNC constexpr space T& operator[](int i) space { \
    return data[i];                                     \
  }
#define MSL_CONST_INDEX(space)                                      \
  MSL_FUNC constexpr const space T& operator[](int i) const space { \
    return data[i];                                                 \
  }

// The constructors splat, convert, and concatenate scalars and vectors.
#define MSL_VECTOR_MEMBERS(V, N)                                \
  typedef T element_type;                                       \
  V() = default;                                                \
  V(const V&) = default;                                        \
  V& operator=(const V&) = default;                             \
  template <typename U, enable_if_t<__is_same(U, V), int> = 0>  \
  MSL_FUNC constexpr V(const __constant U& other) : data{} {    \
    for (int i = 0; i < N; i++) {                               \
      data[i] = other.data[i];                                  \
    }                                                           \
  }                                                             \
  template <typename U, enable_if_t<__is_same(U, V), int> = 0>  \
  MSL_FUNC constexpr V& operator=(const __constant U& other) {  \
    for (int i = 0; i < N; i++) {                               \
      data[i] = other.data[i];                                  \
    }                                                           \
    return *this;                                               \
  }                                                             \
  template <typename U, enable_if_t<msl_is_scalar<U>, int> = 0> \
  MSL_FUNC constexpr V(U value) : data{} {                      \
    for (int i = 0; i < N; i++) {                               \
      data[i] = T(value);                                       \
    }                                                           \
  }                                                             \
  template <typename U>                                         \
  MSL_FUNC constexpr explicit V(vec<U, N> other) : data{} {     \
    for (int i = 0; i < N; i++) {                               \
      data[i] = T(other.data[i]);                               \
    }                                                           \
  }                                                             \
  template <                                                    \
      typename A,                                               \
      typename B,                                               \
      typename... Rest,                                         \
      enable_if_t<msl_count<A, B, Rest...> == N, int> = 0>      \
  MSL_FUNC constexpr V(A a, B b, Rest... rest) : data{} {       \
    int i = 0;                                                  \
    put(i, a);                                                  \
    put(i, b);                                                  \
    (put(i, rest), ...);                                        \
  }                                                             \
  template <typename A>                                         \
  MSL_FUNC constexpr void put(thread int& i, A a) {             \
    for (int k = 0; k < msl_lanes<A>::count; k++) {             \
      data[i++] = T(msl_lane(a, k));                            \
    }                                                           \
  }                                                             \
  MSL_INDEX(device)                                             \
  MSL_INDEX(threadgroup)                                        \
  MSL_INDEX(thread)                                             \
  MSL_CONST_INDEX(device)                                       \
  MSL_CONST_INDEX(threadgroup)                                  \
  MSL_CONST_INDEX(thread)                                       \
  MSL_CONST_INDEX(__constant)

#define MSL_VECTOR(N, storage, alignment)                            \
  template <typename T>                                              \
  struct packed_vec<T, N> {                                          \
    union {                                                          \
      storage                                                        \
    };                                                               \
    MSL_VECTOR_MEMBERS(packed_vec, N)                                \
    MSL_FUNC constexpr packed_vec(vec<T, N> other) : data{} {        \
      for (int i = 0; i < N; i++) {                                  \
        data[i] = other.data[i];                                     \
      }                                                              \
    }                                                                \
    MSL_FUNC constexpr operator vec<T, N>() const {                  \
      vec<T, N> v;                                                   \
      for (int i = 0; i < N; i++) {                                  \
        v.data[i] = data[i];                                         \
      }                                                              \
      return v;                                                      \
    }                                                                \
  };                                                                 \
  template <typename T>                                              \
  struct __attribute__((aligned(alignment * sizeof(T)))) vec<T, N> { \
    union {                                                          \
      storage                                                        \
    };                                                               \
    MSL_VECTOR_MEMBERS(vec, N)                                       \
  };

#define MSL_STORAGE(...) __VA_ARGS__
MSL_VECTOR(2, MSL_SWIZZLES_2(T), 2)
MSL_VECTOR(3, MSL_SWIZZLES_3(T), 4)
MSL_VECTOR(4, MSL_SWIZZLES_4(T), 4)
#undef MSL_STORAGE
#undef MSL_VECTOR
#undef MSL_VECTOR_MEMBERS
#undef MSL_INDEX
#undef MSL_CONST_INDEX

// Tells what an elementwise operation on A and B gives: vectors must agree, and
// a scalar takes the vector's element type.
template <typename A, typename B, typename = void>
struct msl_common {};
template <typename A, typename B>
struct msl_common<A, B, enable_if_t<msl_is_vector<A> && msl_is_scalar<B>>> {
  typedef typename msl_lanes<A>::element element;
  static constexpr constant int count = msl_lanes<A>::count;
};
template <typename A, typename B>
struct msl_common<A, B, enable_if_t<msl_is_scalar<A> && msl_is_vector<B>>>
    : msl_common<B, A> {};
template <typename A, typename B>
struct msl_common<
    A,
    B,
    enable_if_t<
        msl_is_vector<A> &&
        msl_is_vector<B>&& __is_same(
            typename msl_lanes<A>::element,
            typename msl_lanes<B>::element) &&
        msl_lanes<A>::count == msl_lanes<B>::count>> {
  typedef typename msl_lanes<A>::element element;
  static constexpr constant int count = msl_lanes<A>::count;
};

#define MSL_ELEMENTWISE(op)                                          \
  template <typename A, typename B, typename C = msl_common<A, B>>   \
  MSL_FUNC constexpr vec<typename C::element, C::count> operator op( \
      A a, B b) {                                                    \
    typedef typename C::element E;                                   \
    vec<E, C::count> r(E(0));                                        \
    for (int i = 0; i < C::count; i++) {                             \
      r.data[i] = E(E(msl_lane(a, i)) op E(msl_lane(b, i)));         \
    }                                                                \
    return r;                                                        \
  }
#define MSL_ASSIGN(op)                                                 \
  template <                                                           \
      typename T,                                                      \
      int N,                                                           \
      typename B,                                                      \
      typename C = msl_common<vec<T, N>, B>>                           \
  MSL_FUNC constexpr vec<T, N>& operator op## = (vec<T, N> & a, B b) { \
    return a = a op b;                                                 \
  }                                                                    \
  template <                                                           \
      typename T,                                                      \
      int N,                                                           \
      typename B,                                                      \
      typename C = msl_common<vec<T, N>, B>>                           \
  MSL_FUNC constexpr packed_vec<T, N>& operator op## =                 \
      (packed_vec<T, N> & a, B b) {                                    \
    return a = packed_vec<T, N>(a op b);                               \
  }
#define MSL_COMPARE(op)                                            \
  template <typename A, typename B, typename C = msl_common<A, B>> \
  MSL_FUNC constexpr vec<bool, C::count> operator op(A a, B b) {   \
    typedef typename C::element E;                                 \
    vec<bool, C::count> r(false);                                  \
    for (int i = 0; i < C::count; i++) {                           \
      r.data[i] = E(msl_lane(a, i)) op E(msl_lane(b, i));          \
    }                                                              \
    return r;                                                      \
  }
#define MSL_UNARY(op)                                     \
  template <typename T, int N>                            \
  MSL_FUNC constexpr vec<T, N> operator op(vec<T, N> a) { \
    for (int i = 0; i < N; i++) {                         \
      a.data[i] = T(op a.data[i]);                        \
    }                                                     \
    return a;                                             \
  }
#define MSL_BOTH(op) MSL_ELEMENTWISE(op) MSL_ASSIGN(op)
MSL_BOTH(+)
MSL_BOTH(-)
MSL_BOTH(*)
MSL_BOTH(/)
MSL_BOTH(%)
MSL_BOTH(&)
MSL_BOTH(|)
MSL_BOTH(^)
MSL_BOTH(<<)
MSL_BOTH(>>)
MSL_COMPARE(==)
MSL_COMPARE(!=)
MSL_COMPARE(<)
MSL_COMPARE(<=)
MSL_COMPARE(>)
MSL_COMPARE(>=)
MSL_COMPARE(&&)
MSL_COMPARE(||)
MSL_UNARY(-)
MSL_UNARY(~)
MSL_UNARY(!)
#undef MSL_BOTH
#undef MSL_ELEMENTWISE
#undef MSL_ASSIGN
#undef MSL_COMPARE
#undef MSL_UNARY

template <int N>
MSL_FUNC bool any(vec<bool, N> v) {
  bool r = false;
  for (int i = 0; i < N; i++) {
    r = r || v.data[i];
  }
  return r;
}
template <int N>
MSL_FUNC bool all(vec<bool, N> v) {
  bool r = true;
  for (int i = 0; i < N; i++) {
    r = r && v.data[i];
  }
  return r;
}
MSL_FUNC bool any(bool v) {
  return v;
}
MSL_FUNC bool all(bool v) {
  return v;
}

template <typename T, size_t N>
struct array {
  T msl_data_[N];
  constexpr thread T& operator[](size_t i) thread {
    return msl_data_[i];
  }
  constexpr const thread T& operator[](size_t i) const thread {
    return msl_data_[i];
  }
  constexpr threadgroup T& operator[](size_t i) threadgroup {
    return msl_data_[i];
  }
  constexpr device T& operator[](size_t i) device {
    return msl_data_[i];
  }
  constexpr const __constant T& operator[](size_t i) const __constant {
    return msl_data_[i];
  }
  static constexpr size_t size() {
    return N;
  }
};

}  // namespace metal

// These names are known without `using namespace metal`.
#define MSL_VECTOR_NAMES(T)                      \
  typedef metal::vec<T, 2> T##2;                 \
  typedef metal::vec<T, 3> T##3;                 \
  typedef metal::vec<T, 4> T##4;                 \
  typedef metal::packed_vec<T, 2> packed_##T##2; \
  typedef metal::packed_vec<T, 3> packed_##T##3; \
  typedef metal::packed_vec<T, 4> packed_##T##4;
MSL_VECTOR_NAMES(bool)
MSL_VECTOR_NAMES(char)
MSL_VECTOR_NAMES(uchar)
MSL_VECTOR_NAMES(short)
MSL_VECTOR_NAMES(ushort)
MSL_VECTOR_NAMES(int)
MSL_VECTOR_NAMES(uint)
MSL_VECTOR_NAMES(long)
MSL_VECTOR_NAMES(ulong)
MSL_VECTOR_NAMES(half)
MSL_VECTOR_NAMES(float)
MSL_VECTOR_NAMES(bfloat)
#undef MSL_VECTOR_NAMES
