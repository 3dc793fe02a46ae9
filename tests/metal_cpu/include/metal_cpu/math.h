// Math. Overloads for concrete types, not templates over mixed ones: a call that is ambiguous in Metal, such
// as max(1, 2u), is ambiguous here.
#pragma once

namespace metal {

#define METAL_CPU_INTEGER(T)                                                \
  inline T max(T a, T b) { return a > b ? a : b; }                          \
  inline T min(T a, T b) { return a < b ? a : b; }                          \
  inline T clamp(T x, T lo, T hi) { return x < lo ? lo : x > hi ? hi : x; }
METAL_CPU_INTEGER(char)
METAL_CPU_INTEGER(uchar)
METAL_CPU_INTEGER(short)
METAL_CPU_INTEGER(ushort)
METAL_CPU_INTEGER(int)
METAL_CPU_INTEGER(uint)
METAL_CPU_INTEGER(long)
METAL_CPU_INTEGER(ulong)
#undef METAL_CPU_INTEGER
inline short abs(short a) { return a < 0 ? -a : a; }
inline int abs(int a) { return a < 0 ? -a : a; }
inline long abs(long a) { return a < 0 ? -a : a; }
inline uint popcount(uint x) { return __builtin_popcount(x); }
inline uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
inline uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
inline uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
inline uint mulhi(uint a, uint b) { return (uint)((ulong)a * b >> 32); }
inline int mulhi(int a, int b) { return (int)((long)a * b >> 32); }

// A function of one, two or three floats, for half and bfloat (computed in float and rounded) and for
// vectors.
#define METAL_CPU_FLOAT1(name, expression)                              \
  inline float name(float x) { return expression; }                     \
  inline half name(half x) { return (half)name((float)x); }             \
  inline bfloat name(bfloat x) { return bfloat(name((float)x)); }       \
  template <class T, int N> inline vec<T, N> name(const vec<T, N>& x) { \
    vec<T, N> r;                                                        \
    for (int i = 0; i < N; i++) r.data[i] = name(x.data[i]);            \
    return r;                                                           \
  }
#define METAL_CPU_FLOAT2(name, expression)                                                  \
  inline float name(float x, float y) { return expression; }                                \
  inline half name(half x, half y) { return (half)name((float)x, (float)y); }               \
  inline bfloat name(bfloat x, bfloat y) { return bfloat(name((float)x, (float)y)); }       \
  template <class T, int N> inline vec<T, N> name(const vec<T, N>& x, const vec<T, N>& y) { \
    vec<T, N> r;                                                                            \
    for (int i = 0; i < N; i++) r.data[i] = name(x.data[i], y.data[i]);                     \
    return r;                                                                               \
  }
#define METAL_CPU_FLOAT3(name, expression)                                                                \
  inline float name(float x, float y, float z) { return expression; }                                     \
  inline half name(half x, half y, half z) { return (half)name((float)x, (float)y, (float)z); }           \
  inline bfloat name(bfloat x, bfloat y, bfloat z) { return bfloat(name((float)x, (float)y, (float)z)); } \
  template <class T, int N>                                                                               \
  inline vec<T, N> name(const vec<T, N>& x, const vec<T, N>& y, const vec<T, N>& z) {                     \
    vec<T, N> r;                                                                                          \
    for (int i = 0; i < N; i++) r.data[i] = name(x.data[i], y.data[i], z.data[i]);                        \
    return r;                                                                                             \
  }

METAL_CPU_FLOAT1(abs, __builtin_fabsf(x))
METAL_CPU_FLOAT1(fabs, __builtin_fabsf(x))
METAL_CPU_FLOAT1(floor, __builtin_floorf(x))
METAL_CPU_FLOAT1(ceil, __builtin_ceilf(x))
METAL_CPU_FLOAT1(rint, __builtin_rintf(x))
METAL_CPU_FLOAT1(round, __builtin_roundf(x))
METAL_CPU_FLOAT1(trunc, __builtin_truncf(x))
METAL_CPU_FLOAT1(fract, x - __builtin_floorf(x))
METAL_CPU_FLOAT1(sign, (x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f))
METAL_CPU_FLOAT1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
METAL_CPU_FLOAT2(max, __builtin_fmaxf(x, y))
METAL_CPU_FLOAT2(min, __builtin_fminf(x, y))
METAL_CPU_FLOAT2(fmax, __builtin_fmaxf(x, y))
METAL_CPU_FLOAT2(fmin, __builtin_fminf(x, y))
METAL_CPU_FLOAT2(fmod, __builtin_fmodf(x, y))
METAL_CPU_FLOAT2(copysign, __builtin_copysignf(x, y))
METAL_CPU_FLOAT2(step, (y < x ? 0.0f : 1.0f))
METAL_CPU_FLOAT3(clamp, __builtin_fminf(__builtin_fmaxf(x, y), z))
METAL_CPU_FLOAT3(mix, x + (y - x) * z)
METAL_CPU_FLOAT3(fma, __builtin_fmaf(x, y, z))
METAL_CPU_FLOAT3(mad, x* y + z)
inline float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }

