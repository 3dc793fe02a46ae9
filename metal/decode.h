// Decode: softmax over tiles of keys.
//
// Butterflies over a key's lanes leave one row in each, and the softmax moves on once a tile: a key costs no sum over
// the simdgroup, no shuffle by an index that lanes compute, and no barrier.
namespace ksa {

// Query positions of one launch.
constant constexpr int kPositions = 8;

// Keys between two updates of the softmax.
constant constexpr int kTile = 16;

// Which row of C a lane owns, and the first lane of a key that owns row c.
template <int C>
inline int row_of(uint lane) {
  return static_cast<int>(C == 4 ? (lane & 1u) * 2u + ((lane >> 1) & 1u) : C == 2 ? lane & 1u : 0u);
}
constexpr int lane_of(int c, int rows) {
  return rows == 4 ? (c >> 1) | ((c & 1) << 1) : c;
}

// Sums of C values over the L lanes of a key; each lane keeps its own row's.
template <int C, int L>
inline float scatter(const thread float* x, uint lane) {
  const bool odd = (lane & 1u) != 0u;
  float sum = x[0];
  if (C == 4) {
    const bool second = (lane & 2u) != 0u;
    float low = odd ? x[C / 2] : x[0];
    float high = odd ? x[C - 1] : x[C / 4];
    low += simd_shuffle_xor(odd ? x[0] : x[C / 2], static_cast<ushort>(1));
    high += simd_shuffle_xor(odd ? x[C / 4] : x[C - 1], static_cast<ushort>(1));
    sum = (second ? high : low) + simd_shuffle_xor(second ? low : high, static_cast<ushort>(2));
  } else if (C == 2) {
    sum = (odd ? x[C - 1] : x[0]) + simd_shuffle_xor(odd ? x[0] : x[C - 1], static_cast<ushort>(1));
  }
  KSA_UNROLL
  for (int bit = C; bit < L; bit *= 2) {
    sum += simd_shuffle_xor(sum, static_cast<ushort>(bit));
  }
  return sum;
}

// The slots that any of `length` positions sees: from x to before y; `ranges` has a pair for each.
inline int2 seen_by_any(const device int* ranges, int length) {
  int first = 0x7fffffff;
  int last = 0;
  for (int r = 0; r < length; r++) {
    if (ranges[2 * r] < ranges[2 * r + 1]) {
      first = min(first, ranges[2 * r]);
      last = max(last, ranges[2 * r + 1]);
    }
  }
  return int2(min(first, last), last);
}

// Let rows attend to the slots begin .. end - 1 of those that any of them sees of a cache; both are counted on from
// its end afterwards. Each of N simdgroups takes every N-th tile. Row i of the KV head is at position i % length.
template <int D, int C, int N, typename KV, typename T>
inline void visit(
    thread Rows<D, C>& rows,
    KV kv,
    const device T* from,
    const device int* ranges,
    thread int& start,
    thread int& stop,
    int first,
    int count,
    int length,
    uint simdgroup,
    uint lane) {
  constexpr int L = lanes(D);
  constexpr int keys = 32 / L;  // a step
  constexpr int steps = kTile / keys;
  const int2 slots = seen_by_any(ranges, length);
  const int low = slots.x + max(start, 0);
  const int high = min(slots.x + stop, slots.y);
  start -= slots.y - slots.x;
  stop -= slots.y - slots.x;
  if (low >= high) {
    return;
  }
  const int j = static_cast<int>(lane) % L;
  const int k = static_cast<int>(lane) / L;
  const int position = (first + row_of<C>(lane)) % length;
  const int sees_from = ranges[2 * position];
  const int sees_to = ranges[2 * position + 1];

  Queries<D, C> queries;
  begin<D, C>(kv, queries, rows, from, first, count, j);
  float biases[C];
  KSA_UNROLL
  for (int c = 0; c < C; c++) {
    biases[c] = 0.0f;
  }
  for (int tile = low + static_cast<int>(simdgroup) * kTile; tile < high; tile += N * kTile) {
    // The last tile begins earlier, so that no slot needs a check before it is read.
    const int base = max(0, min(tile, high - kTile));
    const int fresh = max(tile, sees_from);
    float weights[steps];
    float best = rows.best;
    KSA_UNROLL
    for (int s = 0; s < steps; s++) {
      const int slot = base + k + s * keys;
      float scores[C];
      KSA_UNROLL
      for (int c = 0; c < C; c++) {
        scores[c] = 0.0f;
      }
      dot<D, C>(kv, queries, slot, j, scores);
      const float score = scatter<C, L>(scores, lane);
      weights[s] = slot >= fresh && slot < sees_to ? score : kLowest;
      best = max(best, weights[s]);
    }
    KSA_UNROLL
    for (int bit = L; bit < 32; bit *= 2) {
      best = max(best, simd_shuffle_xor(best, static_cast<ushort>(bit)));
    }
    if (simd_any(best > rows.best)) {
      const float fade = fast::exp2(rows.best - best);
      rows.best = best;
      rows.sum *= fade;
      KSA_UNROLL
      for (int c = 0; c < C; c++) {
        const float by = simd_broadcast(fade, static_cast<ushort>(lane_of(c, C)));
        biases[c] *= by;
        KSA_UNROLL
        for (int e = 0; e < elements(D); e++) {
          rows.out[c][e] *= by;
        }
      }
    }
    KSA_UNROLL
    for (int s = 0; s < steps; s++) {
      weights[s] = fast::exp2(weights[s] - best);
      rows.sum += weights[s];
    }
    KSA_UNROLL
    for (int i = 0; i < kTile; i++) {
      float of_row[C];
      KSA_UNROLL
      for (int c = 0; c < C; c++) {
        of_row[c] = simd_broadcast(weights[i / keys], static_cast<ushort>(i % keys * L + lane_of(c, C)));
      }
      add<D, C>(kv, rows, biases, base + i, static_cast<int>(lane), of_row);
    }
  }
  finish<D, C>(kv, rows, biases);
}

// Leave what this simdgroup has of its rows in threadgroup memory.
template <int D, int C>
inline void leave(
    const thread Rows<D, C>& rows,
    threadgroup float* outs,   // N x C x 32 x elements(D)
    threadgroup float* stats,  // N x C x 2
    uint simdgroup,
    uint lane) {
  constexpr int E = elements(D);
  float sum = rows.sum;
  KSA_UNROLL
  for (int bit = lanes(D); bit < 32; bit *= 2) {
    sum += simd_shuffle_xor(sum, static_cast<ushort>(bit));
  }
  if (lane < static_cast<uint>(C)) {
    threadgroup float* to = stats + 2 * (simdgroup * C + row_of<C>(lane));
    to[0] = rows.best;
    to[1] = sum;
  }
  KSA_UNROLL
  for (int c = 0; c < C; c++) {
    KSA_UNROLL
    for (int e = 0; e < E; e++) {
      outs[((simdgroup * C + c) * 32 + lane) * E + e] = rows.out[c][e];
    }
  }
}

// Join what N simdgroups left of row c and write it: its attention, or for a later sum D + 2 numbers: the weighted
// values, weights, best score.
template <int D, int C, int N, bool PARTIAL, typename O>
inline void join(
    const threadgroup float* outs, const threadgroup float* stats, int c, device O* to, uint lane) {
  constexpr int E = elements(D);
  float best = kLowest;
  for (int n = 0; n < N; n++) {
    best = max(best, stats[2 * (n * C + c)]);
  }
  // As long as a row has seen nothing, all weights are 1; the first score makes nothing of them.
  const float real = best == kLowest ? 0.0f : 1.0f;
  float sum = 0.0f;
  float out[E];
  KSA_UNROLL
  for (int e = 0; e < E; e++) {
    out[e] = 0.0f;
  }
  for (int n = 0; n < N; n++) {
    const float fade = real * fast::exp2(stats[2 * (n * C + c)] - best);
    sum += stats[2 * (n * C + c) + 1] * fade;
    KSA_UNROLL
    for (int e = 0; e < E; e++) {
      out[e] += outs[((n * C + c) * 32 + lane) * E + e] * fade;
    }
  }
  // A row that sees nothing gives zeros.
  const float by = PARTIAL || sum == 0.0f ? 1.0f : 1.0f / sum;
  if (lane * E < D) {
    KSA_UNROLL
    for (int e = 0; e < E; e++) {
      to[lane * E + e] = static_cast<O>(out[e] * by);
    }
  }
  if (PARTIAL && lane == 0) {
    to[D] = static_cast<O>(sum);
    to[D + 1] = static_cast<O>(best);
  }
}

}  // namespace ksa
