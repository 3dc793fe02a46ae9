// Metal's standard library as declarations, in C++ for OpenCL: a language with Metal's address spaces and most of its
// prohibitions, which clang knows. Nothing here runs; see lint.py. What has no address space is in the generic one here,
// which stands for all but `constant`; that kernels themselves name a space everywhere is for lint.py to see.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef half float16_t;

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
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
#define METAL_FUNC inline
#define __METAL__ 1
#define __METAL_VERSION__ 310

namespace metal {
template <class T, T V> struct integral_constant {
  static constexpr __constant T value = V;
  constexpr operator T() const { return V; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <class A, class B> constexpr __constant bool is_same_v = false;
template <class A> constexpr __constant bool is_same_v<A, A> = true;
template <class A, class B> struct is_same : bool_constant<is_same_v<A, B>> {};
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class X, class Y> struct conditional { using type = X; };
template <class X, class Y> struct conditional<false, X, Y> { using type = Y; };
template <bool B, class X, class Y> using conditional_t = typename conditional<B, X, Y>::type;
template <class T> constexpr __constant bool is_integral_v = __is_integral(T);
template <class T> struct is_integral : bool_constant<is_integral_v<T>> {};
}  // namespace metal

typedef __bf16 bfloat;  // clang narrows to it by itself, which Metal does not: lint.py sees to that
typedef bfloat bfloat16_t;

namespace metal {
using ::bfloat;
template <class T> constexpr __constant bool is_floating_point_v = is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T> struct is_floating_point : bool_constant<is_floating_point_v<T>> {};

template <class T> struct numeric_limits {
  static constexpr T max() { return T(0); }
  static constexpr T min() { return T(0); }
  static constexpr T lowest() { return T(0); }
  static constexpr T infinity() { return T(0); }
  static constexpr T quiet_NaN() { return T(0); }
  static constexpr T epsilon() { return T(0); }
};

// ---- vectors
template <class T, int N> struct vec;
template <class V, class T, int N> struct swizzle {  // its value is a V; the order of the components does not matter
  T data[N];
  operator V() const;
  operator V() const __constant;
  swizzle& operator=(V);
  swizzle& operator=(const swizzle&);
  swizzle& operator+=(V);
  swizzle& operator-=(V);
  swizzle& operator*=(V);
  swizzle& operator/=(V);
};
template <class T, int N> struct components;
template <class T> struct __attribute__((aligned(2 * sizeof(T)))) components<T, 2> {
  union {
    T data[2];
    struct { T x, y; };
    struct { T r, g; };
    swizzle<vec<T, 2>, T, 2> xx, xy, yx, yy;
  };
  components() {}
};
template <class T> struct __attribute__((aligned(4 * sizeof(T)))) components<T, 3> {
  union {
    T data[3];
    struct { T x, y, z; };
    struct { T r, g, b; };
    swizzle<vec<T, 2>, T, 3> xy, xz, yz;
    swizzle<vec<T, 3>, T, 3> zyx;
  };
  components() {}
};
template <class T> struct __attribute__((aligned(4 * sizeof(T)))) components<T, 4> {
  union {
    T data[4];
    struct { T x, y, z, w; };
    struct { T r, g, b, a; };
    swizzle<vec<T, 2>, T, 4> xy, xz, yz, yw, zw;
    swizzle<vec<T, 3>, T, 4> xyz, yzw;
    swizzle<vec<T, 4>, T, 4> wzyx;
  };
  components() {}
};
template <class T, int N> struct vec : components<T, N> {
  using element = T;
  vec() {}
  vec(T) {}
  vec(const vec&) {}
  vec(const __constant vec&) {}
  vec& operator=(vec);
  template <class U, class = enable_if_t<!is_same_v<U, T>>> explicit vec(const vec<U, N>&) {}
  template <class U, class = enable_if_t<!is_same_v<U, T>>> explicit vec(const __constant vec<U, N>&) {}
  template <class A, class B, class... More> vec(A, B, More...) {}
  T& operator[](int);
  const T& operator[](int) const;
  const __constant T& operator[](int) const __constant;
#define LINT_OPERATOR(op) friend vec operator op(vec, vec); friend vec& operator op##=(vec&, vec);
  LINT_OPERATOR(+) LINT_OPERATOR(-) LINT_OPERATOR(*) LINT_OPERATOR(/) LINT_OPERATOR(%)
  LINT_OPERATOR(&) LINT_OPERATOR(|) LINT_OPERATOR(^) LINT_OPERATOR(<<) LINT_OPERATOR(>>)
#define LINT_COMPARE(op) friend vec<bool, N> operator op(vec, vec);
  LINT_COMPARE(<) LINT_COMPARE(>) LINT_COMPARE(<=) LINT_COMPARE(>=) LINT_COMPARE(==) LINT_COMPARE(!=)
  friend vec operator-(vec);
  friend vec operator~(vec);
};
template <class T, int N> struct packed_vec {
  T data[N];
  operator vec<T, N>() const;
  operator vec<T, N>() const __constant;
  packed_vec& operator=(vec<T, N>);
  T& operator[](int);
  const T& operator[](int) const;
};
}  // namespace metal
#define LINT_NAMES(T)                                                                                              \
  typedef metal::vec<T, 2> T##2; typedef metal::vec<T, 3> T##3; typedef metal::vec<T, 4> T##4;                     \
  typedef metal::packed_vec<T, 2> packed_##T##2; typedef metal::packed_vec<T, 3> packed_##T##3;                    \
  typedef metal::packed_vec<T, 4> packed_##T##4;
LINT_NAMES(bool) LINT_NAMES(char) LINT_NAMES(uchar) LINT_NAMES(short) LINT_NAMES(ushort) LINT_NAMES(int)
LINT_NAMES(uint) LINT_NAMES(long) LINT_NAMES(ulong) LINT_NAMES(half) LINT_NAMES(bfloat) LINT_NAMES(float)
template <class To, class From> To as_type(From);

namespace metal {
// ---- math
#define LINT_INTEGER(T) T max(T, T); T min(T, T); T clamp(T, T, T);
LINT_INTEGER(char) LINT_INTEGER(uchar) LINT_INTEGER(short) LINT_INTEGER(ushort)
LINT_INTEGER(int) LINT_INTEGER(uint) LINT_INTEGER(long) LINT_INTEGER(ulong)
short abs(short); int abs(int); long abs(long);
uint popcount(uint); uint clz(uint); uint ctz(uint); uint reverse_bits(uint); uint mulhi(uint, uint); int mulhi(int, int);
#define LINT_FLOAT1(f) float f(float); half f(half); bfloat f(bfloat); template <class T, int N> vec<T, N> f(vec<T, N>);
#define LINT_FLOAT2(f) float f(float, float); half f(half, half); bfloat f(bfloat, bfloat);                        \
  template <class T, int N> vec<T, N> f(vec<T, N>, vec<T, N>);
#define LINT_FLOAT3(f) float f(float, float, float); half f(half, half, half); bfloat f(bfloat, bfloat, bfloat);   \
  template <class T, int N> vec<T, N> f(vec<T, N>, vec<T, N>, vec<T, N>);
LINT_FLOAT1(abs) LINT_FLOAT1(fabs) LINT_FLOAT1(floor) LINT_FLOAT1(ceil) LINT_FLOAT1(rint) LINT_FLOAT1(round)
LINT_FLOAT1(trunc) LINT_FLOAT1(fract) LINT_FLOAT1(sign) LINT_FLOAT1(saturate)
LINT_FLOAT2(max) LINT_FLOAT2(min) LINT_FLOAT2(fmax) LINT_FLOAT2(fmin) LINT_FLOAT2(fmod) LINT_FLOAT2(copysign) LINT_FLOAT2(step)
LINT_FLOAT3(clamp) LINT_FLOAT3(mix) LINT_FLOAT3(fma) LINT_FLOAT3(mad)
float ldexp(float, int);
bool isnan(float); bool isinf(float); bool isfinite(float);
#define LINT_TRANSCENDENTAL                                                                                        \
  LINT_FLOAT1(exp) LINT_FLOAT1(exp2) LINT_FLOAT1(exp10) LINT_FLOAT1(log) LINT_FLOAT1(log2) LINT_FLOAT1(log10)      \
  LINT_FLOAT1(sqrt) LINT_FLOAT1(rsqrt) LINT_FLOAT1(sin) LINT_FLOAT1(cos) LINT_FLOAT1(tan) LINT_FLOAT1(asin)        \
  LINT_FLOAT1(acos) LINT_FLOAT1(atan) LINT_FLOAT1(sinh) LINT_FLOAT1(cosh) LINT_FLOAT1(tanh)                        \
  LINT_FLOAT2(pow) LINT_FLOAT2(powr) LINT_FLOAT2(atan2) LINT_FLOAT2(divide)
LINT_TRANSCENDENTAL
namespace precise { LINT_TRANSCENDENTAL using metal::abs; using metal::clamp; using metal::fma; using metal::max; using metal::min; }
namespace fast { LINT_TRANSCENDENTAL using metal::abs; using metal::clamp; using metal::fma; using metal::max; using metal::min; }
template <class T> T select(T, T, bool);
template <class T, int N> vec<T, N> select(vec<T, N>, vec<T, N>, vec<bool, N>);
template <int N> bool any(vec<bool, N>);
template <int N> bool all(vec<bool, N>);
template <class T, int N> T dot(vec<T, N>, vec<T, N>);
template <class T, int N> T length_squared(vec<T, N>);
template <class T, int N> T length(vec<T, N>);
template <class T, int N> vec<T, N> normalize(vec<T, N>);

// ---- barriers and simdgroups
struct mem_flags {
  enum flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
};
mem_flags::flags operator|(mem_flags::flags, mem_flags::flags);
void threadgroup_barrier(mem_flags::flags);
void simdgroup_barrier(mem_flags::flags);
// A simd operation takes scalars and vectors by value. bool is not among them.
template <class T> struct lint_value { using type = T; };
template <> struct lint_value<bool> {};
#define LINT_SIMD(f) template <class T> typename lint_value<T>::type f(T);
LINT_SIMD(simd_sum) LINT_SIMD(simd_product) LINT_SIMD(simd_max) LINT_SIMD(simd_min)
LINT_SIMD(simd_and) LINT_SIMD(simd_or) LINT_SIMD(simd_xor)
LINT_SIMD(quad_sum) LINT_SIMD(quad_product) LINT_SIMD(quad_max) LINT_SIMD(quad_min)
LINT_SIMD(quad_and) LINT_SIMD(quad_or) LINT_SIMD(quad_xor)
LINT_SIMD(simd_prefix_inclusive_sum) LINT_SIMD(simd_prefix_exclusive_sum)
LINT_SIMD(simd_prefix_inclusive_product) LINT_SIMD(simd_prefix_exclusive_product) LINT_SIMD(simd_broadcast_first)
#define LINT_SHUFFLE(f) template <class T> typename lint_value<T>::type f(T, ushort);
LINT_SHUFFLE(simd_shuffle) LINT_SHUFFLE(simd_shuffle_xor) LINT_SHUFFLE(simd_shuffle_down) LINT_SHUFFLE(simd_shuffle_up)
LINT_SHUFFLE(simd_shuffle_rotate_down) LINT_SHUFFLE(simd_shuffle_rotate_up) LINT_SHUFFLE(simd_broadcast)
LINT_SHUFFLE(quad_broadcast) LINT_SHUFFLE(quad_shuffle) LINT_SHUFFLE(quad_shuffle_xor)
template <class T> T simd_shuffle_and_fill_down(T, T, ushort);
template <class T> T simd_shuffle_and_fill_up(T, T, ushort);
bool simd_any(bool);
bool simd_all(bool);
bool simd_is_first();
struct simd_vote {
  typedef ulong vote_t;
  explicit operator vote_t() const;
  bool all() const;
  bool any() const;
};
simd_vote simd_ballot(bool);

template <class T, int Columns, int Rows> struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "Metal has 8x8 simdgroup matrices only");
  static_assert(is_floating_point_v<T>, "simdgroup matrices hold half, bfloat or float");
  vec<T, 2> elements;
  simdgroup_matrix() {}
  explicit simdgroup_matrix(T) {}
  __private vec<T, 2>& thread_elements();
  const __private vec<T, 2>& thread_elements() const;
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int Columns, int Rows> simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T);
#define LINT_MATRIX_MEMORY(S)                                                                                      \
  template <class T> void simdgroup_load(__private simdgroup_matrix<T, 8, 8>&, const S T*, ulong = 8, ulong2 = ulong2(0), bool = false); \
  template <class T> void simdgroup_store(simdgroup_matrix<T, 8, 8>, S T*, ulong = 8, ulong2 = ulong2(0), bool = false);
LINT_MATRIX_MEMORY(__global) LINT_MATRIX_MEMORY(__local)
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(__private simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>,
                                   simdgroup_matrix<C, 8, 8>);
template <class D, class A, class B>
void simdgroup_multiply(__private simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>);

// ---- atomics
enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T value; };
template <class T> struct lint_same { using type = T; };
#define LINT_ATOMIC(f)                                                                                             \
  template <class T> T f(volatile __global atomic<T>*, typename lint_same<T>::type, memory_order);                 \
  template <class T> T f(volatile __local atomic<T>*, typename lint_same<T>::type, memory_order);
