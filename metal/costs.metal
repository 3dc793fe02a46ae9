// What single operations cost: `rounds` times 16 of one kind, each on the result of the one before. The body of a
// kernel of report/costs.py. Threadgroups of 256 threads; enough of them hide how long a single operation takes.
//
// start  (threads,) float32, in [0, 1)     rounds  (8,) int32, the first counts     out  (threads,) float32
//
// OP: which. All but the fused multiply-add itself are followed by one, so that none can be folded with its
// neighbour, and its cost is what is left without it.

const uint at = thread_position_in_grid.x;
const ushort lane = thread_index_in_simdgroup;
const float a = (OP == 1 ? 0.03f : 0.999f) - 1e-6f * start[at];  // so that no sum grows beyond all bounds
const float b = 1e-3f;
// Lanes in an order that no constant stands for; 0 to 31, as `start` is below 1.
const ushort other = static_cast<ushort>((lane * 5 + 1 + static_cast<ushort>(start[0])) % 32);
float x = start[at];
uint bits = at;
simdgroup_matrix<float, 8, 8> left = make_filled_simdgroup_matrix<float, 8, 8>(x);
simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
threadgroup float tile[256];
const uint own = thread_position_in_threadgroup.x;
tile[own] = x;
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int i = 0; i < rounds[0]; i++) {
  KSA_UNROLL
  for (int j = 0; j < 16; j++) {
    if (OP == 1) {
      x = simd_sum(x);
    } else if (OP == 2) {
      x = simd_shuffle(x, other);
    } else if (OP == 3) {
      x = simd_shuffle_xor(x, static_cast<ushort>(1 + j % 8));
    } else if (OP == 4) {
      x = simd_broadcast(x, static_cast<ushort>(j));
    } else if (OP == 5) {
      x = fast::exp2(-x);
    } else if (OP == 6) {
      bits = as_type<uint>(static_cast<float>(bits));
    } else if (OP == 7) {
      bits = as_type<uint>(static_cast<float>(as_type<bfloat>(static_cast<ushort>(bits >> 16))) + a);
    } else if (OP == 8) {
      simdgroup_multiply_accumulate(sum, left, left, sum);
    } else if (OP == 9) {
      x = tile[(own + static_cast<uint>(j) * 32u + as_type<uint>(x) % 2u) % 256u];
    }
    if (OP < 6 || OP == 9) {
      x = fma(x, a, b);
    }
  }
}
out[at] = x + static_cast<float>(bits % 1024u) + sum.thread_elements()[0];
