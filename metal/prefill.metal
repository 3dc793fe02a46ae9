// Attention of many new text rows: block-sparse flash attention on 8x8 matrices. The body of a kernel.
//
// queries         (B, heads, L, D)
// keys, values    (B, KV heads, N, D)         text in order, from position `start` to the last row's
// summary_keys,   (B, KV heads, capacity, D)  the cache: summary j lies in slot left - 1 - j
// summary_values
// layout          (B, 8)                      of each sequence: rows (the rest is padding), offset (the first row's
//                                             position), start, left, chunk, summaries a chunk, window, unused
// out             (B, heads, L, D)            zeros for padding
//
// A threadgroup has 32 rows of one head, a simdgroup 8 of them. It visits the tiles of K keys that some of its rows
// see: first of summaries, then of text. Template: T, D, K.

typedef vec<T, 4> Four;
constexpr int Q = 32;                    // rows
constexpr int G = Q / 8;                 // simdgroups
constexpr int B8 = D / 8;                // matrices across a head
constexpr int LD = D + 16 / sizeof(T);   // elements from row to row of a tile: not all in one bank
const int heads = queries_shape[1];
const int length = queries_shape[2];
const int head = threadgroup_position_in_grid.y;
const int sequence = threadgroup_position_in_grid.z;
const int simdgroup = simdgroup_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
// Of each matrix a lane has two neighbours: row y, columns x and x + 1.
const int y = (lane / 4 & 4) + lane / 2 % 4;
const int x = (lane / 4 & 2) * 2 + lane % 2 * 2;

const device int* of = layout + sequence * 8;
const int rows = of[0];
const int offset = of[1];
const int start = of[2];
const int chunk = of[4];
const int per_chunk = of[5];
const int window = of[6];

// Chunks before the window of the first and the last row of the threadgroup.
const int first = threadgroup_position_in_grid.x * Q;
const int last = min(first + Q, rows) - 1;
const int old_first = max((offset + first) / chunk - window, 0);
const int old_last = max((offset + last) / chunk - window, 0);
const int summaries = last < first ? 0 : old_last * per_chunk;
const int text = last < first ? 0 : old_first * chunk - start;
const int text_end = last < first ? 0 : offset + last + 1 - start;
const int summary_tiles = (summaries + K - 1) / K;
const int tiles = summary_tiles + (text_end - text + K - 1) / K;

// What this lane's row sees: summaries 0 .. old * per_chunk - 1, text old * chunk .. itself.
const int row = first + simdgroup * 8 + y;
const int old = max((offset + row) / chunk - window, 0);
const int sees_summaries = old * per_chunk;
const int sees_from = old * chunk - start;
const int sees_to = offset + row + 1 - start;

const size_t at = (static_cast<size_t>(sequence) * heads + head) * length;
const int group = heads / keys_shape[1];
const size_t kv = static_cast<size_t>(sequence) * keys_shape[1] + head / group;
const size_t text_at = kv * keys_shape[2] * D;
const size_t summary_at = (kv * summary_keys_shape[2] + max(of[3] - 1, 0)) * D;
const float scale = 1.44269504f * precise::rsqrt(static_cast<float>(D));  // softmax in powers of two

