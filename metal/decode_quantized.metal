// decode.metal where keys and values, or the summaries' only, are in mlx's affine format. The body of a kernel.
//
// queries, bounds, out                 as in decode.metal
// keys, values                         (B, KV heads, capacity, D * BITS / 32) words of 4- or 8-bit elements
// key_scales, ..., value_biases        (B, KV heads, capacity, D / GROUP)
// summary_keys, ..., summary_bounds    a second cache, of other slots and bits; it is read after the first
//
// Where BITS is 0 the arrays are plain, (B, KV heads, capacity, D), and scales and biases are not read.
// Template: T, O, D, C, N, TILE, PARTIAL; see visit(). BITS, GROUP, SUMMARY_BITS, SUMMARY_GROUP.

const int kv_heads = keys_shape[1];
const int length = queries_shape[2];
const int count = queries_shape[1] / kv_heads * length;
const int head = threadgroup_position_in_grid.x;
const int split = threadgroup_position_in_grid.y;
const int splits = threadgroups_per_grid.y;
const int sequence = threadgroup_position_in_grid.z;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;

threadgroup float tile[TILE == 0 ? N * 32 * elements(D) : 2 * TILE * 32 * elements(D)];
threadgroup float stats[N * C * 2];

const size_t which = static_cast<size_t>(sequence) * kv_heads + head;
const int first = TILE == 0 ? 0 : static_cast<int>(simdgroup) * C;
Rows<D, C> rows;
start(rows, queries + which * count * D, first, count, lane);

const int segments = bounds_shape[1];
const int summary_segments = summary_bounds_shape[1];
const device int* seen = bounds + sequence * segments * 2 * kRows;
const device int* summary_seen = summary_bounds + sequence * summary_segments * 2 * kRows;
const int all = visited(seen, segments, length) + visited(summary_seen, summary_segments, length);
const int share = (all + splits - 1) / splits;
int begin = split * share;
int end = begin + share;
const auto text = from_row<D, BITS, GROUP>(
    which * keys_shape[2], keys, key_scales, key_biases, values, value_scales, value_biases);
visit<D, C, N, TILE>(rows, text, seen, segments, begin, end, first, length, tile, simdgroup, lane);
const auto summaries = from_row<D, SUMMARY_BITS, SUMMARY_GROUP>(
    which * summary_keys_shape[2], summary_keys, summary_key_scales, summary_key_biases,
    summary_values, summary_value_scales, summary_value_biases);
visit<D, C, N, TILE>(
    rows, summaries, summary_seen, summary_segments, begin, end, first, length, tile, simdgroup, lane);

if (TILE == 0) {
  merge<D, C, N>(rows, tile, stats, simdgroup, lane);
}
out += (PARTIAL ? which * splits + split : which) * count * (PARTIAL ? D + 2 : D);
KSA_UNROLL
for (int c = 0; c < C; c++) {
  if (first + c < count && (TILE != 0 || static_cast<int>(simdgroup) == c % N)) {
    store<D, C, PARTIAL>(rows, c, out + (first + c) * (PARTIAL ? D + 2 : D), lane);
  }
}
