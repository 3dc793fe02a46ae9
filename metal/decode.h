// Decode: rows, loads and softmax. A simdgroup holds C query rows, its lanes neighbouring elements of each.

// Query rows of one launch, and so rows in a table of bounds.
constant constexpr int kRows = 8;

// Elements of a head that a lane holds. Lanes beyond head_dim / elements(head_dim) hold zeros.
constexpr int elements(int head_dim) {
  return head_dim <= 64 ? 2 : head_dim <= 128 ? 4 : 8;
}

template <int D, int C>
struct Rows {
  float query[C][elements(D)];  // times scale and log2(e): softmax in powers of two
  float out[C][elements(D)];    // the sum of values, weighted by 2^(score - best)
  float sum[C];                 // the sum of these weights
  float best[C];                // the highest score so far
};

// Rows first .. first + C - 1 of `count`; what lies beyond is zero.
template <int D, int C, typename T>
inline void start(thread Rows<D, C>& rows, const device T* queries, int first, int count, uint lane) {
  constexpr int E = elements(D);
  const float scale = 1.44269504f * precise::rsqrt(static_cast<float>(D));
  KSA_UNROLL
  for (int c = 0; c < C; c++) {
    KSA_UNROLL
    for (int e = 0; e < E; e++) {
      const int i = static_cast<int>(lane) * E + e;
      const bool held = i < D && first + c < count;
      rows.query[c][e] = held ? scale * static_cast<float>(queries[(first + c) * D + i]) : 0.0f;
      rows.out[c][e] = 0.0f;
    }
    rows.sum[c] = 0.0f;
    rows.best[c] = kLowest;
  }
}

// One key and value. Bit r of `seen` says whether row r of the text sees it; row i of the simdgroup
// is row (first + i) % count of the text.
template <int D, int C>
inline void attend(
    thread Rows<D, C>& rows, const thread float* key, const thread float* value, uint seen, int first, int count) {
  constexpr int E = elements(D);
  int row = first % count;
  KSA_UNROLL
  for (int c = 0; c < C; c++) {
    float score = 0.0f;
    KSA_UNROLL
    for (int e = 0; e < E; e++) {
      score += rows.query[c][e] * key[e];
    }
    score = simd_sum(score);
    const bool sees = (seen >> row & 1u) != 0u;
    const float best = sees ? max(rows.best[c], score) : rows.best[c];
    const float fade = fast::exp2(rows.best[c] - best);
    const float weight = sees ? fast::exp2(score - best) : 0.0f;
    rows.best[c] = best;
    rows.sum[c] = rows.sum[c] * fade + weight;
    KSA_UNROLL
    for (int e = 0; e < E; e++) {
      rows.out[c][e] = rows.out[c][e] * fade + weight * value[e];
    }
    row = row + 1 == count ? 0 : row + 1;
  }
}

// Keys and values of one sequence and head, as they are.
template <typename T>
struct Plain {
  const device T* keys;
  const device T* values;
};

// E neighbours of a row, by loads of up to 4. Rows start at multiples of 8 elements.
template <int E, typename T>
inline void read(const device T* from, thread float* to) {
  constexpr int width = E < 4 ? E : 4;
  KSA_UNROLL
  for (int e = 0; e < E; e += width) {
    const vec<T, width> some = *reinterpret_cast<const device vec<T, width>*>(from + e);
    KSA_UNROLL
    for (int i = 0; i < width; i++) {
      to[e + i] = static_cast<float>(some[i]);
    }
  }
}

template <int D, typename T>
inline void load(const thread Plain<T>& cache, int slot, uint lane, thread float* key, thread float* value) {
  constexpr int E = elements(D);
  const size_t at = static_cast<size_t>(slot) * D + lane * E;
  if (lane * E < D) {
    read<E>(cache.keys + at, key);
    read<E>(cache.values + at, value);
  } else {
    KSA_UNROLL
    for (int e = 0; e < E; e++) {
      key[e] = 0.0f;
      value[e] = 0.0f;
    }
  }
}

// Keys and values in mlx's affine format: element i of a group is scale * bits + bias, in words of 32 bits.
template <typename T, int BITS, int GROUP>
struct Quantized {
  const device uint* keys;
  const device T* key_scales;
  const device T* key_biases;
  const device uint* values;
  const device T* value_scales;
  const device T* value_biases;
};

