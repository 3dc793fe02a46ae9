// Sum the parts of attention that decode.metal left. The body of a kernel; one thread an element of `out`.
//
// parts  (B, KV heads, splits, rows, D + 2)     out  (B, heads, L, D) = (B, KV heads, rows, D)

const int splits = parts_shape[2];
const int count = parts_shape[3];
const int element = thread_position_in_grid.x;
const int row = thread_position_in_grid.y;
const size_t which = thread_position_in_grid.z;

const device float* part = parts + (which * splits * count + row) * (D + 2);
const int next = count * (D + 2);
float best = ksa::kLowest;
for (int i = 0; i < splits; i++) {
  best = max(best, part[i * next + D + 1]);
}
float total = 0.0f;
float sum = 0.0f;
for (int i = 0; i < splits; i++) {
  const float fade = fast::exp2(part[i * next + D + 1] - best);
  total += part[i * next + element] * fade;
  sum += part[i * next + D] * fade;
}
out[(which * count + row) * D + element] = static_cast<T>(sum == 0.0f ? total : total / sum);
