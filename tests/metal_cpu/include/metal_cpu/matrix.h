// simdgroup_matrix, with the layout of Apple's GPUs: each lane holds two neighbours in a row of the 8x8
// matrix.
#pragma once

namespace metal {

METAL_CPU_UNCHECKED inline int metal_cpu_row(int lane) { return (lane / 4 & 4) + (lane / 2) % 4; }
METAL_CPU_UNCHECKED inline int metal_cpu_column(int lane) { return (lane / 4 & 2) * 2 + (lane % 2) * 2; }

template <class T, int Columns, int Rows> struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "Metal has 8x8 simdgroup matrices only");
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    int lane = metal_cpu_lane(), beside = metal_cpu_row(lane) - metal_cpu_column(lane);
    for (int i = 0; i < 2; i++) elements.data[i] = beside == i ? diagonal : T(0);
  }
  vec<T, 2>& thread_elements() { return elements; }
  const vec<T, 2>& thread_elements() const { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Columns, int Rows>
inline simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> m;
  m.elements = vec<T, 2>(value);
  return m;
}

METAL_CPU_UNCHECKED inline void metal_cpu_meet_for_matrix(const char* operation, metal_cpu::Meeting kind,
                                                          metal_cpu::Place place) {
  metal_cpu::Site site{operation, place, kind, 0};
  if (!metal_cpu_meet(&site, nullptr, 0, nullptr)->full())
    metal_cpu_fail("divergence", "matrix operation in a partial simdgroup", &place);
}
// The index of this lane's element i, in memory with `stride` elements a row.
inline ulong metal_cpu_index(int i, ulong stride, ulong2 origin, bool transpose) {
  int lane = metal_cpu_lane();
  ulong row = metal_cpu_row(lane), column = metal_cpu_column(lane) + i;
  return transpose ? (origin.y + column) * stride + origin.x + row
                   : (origin.y + row) * stride + origin.x + column;
}
template <class T, class U> inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const U* from,
                                                       ulong stride = 8, ulong2 origin = ulong2(0),
                                                       bool transpose = false, METAL_CPU_PLACE) {
  static_assert(is_same_v<T, U>, "simdgroup_load from memory of another type");
  metal_cpu_meet_for_matrix("simdgroup_load", metal_cpu::kMatrixLoad, place);
  for (int i = 0; i < 2; i++) m.elements.data[i] = from[metal_cpu_index(i, stride, origin, transpose)];
}
template <class T, class U> inline void simdgroup_store(const simdgroup_matrix<T, 8, 8>& m, U* to,
                                                        ulong stride = 8, ulong2 origin = ulong2(0),
                                                        bool transpose = false, METAL_CPU_PLACE) {
  static_assert(is_same_v<T, U>, "simdgroup_store to memory of another type");
  metal_cpu_meet_for_matrix("simdgroup_store", metal_cpu::kMatrixStore, place);
  for (int i = 0; i < 2; i++) to[metal_cpu_index(i, stride, origin, transpose)] = m.elements.data[i];
}

template <class D, class A, class B, class C> struct metal_cpu_operands {
  A a[2];
  B b[2];
  C c[2];
  D d[2];
};
// D = A B + C in float, one fused multiply-add a term; d is rounded to its type once.
template <class D, class A, class B, class C>
METAL_CPU_UNCHECKED void metal_cpu_multiply(metal_cpu::Exchange& exchange) {
  alignas(32) float a[64], b[64], c[64], d[64];
  for (int lane = 0; lane < 32; lane++) {
    auto& posted = exchange.at<metal_cpu_operands<D, A, B, C>>(lane);
    int at = metal_cpu_row(lane) * 8 + metal_cpu_column(lane);
    for (int i = 0; i < 2; i++) a[at + i] = posted.a[i], b[at + i] = posted.b[i], c[at + i] = posted.c[i];
  }
  metal_cpu_multiply_8x8(a, b, c, d);
  for (int lane = 0; lane < 32; lane++) {
    auto& posted = exchange.at<metal_cpu_operands<D, A, B, C>>(lane);
    int at = metal_cpu_row(lane) * 8 + metal_cpu_column(lane);
    for (int i = 0; i < 2; i++) posted.d[i] = D(d[at + i]);
  }
}
template <class D, class A, class B, class C> METAL_CPU_UNCHECKED inline void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b,
    const simdgroup_matrix<C, 8, 8>& c, METAL_CPU_PLACE) {
  using Operands = metal_cpu_operands<D, A, B, C>;
  Operands mine;
  for (int i = 0; i < 2; i++)
    mine.a[i] = a.elements.data[i], mine.b[i] = b.elements.data[i], mine.c[i] = c.elements.data[i];
  metal_cpu::Site site{"simdgroup_multiply_accumulate", place, metal_cpu::kMatrixMultiply,
                       (int)sizeof(Operands)};
  metal_cpu::Exchange& exchange = *metal_cpu_meet(&site, &mine, sizeof mine, metal_cpu_multiply<D, A, B, C>);
  if (!exchange.full()) metal_cpu_fail("divergence", "matrix operation in a partial simdgroup", &place);
  for (int i = 0; i < 2; i++) d.elements.data[i] = exchange.at<Operands>(metal_cpu_lane()).d[i];
}
template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                               const simdgroup_matrix<B, 8, 8>& b, METAL_CPU_PLACE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0.0f)), place);
}

}  // namespace metal