// Checked builds count exponentials.
#ifdef METAL_CPU_COUNT
#define METAL_CPU_EXPONENTIAL(name, expression) \
  METAL_CPU_FLOAT1(name, (metal_cpu_count(metal_cpu::kExponential), expression))
#else
#define METAL_CPU_EXPONENTIAL METAL_CPU_FLOAT1
#endif

// These exist three times: plain, precise:: and fast::. The noise of fast:: is a few units in the last place,
// of a size and sign that depend on the value alone, and shows who leans on an exact exp.
#define METAL_CPU_TRANSCENDENTAL(result)                     \
  METAL_CPU_EXPONENTIAL(exp, result(__builtin_expf(x)))      \
  METAL_CPU_EXPONENTIAL(exp2, result(__builtin_exp2f(x)))    \
  METAL_CPU_EXPONENTIAL(exp10, result(__builtin_exp10f(x)))  \
  METAL_CPU_FLOAT1(log, result(__builtin_logf(x)))           \
  METAL_CPU_FLOAT1(log2, result(__builtin_log2f(x)))         \
  METAL_CPU_FLOAT1(log10, result(__builtin_log10f(x)))       \
  METAL_CPU_FLOAT1(sqrt, result(__builtin_sqrtf(x)))         \
  METAL_CPU_FLOAT1(rsqrt, result(1.0f / __builtin_sqrtf(x))) \
  METAL_CPU_FLOAT1(sin, result(__builtin_sinf(x)))           \
  METAL_CPU_FLOAT1(cos, result(__builtin_cosf(x)))           \
  METAL_CPU_FLOAT1(tan, result(__builtin_tanf(x)))           \
  METAL_CPU_FLOAT1(asin, result(__builtin_asinf(x)))         \
  METAL_CPU_FLOAT1(acos, result(__builtin_acosf(x)))         \
  METAL_CPU_FLOAT1(atan, result(__builtin_atanf(x)))         \
  METAL_CPU_FLOAT1(sinh, result(__builtin_sinhf(x)))         \
  METAL_CPU_FLOAT1(cosh, result(__builtin_coshf(x)))         \
  METAL_CPU_FLOAT1(tanh, result(__builtin_tanhf(x)))         \
  METAL_CPU_FLOAT2(pow, result(__builtin_powf(x, y)))        \
  METAL_CPU_FLOAT2(powr, result(__builtin_powf(x, y)))       \
  METAL_CPU_FLOAT2(atan2, result(__builtin_atan2f(x, y)))    \
  METAL_CPU_FLOAT2(divide, result(x / y))
#define METAL_CPU_EXACT(value) (value)
METAL_CPU_TRANSCENDENTAL(METAL_CPU_EXACT)
namespace precise {
METAL_CPU_TRANSCENDENTAL(METAL_CPU_EXACT)
using metal::abs, metal::clamp, metal::fma, metal::max, metal::min;
}  // namespace precise
namespace fast {
#ifndef METAL_CPU_FAST_NOISE
#define METAL_CPU_FAST_NOISE 0
#endif
inline float metal_cpu_noisy(float x) {
  uint32_t bits = __builtin_bit_cast(uint32_t, x), magnitude = bits & 0x7fffffff;
  if (magnitude < 0x01000000 || magnitude > 0x7f000000) return x;  // zeros, denormals, infinities stay
  int span = 2 * METAL_CPU_FAST_NOISE + 1;
  return __builtin_bit_cast(float, bits + (bits * 2654435761u >> 8) % span - METAL_CPU_FAST_NOISE);
}
METAL_CPU_TRANSCENDENTAL(metal_cpu_noisy)
using metal::abs, metal::clamp, metal::fma, metal::max, metal::min;
}  // namespace fast

template <class T> inline T select(T a, T b, bool c) { return c ? b : a; }
template <class T, int N>
inline vec<T, N> select(const vec<T, N>& a, const vec<T, N>& b, const vec<bool, N>& c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.data[i] = c.data[i] ? b.data[i] : a.data[i];
  return r;
}
template <int N> inline bool any(const vec<bool, N>& v) {
  bool r = false;
  for (int i = 0; i < N; i++) r |= v.data[i];
  return r;
}
template <int N> inline bool all(const vec<bool, N>& v) {
  bool r = true;
  for (int i = 0; i < N; i++) r &= v.data[i];
  return r;
}
template <class T, int N> inline T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T sum = T(0);
  for (int i = 0; i < N; i++) sum += a.data[i] * b.data[i];
  return sum;
}
template <class T, int N> inline T length_squared(const vec<T, N>& v) { return dot(v, v); }
template <class T, int N> inline T length(const vec<T, N>& v) { return sqrt(dot(v, v)); }
template <class T, int N> inline vec<T, N> normalize(const vec<T, N>& v) { return v * rsqrt(dot(v, v)); }

}  // namespace metal
