// The part of MLX's utils.h (put before every custom kernel) that kernels use.
#pragma once

using namespace metal;

template <class U> struct Limits {
  static constexpr U max = numeric_limits<U>::max();
  static constexpr U min = numeric_limits<U>::min();
  static constexpr U finite_max = max;
  static constexpr U finite_min = min;
};
template <class U> struct metal_cpu_float_limits {
  static constexpr U max = numeric_limits<U>::infinity();
  static constexpr U min = -numeric_limits<U>::infinity();
  static constexpr U finite_max = numeric_limits<U>::max();
  static constexpr U finite_min = numeric_limits<U>::lowest();
};
template <> struct Limits<float> : metal_cpu_float_limits<float> {};
template <> struct Limits<half> : metal_cpu_float_limits<half> {};
template <> struct Limits<bfloat> {
  static constexpr bfloat max = numeric_limits<bfloat>::infinity();
  static constexpr bfloat min = -numeric_limits<bfloat>::infinity();
  static constexpr bfloat finite_max = numeric_limits<bfloat>::max();
  static constexpr bfloat finite_min = numeric_limits<bfloat>::lowest();
};
template <> struct Limits<bool> {
  static constexpr bool max = true, min = false;
};

template <class T, class U> inline T ceildiv(T n, U m) { return (n + m - 1) / m; }

template <class Index = int64_t>
inline Index elem_to_loc(Index element, const int* shape, const int64_t* strides, int ndim) {
  Index location = 0;
  for (int i = ndim - 1; i >= 0 && element > 0; --i) {
    location += (element % shape[i]) * Index(strides[i]);
    element /= shape[i];
  }
  return location;
}
