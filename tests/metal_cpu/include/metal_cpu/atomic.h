// Relaxed atomics. Fibers give way at meetings only, so plain loads and stores are atomic.
#pragma once

namespace metal {

enum memory_order { memory_order_relaxed };
template <class T> struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;

#define METAL_CPU_ATOMIC(name, expression)                                                                  \
  template <class T> METAL_CPU_UNCHECKED inline T name(atomic<T>* p, T x, memory_order) {                   \
    metal_cpu_atomic_access(p, sizeof(T), true, true);                                                      \
    T old = p->value;                                                                                       \
    p->value = expression;                                                                                  \
    return old;                                                                                             \
  }                                                                                                         \
  template <class T, class U> inline T name(atomic<T>* p, U x, memory_order o) { return name(p, T(x), o); }
METAL_CPU_ATOMIC(atomic_fetch_add_explicit, old + x)
METAL_CPU_ATOMIC(atomic_fetch_sub_explicit, old - x)
METAL_CPU_ATOMIC(atomic_fetch_max_explicit, metal::max(old, x))
METAL_CPU_ATOMIC(atomic_fetch_min_explicit, metal::min(old, x))
METAL_CPU_ATOMIC(atomic_fetch_and_explicit, old& x)
METAL_CPU_ATOMIC(atomic_fetch_or_explicit, old | x)
METAL_CPU_ATOMIC(atomic_fetch_xor_explicit, old ^ x)
METAL_CPU_ATOMIC(atomic_exchange_explicit, x)
#undef METAL_CPU_ATOMIC

template <class T> METAL_CPU_UNCHECKED inline T atomic_load_explicit(const atomic<T>* p, memory_order) {
  metal_cpu_atomic_access(p, sizeof(T), true, false);
  return p->value;
}
template <class T, class U>
METAL_CPU_UNCHECKED inline void atomic_store_explicit(atomic<T>* p, U x, memory_order) {
  metal_cpu_atomic_access(p, sizeof(T), false, true);
  p->value = T(x);
}

}  // namespace metal
