// The part of Metal's library that the project's kernels use, for nvcc. gen.py puts kernels into namespace metal, so
// that these names win over CUDA's.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define DEVICE __device__ __forceinline__

namespace metal {

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

// ---- Half types: storage. Arithmetic is float's, after an implicit conversion; narrowing is explicit.

struct half {
  ushort bits;
  half() = default;
  explicit DEVICE half(float x) : bits(__half_as_ushort(__float2half_rn(x))) {}
  DEVICE operator float() const { return __half2float(__ushort_as_half(bits)); }
};

struct bfloat {
  ushort bits;
  bfloat() = default;
  explicit DEVICE bfloat(float x) : bits(__bfloat16_as_ushort(__float2bfloat16_rn(x))) {}
  DEVICE operator float() const { return __uint_as_float(static_cast<uint>(bits) << 16); }
};

typedef half float16_t;
typedef bfloat bfloat16_t;

// ---- Vectors

template <typename T, int N>
struct alignas(N * sizeof(T)) vec {
  T of[N];
  vec() = default;
  explicit DEVICE vec(T all) {
    for (int i = 0; i < N; i++) of[i] = all;
  }
  DEVICE T& operator[](int i) { return of[i]; }
  DEVICE const T& operator[](int i) const { return of[i]; }
};

template <typename T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  DEVICE vec(T x, T y) : x(x), y(y) {}
  explicit DEVICE vec(T all) : x(all), y(all) {}
  DEVICE T& operator[](int i) { return i == 0 ? x : y; }
  DEVICE const T& operator[](int i) const { return i == 0 ? x : y; }
};

typedef vec<int, 2> int2;
typedef vec<float, 2> float2;

// ---- Math

template <typename T> DEVICE T min(T a, T b) { return b < a ? b : a; }
template <typename T> DEVICE T max(T a, T b) { return a < b ? b : a; }

namespace fast {
DEVICE float exp2(float x) { return exp2f(x); }
}
namespace precise {
DEVICE float rsqrt(float x) { return 1.0f / sqrtf(x); }
}

// ---- Simdgroups are warps, threadgroups blocks.

struct mem_flags {
  enum flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
};
DEVICE void threadgroup_barrier(mem_flags::flags) { __syncthreads(); }
DEVICE void simdgroup_barrier(mem_flags::flags) { __syncwarp(); }

template <typename T> DEVICE T simd_shuffle(T x, ushort lane) { return __shfl_sync(~0u, x, lane); }
template <typename T> DEVICE T simd_shuffle_xor(T x, ushort mask) { return __shfl_xor_sync(~0u, x, mask); }
template <typename T> DEVICE T simd_broadcast(T x, ushort lane) { return __shfl_sync(~0u, x, lane); }
template <typename T> DEVICE T simd_sum(T x) {
  for (int mask = 1; mask < 32; mask *= 2) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}

struct simd_vote {
  typedef ulong vote_t;
  vote_t votes;
  explicit DEVICE operator vote_t() const { return votes; }
};
DEVICE simd_vote simd_ballot(bool vote) { return {__ballot_sync(~0u, vote)}; }
DEVICE bool simd_any(bool vote) { return __any_sync(~0u, vote); }

// Threadgroup variables: one for each N.
template <typename T, int N> DEVICE T& threadgroup_variable() {
  __shared__ T variable;
  return variable;
}

// ---- Simdgroup matrices

// matrix.h

template <typename T, int ROWS, int COLUMNS> struct simdgroup_matrix;
template <> struct simdgroup_matrix<float, 8, 8> {
  float2 elements;
  DEVICE float2& thread_elements() { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;

template <typename T, int ROWS, int COLUMNS> DEVICE simdgroup_matrix<T, ROWS, COLUMNS> make_filled_simdgroup_matrix(T x) {
  return {float2(x)};
}
DEVICE void simdgroup_multiply_accumulate(
    simdgroup_float8x8& out, const simdgroup_float8x8& a, const simdgroup_float8x8& b, const simdgroup_float8x8& c) {
  uint lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  out.elements = matrix_multiply(a.elements, b.elements, c.elements, lane);
}

}  // namespace metal
