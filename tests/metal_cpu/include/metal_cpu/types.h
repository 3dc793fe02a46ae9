// Scalars, vectors and the little type machinery that Metal has.
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;  // rounds after every operation (-ffloat16-excess-precision=none)
typedef half float16_t;

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.1920929e-7f
#define MAXFLOAT FLT_MAX
#define M_E_F 2.71828183f
#define M_LOG2E_F 1.44269504f
#define M_LOG10E_F 0.43429448f
#define M_LN2_F 0.69314718f
#define M_LN10_F 2.30258509f
#define M_PI_F 3.14159274f
#define M_PI_2_F 1.57079637f
#define M_SQRT2_F 1.41421354f
#define M_SQRT1_2_F 0.70710678f
#define __METAL__ 1
#define __METAL_VERSION__ 310

namespace metal {
template <class T, T V> struct integral_constant {
  static constexpr T value = V;
  constexpr operator T() const { return V; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> {
  using type = T;
};
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class X, class Y> struct conditional {
  using type = X;
};
template <class X, class Y> struct conditional<false, X, Y> {
  using type = Y;
};
template <bool B, class X, class Y> using conditional_t = typename conditional<B, X, Y>::type;
template <class T> using remove_cv_t = __remove_cv(T);
template <class T> using remove_reference_t = __remove_reference_t(T);
template <class T> using remove_pointer_t = __remove_pointer(T);
template <class T> using remove_addrspace_t = __remove_cv(T);
template <class T> struct is_integral : bool_constant<__is_integral(T)> {};
template <class T> constexpr bool is_integral_v = is_integral<T>::value;
template <class From, class To> constexpr bool is_convertible_v = __is_convertible_to(From, To);
}  // namespace metal

// bfloat: the upper half of a float. It widens by itself; narrowing wants a cast, as in Metal.
struct bfloat {
  uint16_t bits;

  bfloat() = default;
  explicit constexpr bfloat(float x) : bits(round(x)) {}
  explicit constexpr bfloat(double x) : bits(round((float)x)) {}
  explicit constexpr bfloat(half x) : bits(round((float)x)) {}
  template <class I, class = metal::enable_if_t<metal::is_integral_v<I>>> explicit constexpr bfloat(I x)
      : bits(round((float)x)) {}
  constexpr operator float() const { return __builtin_bit_cast(float, (uint32_t)bits << 16); }

  static constexpr uint16_t round(float x) {  // to nearest, ties to even
    uint32_t b = __builtin_bit_cast(uint32_t, x);
    if ((b & 0x7fffffff) > 0x7f800000) return (b >> 16) | 0x40;
    return (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  }
};
typedef bfloat bfloat16_t;

#define METAL_CPU_BFLOAT(op)                                                                \
  constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat((float)a op(float) b); } \
  constexpr float operator op(bfloat a, float b) { return (float)a op b; }                  \
  constexpr float operator op(float a, bfloat b) { return a op(float) b; }                  \
  constexpr float operator op(bfloat a, half b) { return (float)a op(float) b; }            \
  constexpr float operator op(half a, bfloat b) { return (float)a op(float) b; }            \
  template <class I, class = metal::enable_if_t<metal::is_integral_v<I>>>                   \
  constexpr bfloat operator op(bfloat a, I b) {                                             \
    return bfloat((float)a op(float) b);                                                    \
  }                                                                                         \
  template <class I, class = metal::enable_if_t<metal::is_integral_v<I>>>                   \
  constexpr bfloat operator op(I a, bfloat b) {                                             \
    return bfloat((float)a op(float) b);                                                    \
  }                                                                                         \
  inline bfloat& operator op## = (bfloat & a, bfloat b) { return a = a op b; }
METAL_CPU_BFLOAT(+)
METAL_CPU_BFLOAT(-)
METAL_CPU_BFLOAT(*)
METAL_CPU_BFLOAT(/)
#undef METAL_CPU_BFLOAT
constexpr bfloat operator-(bfloat a) { return bfloat(-(float)a); }

namespace metal {
using ::bfloat;
using ::half;
template <class T> struct is_floating_point
    : bool_constant<__is_floating_point(T) || is_same_v<T, half> || is_same_v<T, bfloat>> {};
template <class T> constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T> constexpr bool is_arithmetic_v = is_floating_point_v<T> || is_integral_v<T>;

template <class T> struct numeric_limits;
#define METAL_CPU_LIMITS(T, lo, hi)            \
  template <> struct numeric_limits<T> {       \
    static constexpr T max() { return hi; }    \
    static constexpr T min() { return lo; }    \
    static constexpr T lowest() { return lo; } \
  };
METAL_CPU_LIMITS(char, -128, 127)
METAL_CPU_LIMITS(signed char, -128, 127)
METAL_CPU_LIMITS(uchar, 0, 255)
METAL_CPU_LIMITS(short, -32768, 32767)
METAL_CPU_LIMITS(ushort, 0, 65535)
METAL_CPU_LIMITS(int, -2147483647 - 1, 2147483647)
METAL_CPU_LIMITS(uint, 0, 4294967295u)
METAL_CPU_LIMITS(long, -9223372036854775807l - 1, 9223372036854775807l)
METAL_CPU_LIMITS(ulong, 0, 18446744073709551615ul)
#undef METAL_CPU_LIMITS
#define METAL_CPU_LIMITS(T, smallest, largest, eps)                  \
  template <> struct numeric_limits<T> {                             \
    static constexpr T max() { return T(largest); }                  \
    static constexpr T min() { return T(smallest); }                 \
    static constexpr T lowest() { return T(-largest); }              \
    static constexpr T infinity() { return T(__builtin_inff()); }    \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); } \
    static constexpr T epsilon() { return T(eps); }                  \
  };
METAL_CPU_LIMITS(float, FLT_MIN, FLT_MAX, FLT_EPSILON)
METAL_CPU_LIMITS(half, 6.103515625e-05f, 65504.0f, 0.0009765625f)
METAL_CPU_LIMITS(bfloat, FLT_MIN, 3.38953139e38f, 0.0078125f)
#undef METAL_CPU_LIMITS

// ---- vectors. Not clang's ext_vector_type, on which a C-style cast of int4 to float4 reinterprets the bits.
template <class T, int N> struct vec;

// A view of some components of a vector, such as v.zw. It lives in a union with the components. It names its
// value V, a vec<T, sizeof...(I)>, so that the operators of V are found for it.
template <class V, class T, int N, int... I> struct swizzle {
  T data[N];
  operator V() const { return V(data[I]...); }
  swizzle& operator=(const V& v) {
    int from = 0;
    ((data[I] = v.data[from++]), ...);
    return *this;
  }
  swizzle& operator=(const swizzle& other) { return *this = V(other); }
  swizzle& operator+=(const V& v) { return *this = V(*this) + v; }
  swizzle& operator-=(const V& v) { return *this = V(*this) - v; }
  swizzle& operator*=(const V& v) { return *this = V(*this) * v; }
  swizzle& operator/=(const V& v) { return *this = V(*this) / v; }
};

template <class T, int N> struct components;
template <class T> struct alignas(2 * sizeof(T)) components<T, 2> {
  union {
    T data[2];
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
    swizzle<vec<T, 2>, T, 2, 0, 0> xx;
    swizzle<vec<T, 2>, T, 2, 0, 1> xy;
    swizzle<vec<T, 2>, T, 2, 1, 0> yx;
    swizzle<vec<T, 2>, T, 2, 1, 1> yy;
  };
  components() {}  // uninitialised, as in Metal
  constexpr explicit components(int) : data{} {}
};
template <class T> struct alignas(4 * sizeof(T)) components<T, 3> {
  union {
    T data[3];
    struct {
      T x, y, z;
    };
    struct {
      T r, g, b;
    };
    swizzle<vec<T, 2>, T, 3, 0, 1> xy;
    swizzle<vec<T, 2>, T, 3, 0, 2> xz;
    swizzle<vec<T, 2>, T, 3, 1, 2> yz;
    swizzle<vec<T, 3>, T, 3, 2, 1, 0> zyx;
  };
  components() {}  // uninitialised, as in Metal
  constexpr explicit components(int) : data{} {}
};
template <class T> struct alignas(4 * sizeof(T)) components<T, 4> {
  union {
    T data[4];
    struct {
      T x, y, z, w;
    };
    struct {
      T r, g, b, a;
    };
    swizzle<vec<T, 2>, T, 4, 0, 1> xy;
    swizzle<vec<T, 2>, T, 4, 0, 2> xz;
    swizzle<vec<T, 2>, T, 4, 1, 2> yz;
    swizzle<vec<T, 2>, T, 4, 1, 3> yw;
    swizzle<vec<T, 2>, T, 4, 2, 3> zw;
    swizzle<vec<T, 3>, T, 4, 0, 1, 2> xyz;
    swizzle<vec<T, 3>, T, 4, 1, 2, 3> yzw;
    swizzle<vec<T, 4>, T, 4, 3, 2, 1, 0> wzyx;
  };
  components() {}  // uninitialised, as in Metal
  constexpr explicit components(int) : data{} {}
};

template <class T, int N> struct vec : components<T, N> {
  using components<T, N>::data;
  using element = T;

  vec() = default;
  vec(const vec& v) : components<T, N>() { __builtin_memcpy(data, v.data, sizeof data); }
  vec& operator=(const vec& v) {
    __builtin_memcpy(data, v.data, sizeof data);
    return *this;
  }
  constexpr vec(T s) : components<T, N>(0) {
    for (int i = 0; i < N; i++) data[i] = s;
  }
  template <class U, class = enable_if_t<!is_same_v<U, T>>> explicit vec(const vec<U, N>& v) {
    for (int i = 0; i < N; i++) data[i] = T(v.data[i]);
  }
  template <class U, int M, int... I, class = enable_if_t<!is_same_v<U, T>>>
  explicit vec(const swizzle<vec<U, N>, U, M, I...>& v) : vec(vec<U, N>(v)) {}
  // From scalars and shorter vectors, in order: float4(v.xy, 0.0f, 1.0f).
  template <class A, class B, class... More> constexpr vec(const A& a, const B& b, const More&... more)
      : components<T, N>(0) {
    T* to = data;
    append(to, a), append(to, b);
    (append(to, more), ...);
    static_assert(count<A>() + count<B>() + (0 + ... + count<More>()) == N, "wrong number of components");
  }

  T& operator[](int i) { return data[check(i)]; }
  const T& operator[](int i) const { return data[check(i)]; }

// Not templates, so that scalars and swizzles become vectors on either side.
#define METAL_CPU_OPERATOR(op)                                               \
  friend vec operator op(const vec& a, const vec& b) {                       \
    vec r;                                                                   \
    for (int i = 0; i < N; i++) r.data[i] = T(a.data[i] op b.data[i]);       \
    return r;                                                                \
  }                                                                          \
  friend vec& operator op## = (vec & a, const vec& b) { return a = a op b; }
  METAL_CPU_OPERATOR(+)
  METAL_CPU_OPERATOR(-)
  METAL_CPU_OPERATOR(*)
  METAL_CPU_OPERATOR(/)
  METAL_CPU_OPERATOR(%)
  METAL_CPU_OPERATOR(&)
  METAL_CPU_OPERATOR(|)
  METAL_CPU_OPERATOR(^)
  METAL_CPU_OPERATOR(<<)
  METAL_CPU_OPERATOR(>>)
#undef METAL_CPU_OPERATOR
#define METAL_CPU_COMPARE(op)                                       \
  friend vec<bool, N> operator op(const vec& a, const vec& b) {     \
    vec<bool, N> r;                                                 \
    for (int i = 0; i < N; i++) r.data[i] = a.data[i] op b.data[i]; \
    return r;                                                       \
  }
  METAL_CPU_COMPARE(<)
  METAL_CPU_COMPARE(>)
  METAL_CPU_COMPARE(<=)
  METAL_CPU_COMPARE(>=)
  METAL_CPU_COMPARE(==)
  METAL_CPU_COMPARE(!=)
#undef METAL_CPU_COMPARE
  friend vec operator-(const vec& a) {
    vec r;
    for (int i = 0; i < N; i++) r.data[i] = -a.data[i];
    return r;
  }
  friend vec operator~(const vec& a) {
    vec r;
    for (int i = 0; i < N; i++) r.data[i] = ~a.data[i];
    return r;
  }

 private:
  template <class A> static constexpr int count() { return length((A*)nullptr); }
  static constexpr int length(const void*) { return 1; }
  template <class U, int M> static constexpr int length(const vec<U, M>*) { return M; }
  template <class V, class U, int M, int... I> static constexpr int length(const swizzle<V, U, M, I...>*) {
    return sizeof...(I);
  }
  template <class A> static constexpr void append(T*& to, const A& a) { *to++ = T(a); }
  template <class U, int M> static constexpr void append(T*& to, const vec<U, M>& v) {
    for (int i = 0; i < M; i++) *to++ = T(v.data[i]);
  }
  template <class V, class U, int M, int... I>
  static constexpr void append(T*& to, const swizzle<V, U, M, I...>& v) {
    ((*to++ = T(v.data[I])), ...);
  }
  static int check(int i) {
    if ((unsigned)i >= N) metal_cpu_fail("out of bounds", "component of a vector", nullptr);
    return i;
  }
};

// Packed vectors: aligned like one component.
template <class T, int N> struct packed_vec {
  T data[N];
  operator vec<T, N>() const {
    vec<T, N> r;
    for (int i = 0; i < N; i++) r.data[i] = data[i];
    return r;
  }
  packed_vec& operator=(const vec<T, N>& v) {
    for (int i = 0; i < N; i++) data[i] = v.data[i];
    return *this;
  }
  T& operator[](int i) { return data[i]; }
  const T& operator[](int i) const { return data[i]; }
};
}  // namespace metal

