// Attention of 1 to 8 query rows a sequence over ranges of slots of one cache, or of two. The body of a kernel.
//
// queries               (B, heads, L, D)
// keys, values          (B, KV heads, capacity, D), or words of 4- or 8-bit elements, D * BITS / 32 a row
// key_scales, ...       (B, KV heads, capacity, D / GROUP); where BITS is 0 anything: they are not read
// bounds                (B, 8, 2)  row r of a sequence sees the slots from [r][0] to before [r][1]
// more_keys, ...        a second cache, of other slots and perhaps other bits; it is read after the first
// out                   (B, heads, L, D), or PARTIAL, for combine.metal: (B, KV heads, splits, rows, D + 2)
//
// A threadgroup has all rows of one KV head (its query heads times L), and one of `splits` equal parts of the
// slots. Each key and value is loaded once. Template: T, O, D, C, N, TILE, PARTIAL, see visit(); BITS, GROUP,
// MORE_BITS, MORE_GROUP: the caches' formats.

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

const device int* seen = bounds + sequence * 2 * kRows;
const device int* more_seen = more_bounds + sequence * 2 * kRows;
const int2 some = seen_by_any(seen, length);
const int2 more = seen_by_any(more_seen, length);
const int share = (some.y - some.x + more.y - more.x + splits - 1) / splits;
int begin = split * share;
int end = begin + share;
const auto cache = from_row<D, BITS, GROUP>(
    which * keys_shape[2], keys, key_scales, key_biases, values, value_scales, value_biases);
visit<D, C, N, TILE>(rows, cache, seen, begin, end, first, length, tile, simdgroup, lane);
const auto second = from_row<D, MORE_BITS, MORE_GROUP>(
    which * more_keys_shape[2], more_keys, more_key_scales, more_key_biases, more_values, more_value_scales,
    more_value_biases);
visit<D, C, N, TILE>(rows, second, more_seen, begin, end, first, length, tile, simdgroup, lane);

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
