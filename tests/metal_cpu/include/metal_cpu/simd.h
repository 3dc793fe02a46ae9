// Barriers, and what the lanes of a simdgroup do together. Each call posts a value, waits for the other
// lanes, and reads what it needs of theirs. A call knows its place in the source through default arguments.
#pragma once

#define METAL_CPU_PLACE metal_cpu::Place place = {__builtin_FILE(), __builtin_LINE(), __builtin_COLUMN()}

namespace metal {

struct mem_flags {
  int value;
  static const mem_flags mem_none, mem_device, mem_threadgroup, mem_texture;
};
constexpr mem_flags mem_flags::mem_none{metal_cpu::kMemNone};
constexpr mem_flags mem_flags::mem_device{metal_cpu::kMemDevice};
constexpr mem_flags mem_flags::mem_threadgroup{metal_cpu::kMemThreadgroup};
constexpr mem_flags mem_flags::mem_texture{metal_cpu::kMemNone};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return {a.value | b.value}; }

METAL_CPU_UNCHECKED inline void threadgroup_barrier(mem_flags flags, METAL_CPU_PLACE) {
  metal_cpu::Site site{"threadgroup_barrier", place, metal_cpu::kThreadgroupBarrier, flags.value};
  metal_cpu_meet(&site, nullptr, 0, nullptr);
}
METAL_CPU_UNCHECKED inline void simdgroup_barrier(mem_flags flags, METAL_CPU_PLACE) {
  metal_cpu::Site site{"simdgroup_barrier", place, metal_cpu::kSimdgroupBarrier, flags.value};
  metal_cpu_meet(&site, nullptr, 0, nullptr);
}

template <class T>
METAL_CPU_UNCHECKED inline metal_cpu::Exchange& metal_cpu_post(const char* operation, const T& value,
                                                               metal_cpu::Place place,
                                                               metal_cpu::Operation kind, int argument = 0,
                                                               metal_cpu::Combine combine = nullptr) {
  static_assert(sizeof(T) <= metal_cpu::kSlotBytes, "too large for a simd operation");
  metal_cpu::Site site{operation, place, metal_cpu::kSimdOperation, (int)sizeof(T), kind, argument};
  return *metal_cpu_meet(&site, &value, sizeof(T), combine);
}
METAL_CPU_UNCHECKED inline int metal_cpu_lane() { return metal_cpu_thread()->lane; }

// Reductions, in a butterfly's order: neighbours first, then pairs, and so on.
template <class T, class Operation> METAL_CPU_UNCHECKED void metal_cpu_reduce(metal_cpu::Exchange& exchange) {
  T value[metal_cpu::kSimdWidth];
  int lanes = __builtin_popcount(exchange.lanes);
  for (int i = 0; i < lanes; i++) value[i] = exchange.at<T>(i);
  for (int step = 1; step < lanes; step *= 2) {
    for (int i = 0; i + step < lanes; i += 2 * step) value[i] = Operation::of(value[i], value[i + step]);
  }
  exchange.out<T>() = value[0];
}
template <class T, class Operation>
METAL_CPU_UNCHECKED inline T metal_cpu_reduced(const char* operation, T value, metal_cpu::Place place,
                                               metal_cpu::Operation kind) {
  return metal_cpu_post(operation, value, place, kind, 0, metal_cpu_reduce<T, Operation>).template out<T>();
}
#define METAL_CPU_REDUCTION(name, expression)                                                 \
  struct metal_cpu_##name {                                                                   \
    template <class T> METAL_CPU_UNCHECKED static T of(T a, T b) { return T(expression); }    \
  };                                                                                          \
  template <class T> METAL_CPU_UNCHECKED inline T simd_##name(T value, METAL_CPU_PLACE) {     \
    return metal_cpu_reduced<T, metal_cpu_##name>("simd_" #name, value, place,                \
                                                  metal_cpu::kReduction);                     \
  }                                                                                           \
  template <class T> METAL_CPU_UNCHECKED inline T quad_##name(T value, METAL_CPU_PLACE) {     \
    metal_cpu::Exchange& e = metal_cpu_post("quad_" #name, value, place,                      \
                                            metal_cpu::kQuadReduction);                       \
    int first = metal_cpu_lane() & ~3;                                                        \
    using Operation = metal_cpu_##name;                                                       \
    return Operation::of(Operation::of(e.at<T>(first), e.at<T>(first + 1)),                   \
                         Operation::of(e.at<T>(first + 2), e.at<T>(first + 3)));              \
  }
METAL_CPU_REDUCTION(sum, a + b)
METAL_CPU_REDUCTION(product, a* b)
METAL_CPU_REDUCTION(max, metal::max(a, b))
METAL_CPU_REDUCTION(min, metal::min(a, b))
METAL_CPU_REDUCTION(and, a& b)
METAL_CPU_REDUCTION(or, a | b)
METAL_CPU_REDUCTION(xor, a ^ b)
#undef METAL_CPU_REDUCTION
METAL_CPU_UNCHECKED inline bool simd_any(bool value, METAL_CPU_PLACE) {
  return metal_cpu_reduced<int, metal_cpu_or>("simd_any", value, place, metal_cpu::kVote);
}
METAL_CPU_UNCHECKED inline bool simd_all(bool value, METAL_CPU_PLACE) {
  return metal_cpu_reduced<int, metal_cpu_and>("simd_all", value, place, metal_cpu::kVote);
}
METAL_CPU_UNCHECKED inline bool simd_is_first() { return metal_cpu_lane() == 0; }

