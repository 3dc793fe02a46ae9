// Attention of 1 to 8 query positions a sequence over ranges of slots of one cache, or of two. The body of a kernel.
//
// queries     (sequences, heads, L, D)
// keys_0, values_0, keys_1, ...   each sequence's, or all sequences' in one: (B, KV heads, capacity, D), or in mlx's
//             affine format words of 2 to 8 elements and (B, KV heads, capacity, D / group) scales and biases. `cache` and
//             `more`, declared before the body, are the sequence's.
// table       KV heads, L, rows = query heads a KV head times L, 0; then for each sequence, 36 numbers: its place in its
//             arrays, 0, capacity of the first cache and of the second, and for each cache 8 pairs: position r sees the
//             slots from [r][0] to before [r][1]
// out         (sequences, heads, L, D), or PARTIAL, for combine.metal: (sequences, KV heads, splits, rows, D + 2)
//
// A threadgroup has C rows of one KV head, and one of `splits` equal parts of the slots that they see.
// Template: T, O, D, C, N simdgroups, PARTIAL, TWO caches.

using namespace ksa;
const int kv_heads = table[0];
const int length = table[1];
const int count = table[2];
const int blocks = (count + C - 1) / C;
const int head = threadgroup_position_in_grid.x / blocks;
const int first = threadgroup_position_in_grid.x % blocks * C;
const int split = threadgroup_position_in_grid.y;
const int splits = threadgroups_per_grid.y;
const int sequence = threadgroup_position_in_grid.z;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;

threadgroup float outs[N * C * 32 * elements(D)];
threadgroup float stats[N * C * 2];

const device int* own = table + 4 + sequence * 36;
const size_t row = static_cast<size_t>(own[0]) * kv_heads + head;
const device int* seen = own + 4;
const device int* more_seen = own + 4 + 2 * kPositions;
const size_t which = static_cast<size_t>(sequence) * kv_heads + head;

Rows<D, C> rows;
KSA_UNROLL
for (int c = 0; c < C; c++) {
  KSA_UNROLL
  for (int e = 0; e < elements(D); e++) {
    rows.out[c][e] = 0.0f;
  }
}
rows.sum = 0.0f;
rows.best = kLowest;

// Whole tiles in each part, so that only the last tile of a cache is not full.
const int2 slots = seen_by_any(seen, length);
const int2 more_slots = seen_by_any(more_seen, length);
const int tiles = (slots.y - slots.x + more_slots.y - more_slots.x + kTile - 1) / kTile;
int start = (tiles + splits - 1) / splits * split * kTile;
int stop = (tiles + splits - 1) / splits * (split + 1) * kTile;
const device T* from = queries + which * count * D;
visit<D, C, N>(rows, from_row(cache, row * own[2]), from, seen, start, stop, first, count, length, simdgroup, lane);
if (TWO) {
  visit<D, C, N>(
      rows, from_row(more, row * own[3]), from, more_seen, start, stop, first, count, length, simdgroup, lane);
}

leave<D, C>(rows, outs, stats, simdgroup, lane);
threadgroup_barrier(mem_flags::mem_threadgroup);
out += (PARTIAL ? which * splits + split : which) * count * (PARTIAL ? D + 2 : D);
for (int c = simdgroup; c < min(C, count - first); c += N) {
  join<D, C, N, PARTIAL>(outs, stats, c, out + (first + c) * (PARTIAL ? D + 2 : D), lane);
}