// This lane's elements of the row `slot`, unpacked.
template <int D, int BITS, int GROUP, typename T>
inline void unpack(
    const device uint* packed,
    const device T* scales,
    const device T* biases,
    int slot,
    uint lane,
    thread float* out) {
  constexpr int E = elements(D);
  constexpr int groups = D / GROUP;
  constexpr int bytes = E * BITS / 8;
  // One lane loads each scale and bias, for all lanes.
  const size_t at = static_cast<size_t>(slot) * groups;
  const int of = static_cast<int>(lane);
  float affine = 0.0f;
  if (of < groups) {
    affine = static_cast<float>(scales[at + of]);
  } else if (of < 2 * groups) {
    affine = static_cast<float>(biases[at + of - groups]);
  }
  const int group = min(of * E / GROUP, groups - 1);
  const float scale = simd_shuffle(affine, static_cast<ushort>(group));
  const float bias = simd_shuffle(affine, static_cast<ushort>(groups + group));

  const device uint* row = packed + static_cast<size_t>(slot) * (D * BITS / 32);
  uint low = 0u;
  uint high = 0u;
  if (of * E < D) {
    if (bytes == 1) {
      low = reinterpret_cast<const device uchar*>(row)[of];
    } else if (bytes == 2) {
      low = reinterpret_cast<const device ushort*>(row)[of];
    } else {
      low = row[of * (bytes / 4)];
      high = bytes == 8 ? row[of * 2 + 1] : 0u;
    }
  }
  KSA_UNROLL
  for (int e = 0; e < E; e++) {
    const uint bits = e * BITS < 32 ? low >> (e * BITS % 32) : high >> (e * BITS % 32);
    out[e] = scale * static_cast<float>(bits & ((1u << BITS) - 1u)) + bias;
  }
}

template <int D, typename T, int BITS, int GROUP>
inline void load(
    const thread Quantized<T, BITS, GROUP>& cache, int slot, uint lane, thread float* key, thread float* value) {
  unpack<D, BITS, GROUP>(cache.keys, cache.key_scales, cache.key_biases, slot, lane, key);
  unpack<D, BITS, GROUP>(cache.values, cache.value_scales, cache.value_biases, slot, lane, value);
}

// The cache from row `at` on, quantised or (BITS = 0, all arrays of T) plain.
template <int D, int BITS, int GROUP, typename T>
inline Quantized<T, BITS, GROUP> from_row(
    size_t at,
    const device uint* keys,
    const device T* key_scales,
    const device T* key_biases,
    const device uint* values,
    const device T* value_scales,
    const device T* value_biases) {
  constexpr int words = D * BITS / 32;
  constexpr int groups = D / GROUP;
  return {keys + at * words, key_scales + at * groups, key_biases + at * groups,
          values + at * words, value_scales + at * groups, value_biases + at * groups};
}

template <int D, int BITS, int GROUP, typename T>
inline Plain<T> from_row(
    size_t at, const device T* keys, const device T*, const device T*, const device T* values, const device T*, const device T*) {
  return {keys + at * D, values + at * D};
}

// The slots that any of `count` rows sees: from x to before y, of which `bounds` has one pair for each row.
inline int2 seen_by_any(const device int* bounds, int count) {
  int first = 0x7fffffff;
  int last = 0;
  for (int r = 0; r < count; r++) {
    if (bounds[2 * r] < bounds[2 * r + 1]) {
      first = min(first, bounds[2 * r]);
      last = max(last, bounds[2 * r + 1]);
    }
  }
  return int2(min(first, last), last);
}

// Bit r says whether lane r, which holds what row r sees, sees this slot.
inline uint seen_bits(int slot, int2 sees) {
  return static_cast<uint>(static_cast<simd_vote::vote_t>(simd_ballot(slot >= sees.x && slot < sees.y)));
}