struct simd_vote {
  using vote_t = ulong;
  vote_t value;
  explicit simd_vote(vote_t v = 0) : value(v) {}
  explicit operator vote_t() const { return value; }
  bool all() const { return value == 0xffffffff; }
  bool any() const { return value != 0; }
};
METAL_CPU_UNCHECKED inline simd_vote simd_ballot(bool value, METAL_CPU_PLACE) {
  uint mine = value ? 1u << metal_cpu_lane() : 0u;
  return simd_vote(metal_cpu_reduced<uint, metal_cpu_or>("simd_ballot", mine, place, metal_cpu::kVote));
}

// Shuffles. A lane out of range keeps its own value (or takes the filling one); a lane that does not exist,
// in the partial simdgroup at the edge of a grid, is a fault.
template <class T> METAL_CPU_UNCHECKED inline T metal_cpu_take(const char* operation, const T& value,
                                                               int from, metal_cpu::Place place,
                                                               metal_cpu::Operation kind, int argument) {
  metal_cpu::Exchange& exchange = metal_cpu_post(operation, value, place, kind, argument);
  if (from < 0 || from >= 32 || !(exchange.lanes >> from & 1))
    metal_cpu_fail("divergence", "value of a lane that does not exist", &place);
  return exchange.at<T>(from);
}
#define METAL_CPU_SHUFFLE(name, argument, source, kind)                                             \
  template <class T> METAL_CPU_UNCHECKED inline T name(T value, ushort argument, METAL_CPU_PLACE) { \
    int lane = metal_cpu_lane();                                                                    \
    int from = source;                                                                              \
    return metal_cpu_take(#name, value, from, place, metal_cpu::kind, argument);                    \
  }
METAL_CPU_SHUFFLE(simd_shuffle, from_lane, from_lane, kLaneShuffle)
METAL_CPU_SHUFFLE(simd_broadcast, from_lane, from_lane, kBroadcast)
METAL_CPU_SHUFFLE(simd_shuffle_xor, mask, lane ^ mask, kShuffle)
METAL_CPU_SHUFFLE(simd_shuffle_down, delta, lane + delta < 32 ? lane + delta : lane, kShuffle)
METAL_CPU_SHUFFLE(simd_shuffle_up, delta, lane >= delta ? lane - delta : lane, kShuffle)
METAL_CPU_SHUFFLE(simd_shuffle_rotate_down, delta, (lane + delta) & 31, kShuffle)
METAL_CPU_SHUFFLE(simd_shuffle_rotate_up, delta, (lane - delta) & 31, kShuffle)
METAL_CPU_SHUFFLE(quad_broadcast, from_lane, (lane & ~3) | (from_lane & 3), kShuffle)
METAL_CPU_SHUFFLE(quad_shuffle, from_lane, (lane & ~3) | (from_lane & 3), kShuffle)
METAL_CPU_SHUFFLE(quad_shuffle_xor, mask, lane ^ (mask & 3), kShuffle)
#undef METAL_CPU_SHUFFLE
template <class T> METAL_CPU_UNCHECKED inline T simd_broadcast_first(T value, METAL_CPU_PLACE) {
  return metal_cpu_take("simd_broadcast_first", value, 0, place, metal_cpu::kBroadcast, 0);
}
template <class T>
METAL_CPU_UNCHECKED inline T simd_shuffle_and_fill_down(T value, T filling, ushort delta, METAL_CPU_PLACE) {
  int lane = metal_cpu_lane(), from = lane + delta;
  T other = metal_cpu_take("simd_shuffle_and_fill_down", value, from < 32 ? from : lane, place,
                           metal_cpu::kShuffle, delta);
  return from < 32 ? other : filling;
}
template <class T>
METAL_CPU_UNCHECKED inline T simd_shuffle_and_fill_up(T value, T filling, ushort delta, METAL_CPU_PLACE) {
  int lane = metal_cpu_lane(), from = lane - delta;
  T other = metal_cpu_take("simd_shuffle_and_fill_up", value, from >= 0 ? from : lane, place,
                           metal_cpu::kShuffle, delta);
  return from >= 0 ? other : filling;
}

#define METAL_CPU_PREFIX(name, start, op, last)                                    \
  template <class T> METAL_CPU_UNCHECKED inline T name(T value, METAL_CPU_PLACE) { \
    metal_cpu::Exchange& exchange =                                                \
        metal_cpu_post(#name, value, place, metal_cpu::kReduction);                \
    T result = T(start);                                                           \
    for (int i = 0; i < last; i++) result = T(result op exchange.at<T>(i));        \
    return result;                                                                 \
  }
METAL_CPU_PREFIX(simd_prefix_inclusive_sum, 0, +, metal_cpu_lane() + 1)
METAL_CPU_PREFIX(simd_prefix_exclusive_sum, 0, +, metal_cpu_lane())
METAL_CPU_PREFIX(simd_prefix_inclusive_product, 1, *, metal_cpu_lane() + 1)
METAL_CPU_PREFIX(simd_prefix_exclusive_product, 1, *, metal_cpu_lane())
#undef METAL_CPU_PREFIX

}  // namespace metal
