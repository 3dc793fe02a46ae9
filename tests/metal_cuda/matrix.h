// 8x8 matrices on the lanes of a simdgroup, by shuffles alone. Metal, which gen.py turns into CUDA as it does kernels;
// a test runs it in the instrument against the matrices there.
//
// Lane l has two neighbours of each matrix: row 4 * bit4(l) + l / 2 % 4, columns from 4 * bit3(l) + 2 * bit0(l) on.

// The lane that has a matrix's element.
inline ushort matrix_lane(int row, int column) {
  return static_cast<ushort>((row & 4) << 2 | (column & 4) << 1 | (row & 3) << 1 | (column >> 1 & 1));
}

// a * b + c, as the two elements of a lane.
inline float2 matrix_multiply(float2 a, float2 b, float2 c, int lane) {
  const int row = (lane >> 2 & 4) + (lane >> 1 & 3);
  const int column = (lane >> 1 & 4) + (lane & 1) * 2;
  for (int k = 0; k < 8; k += 2) {
    const float left = simd_shuffle(a.x, matrix_lane(row, k));
    const float right = simd_shuffle(a.y, matrix_lane(row, k));
    c.x += left * simd_shuffle(b.x, matrix_lane(k, column));
    c.y += left * simd_shuffle(b.y, matrix_lane(k, column));
    c.x += right * simd_shuffle(b.x, matrix_lane(k + 1, column));
    c.y += right * simd_shuffle(b.y, matrix_lane(k + 1, column));
  }
  return c;
}