// Let the rows of a threadgroup attend to the slots begin .. end - 1 of those that any of them sees of a
// cache; both are counted on from its end afterwards.
//
// N simdgroups. With TILE = 0 all hold the same rows, and each reads every N-th slot for itself. Else they
// hold different rows, and share tiles of so many keys and values in threadgroup memory.
template <int D, int C, int N, int TILE, typename Cache>
inline void visit(
    thread Rows<D, C>& rows,
    const thread Cache& cache,
    const device int* bounds,
    thread int& begin,
    thread int& end,
    int first,
    int count,
    threadgroup float* tile,
    uint simdgroup,
    uint lane) {
  constexpr int E = elements(D);
  float key[E];
  float value[E];
  const int2 slots = seen_by_any(bounds, count);
  const int from = slots.x + max(begin, 0);
  const int to = min(slots.x + end, slots.y);
  begin -= slots.y - slots.x;
  end -= slots.y - slots.x;
  // Lane r knows what row r sees.
  const int row = min(static_cast<int>(lane), count - 1);
  const int2 sees = int2(bounds[2 * row], bounds[2 * row + 1]);
  if (TILE == 0) {
    for (int slot = from + static_cast<int>(simdgroup); slot < to; slot += N) {
      load<D>(cache, slot, lane, key, value);
      attend(rows, key, value, seen_bits(slot, sees), first, count);
    }
    return;
  }
  for (int start = from; start < to; start += TILE) {
    const int size = min(TILE, to - start);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = static_cast<int>(simdgroup); i < size; i += N) {
      load<D>(cache, start + i, lane, key, value);
      KSA_UNROLL
      for (int e = 0; e < E; e++) {
        tile[2 * i * 32 * E + lane * E + e] = key[e];
        tile[(2 * i + 1) * 32 * E + lane * E + e] = value[e];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = 0; i < size; i++) {
      KSA_UNROLL
      for (int e = 0; e < E; e++) {
        key[e] = tile[2 * i * 32 * E + lane * E + e];
        value[e] = tile[(2 * i + 1) * 32 * E + lane * E + e];
      }
      attend(rows, key, value, seen_bits(start + i, sees), first, count);
    }
  }
}

// Join what N simdgroups have of the same rows: row c ends in simdgroup c % N, complete.
template <int D, int C, int N>
inline void merge(
    thread Rows<D, C>& rows,
    threadgroup float* outs,   // N x 32 x elements(D)
    threadgroup float* stats,  // N x C x 2
    uint simdgroup,
    uint lane) {
  constexpr int E = elements(D);
  if (lane == 0) {
    KSA_UNROLL
    for (int c = 0; c < C; c++) {
      stats[2 * (simdgroup * C + c)] = rows.best[c];
      stats[2 * (simdgroup * C + c) + 1] = rows.sum[c];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  KSA_UNROLL
  for (int c = 0; c < C; c++) {
    float best = kLowest;
    for (int n = 0; n < N; n++) {
      best = max(best, stats[2 * (n * C + c)]);
    }
    const float fade = fast::exp2(rows.best[c] - best);
    KSA_UNROLL
    for (int e = 0; e < E; e++) {
      outs[(simdgroup * 32 + lane) * E + e] = rows.out[c][e] * fade;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (static_cast<int>(simdgroup) == c % N) {
      rows.best[c] = best;
      rows.sum[c] = 0.0f;
      KSA_UNROLL
      for (int e = 0; e < E; e++) {
        rows.out[c][e] = 0.0f;
      }
      for (int n = 0; n < N; n++) {
        rows.sum[c] += stats[2 * (n * C + c) + 1] * fast::exp2(stats[2 * (n * C + c)] - best);
        KSA_UNROLL
        for (int e = 0; e < E; e++) {
          rows.out[c][e] += outs[(n * 32 + lane) * E + e];
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Write one row: its attention, or for a later sum D + 2 numbers: the weighted values, weights, best score.
template <int D, int C, bool PARTIAL, typename O>
inline void store(const thread Rows<D, C>& rows, int c, device O* out, uint lane) {
  constexpr int E = elements(D);
  // A row that sees nothing gives zeros.
  const float by = PARTIAL || rows.sum[c] == 0.0f ? 1.0f : 1.0f / rows.sum[c];
  if (lane * E < D) {
    KSA_UNROLL
    for (int e = 0; e < E; e++) {
      out[lane * E + e] = static_cast<O>(rows.out[c][e] * by);
    }
  }
  if (PARTIAL && lane == 0) {
    out[D] = static_cast<O>(rows.sum[c]);
    out[D + 1] = static_cast<O>(rows.best[c]);
  }
}