threadgroup Four aligned[K * LD / 4];
threadgroup T* tile = reinterpret_cast<threadgroup T*>(aligned);
simdgroup_float8x8 query;
simdgroup_float8x8 key;
simdgroup_float8x8 queries_of[D <= 128 ? B8 : 1];  // larger heads are read again for each tile
simdgroup_float8x8 out_of[B8];
simdgroup_float8x8 scores[K / 8];
float best = ksa::kLowest;
float sum = 0.0f;
KSA_UNROLL
for (int d = 0; d < B8; d++) {
  out_of[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  if (D <= 128) {
    KSA_UNROLL
    for (int i = 0; i < 2; i++) {
      queries_of[d].thread_elements()[i] = row < rows ? static_cast<float>(queries[(at + row) * D + d * 8 + x + i]) : 0.0f;
    }
  }
}

for (int t = 0; t < tiles; t++) {
  const bool summary = t < summary_tiles;
  const int begin = summary ? t * K : text + (t - summary_tiles) * K;
  const int end = min(begin + K, summary ? summaries : text_end);
  const long step = summary ? -D : D;
  const device T* tile_keys = (summary ? summary_keys + summary_at : keys + text_at) + begin * step;
  const device T* tile_values = (summary ? summary_values + summary_at : values + text_at) + begin * step;

  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = (simdgroup * 32 + lane) * 4; i < K * D; i += G * 32 * 4) {
    Four some = Four(static_cast<T>(0.0f));
    if (i / D < end - begin) {
      some = *reinterpret_cast<const device Four*>(tile_keys + i / D * step + i % D);
    }
    *reinterpret_cast<threadgroup Four*>(tile + i / D * LD + i % D) = some;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  KSA_UNROLL
  for (int j = 0; j < K / 8; j++) {
    scores[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  KSA_UNROLL
  for (int d = 0; d < B8; d++) {
    if (D <= 128) {
      query = queries_of[D <= 128 ? d : 0];
    } else {
      KSA_UNROLL
      for (int i = 0; i < 2; i++) {
        query.thread_elements()[i] = row < rows ? static_cast<float>(queries[(at + row) * D + d * 8 + x + i]) : 0.0f;
      }
    }
    KSA_UNROLL
    for (int j = 0; j < K / 8; j++) {
      KSA_UNROLL
      for (int i = 0; i < 2; i++) {
        key.thread_elements()[i] = static_cast<float>(tile[(j * 8 + x + i) * LD + d * 8 + y]);
      }
      simdgroup_multiply_accumulate(scores[j], query, key, scores[j]);
    }
  }

  // At the edges some rows do not see all keys of the tile.
  const bool edge = summary ? end > old_first * per_chunk || end < begin + K
                            : begin < old_last * chunk - start || begin + K > offset + first + 1 - start;
  const int from = summary ? 0 : sees_from;
  const int to = summary ? sees_summaries : sees_to;
  float highest = best;
  KSA_UNROLL
  for (int j = 0; j < K / 8; j++) {
    KSA_UNROLL
    for (int i = 0; i < 2; i++) {
      const int at_key = begin + j * 8 + x + i;
      const float score = scores[j].thread_elements()[i] * scale;
      scores[j].thread_elements()[i] = edge && (at_key < from || at_key >= to) ? -INFINITY : score;
      highest = max(highest, scores[j].thread_elements()[i]);
    }
  }
  // A row's lanes differ in bits 0 and 3.
  highest = max(highest, simd_shuffle_xor(highest, static_cast<ushort>(1)));
  highest = max(highest, simd_shuffle_xor(highest, static_cast<ushort>(8)));
  const float fade = fast::exp2(best - highest);
  best = highest;
  float weights = 0.0f;
  KSA_UNROLL
  for (int j = 0; j < K / 8; j++) {
    KSA_UNROLL
    for (int i = 0; i < 2; i++) {
      const float weight = fast::exp2(scores[j].thread_elements()[i] - best);
      scores[j].thread_elements()[i] = weight;
      weights += weight;
    }
  }
  weights += simd_shuffle_xor(weights, static_cast<ushort>(1));
  weights += simd_shuffle_xor(weights, static_cast<ushort>(8));
  sum = sum * fade + weights;

  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = (simdgroup * 32 + lane) * 4; i < K * D; i += G * 32 * 4) {
    Four some = Four(static_cast<T>(0.0f));
    if (i / D < end - begin) {
      some = *reinterpret_cast<const device Four*>(tile_values + i / D * step + i % D);
    }
    *reinterpret_cast<threadgroup Four*>(tile + i / D * LD + i % D) = some;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  KSA_UNROLL
  for (int d = 0; d < B8; d++) {
    KSA_UNROLL
    for (int i = 0; i < 2; i++) {
      out_of[d].thread_elements()[i] *= fade;
    }
    KSA_UNROLL
    for (int j = 0; j < K / 8; j++) {
      KSA_UNROLL
      for (int i = 0; i < 2; i++) {
        key.thread_elements()[i] = static_cast<float>(tile[(j * 8 + y) * LD + d * 8 + x + i]);
      }
      simdgroup_multiply_accumulate(out_of[d], scores[j], key, out_of[d]);
    }
  }
}

if (row < length) {
  const float by = row < rows ? 1.0f / sum : 0.0f;
  KSA_UNROLL
  for (int d = 0; d < B8; d++) {
    KSA_UNROLL
    for (int i = 0; i < 2; i++) {
      out[(at + row) * D + d * 8 + x + i] = static_cast<T>(out_of[d].thread_elements()[i] * by);
    }
  }
}