LINT_ATOMIC(atomic_fetch_add_explicit) LINT_ATOMIC(atomic_fetch_sub_explicit) LINT_ATOMIC(atomic_fetch_max_explicit)
LINT_ATOMIC(atomic_fetch_min_explicit) LINT_ATOMIC(atomic_fetch_and_explicit) LINT_ATOMIC(atomic_fetch_or_explicit)
LINT_ATOMIC(atomic_fetch_xor_explicit) LINT_ATOMIC(atomic_exchange_explicit) LINT_ATOMIC(atomic_store_explicit)
template <class T> T atomic_load_explicit(const volatile __global atomic<T>*, memory_order);
template <class T> T atomic_load_explicit(const volatile __local atomic<T>*, memory_order);
}  // namespace metal
#define atomic_int metal::atomic<int>  // the names are OpenCL's, for other types
#define atomic_uint metal::atomic<uint>
#define atomic_float metal::atomic<float>

using namespace metal;
template <class T> struct Limits {
  static constexpr __constant T max = T(0), min = T(0), finite_max = T(0), finite_min = T(0);
};
template <class T, class U> inline T ceildiv(T n, U m) { return (n + m - 1) / m; }
template <class Index = int64_t> Index elem_to_loc(Index, const __constant int*, const __constant int64_t*, int);

// Storage of one threadgroup variable, see wrap.place_threadgroup_variables.
template <class T> __local T& metal_lint_threadgroup();

#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