#define METAL_CPU_NAMES(T)                       \
  typedef metal::vec<T, 2> T##2;                 \
  typedef metal::vec<T, 3> T##3;                 \
  typedef metal::vec<T, 4> T##4;                 \
  typedef metal::packed_vec<T, 2> packed_##T##2; \
  typedef metal::packed_vec<T, 3> packed_##T##3; \
  typedef metal::packed_vec<T, 4> packed_##T##4;
METAL_CPU_NAMES(bool)
METAL_CPU_NAMES(char)
METAL_CPU_NAMES(uchar)
METAL_CPU_NAMES(short)
METAL_CPU_NAMES(ushort)
METAL_CPU_NAMES(int)
METAL_CPU_NAMES(uint)
METAL_CPU_NAMES(long)
METAL_CPU_NAMES(ulong)
METAL_CPU_NAMES(half)
METAL_CPU_NAMES(bfloat)
METAL_CPU_NAMES(float)
#undef METAL_CPU_NAMES

template <class To, class From> inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Storage of one threadgroup variable; wrap.py writes the calls, with an Id of its own for each variable.
template <class T, int Id> METAL_CPU_UNCHECKED T& metal_cpu_threadgroup(const char* name) {
  static T* storage = (T*)metal_cpu_threadgroup_memory(name, sizeof(T), alignof(T));
  return *storage;
}
