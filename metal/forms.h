// Decode: keys and values in their forms, as the lanes of a simdgroup read them.
//
// A simdgroup has C query rows. For the scores a few lanes share a key, so that one step scores several; for the
// values all lanes share the head.
namespace ksa {

// Lanes that share a key: twice as many hold half as much of the queries.
constexpr int lanes(int head_dim) {
  return head_dim < 128 ? 8 : 16;
}

// Elements of a key that one of them has: runs of neighbours, in turns with the others.
constexpr int share(int head_dim) {
  return head_dim / lanes(head_dim);
}

// Elements of a value that a lane has. Lanes beyond head_dim / elements(head_dim) have none.
constexpr int elements(int head_dim) {
  return head_dim <= 64 ? 2 : head_dim <= 128 ? 4 : 8;
}

// The largest power of two up to 32 that divides n.
constexpr int power(int n) {
  return n % 32 == 0 ? 32 : n % 16 == 0 ? 16 : n % 8 == 0 ? 8 : n % 4 == 0 ? 4 : n % 2 == 0 ? 2 : 1;
}

template <int D, int C>
struct Queries {
  float of[C][share(D)];                    // times scale and log2(e): softmax in powers of two
  float sums[C][share(D) / power(share(D))];  // of each run, for the biases of keys in mlx's affine format
};

template <int D, int C>
struct Rows {
  float out[C][elements(D)];  // the sum of values, weighted by 2^(score - best)
  float sum;                  // of these weights: of the lane's own row, over its own keys
  float best;                 // the highest score of the lane's own row
};

// A lane's share of the rows first .. first + C - 1 of `count`, in runs of so many; what lies beyond is zero.
template <int D, int C, int RUN, typename T>
inline void fetch(thread Queries<D, C>& queries, const device T* from, int first, int count, int lane) {
  const float scale = 1.44269504f * precise::rsqrt(static_cast<float>(D));
  KSA_UNROLL
  for (int c = 0; c < C; c++) {
    KSA_UNROLL
    for (int e = 0; e < share(D); e++) {
      const int i = (e / RUN * lanes(D) + lane) * RUN + e % RUN;
      queries.of[c][e] = first + c < count ? scale * static_cast<float>(from[(first + c) * D + i]) : 0.0f;
    }
  }
}

// ---- Keys and values of one sequence and head, as they are.

template <int D, typename T>
struct Plain {
  const device T* keys;
  const device T* values;
};

template <int D, typename T>
inline Plain<D, T> from_row(Plain<D, T> kv, size_t row) {
  return {kv.keys + row * D, kv.values + row * D};
}

// N neighbours, by loads of up to 4. Rows start at multiples of 8 elements.
template <int N, typename T>
inline void read(const device T* from, thread float* to) {
  constexpr int width = N < 4 ? N : 4;
  KSA_UNROLL
  for (int e = 0; e < N; e += width) {
    const vec<T, width> some = *reinterpret_cast<const device vec<T, width>*>(from + e);
    KSA_UNROLL
    for (int i = 0; i < width; i++) {
      to[e + i] = static_cast<float>(some[i]);
    }
  }
}

// Neighbours in a run: 8 lanes read 128 bytes of half type at once.
template <int D>
constexpr int run_of_plain() {
  return power(share(D)) < 8 ? power(share(D)) : 8;
}

template <int D, int C, typename T>
inline void begin(
    Plain<D, T>, thread Queries<D, C>& queries, thread Rows<D, C>&, const device T* from, int first, int count, int lane) {
  fetch<D, C, run_of_plain<D>()>(queries, from, first, count, lane);
}

// Adds the lane's part of the scores of C rows for the key in `slot`.
template <int D, int C, typename T>
inline void dot(Plain<D, T> kv, const thread Queries<D, C>& queries, int slot, int lane, thread float* scores) {
  constexpr int run = run_of_plain<D>();
  KSA_UNROLL
  for (int i = 0; i < share(D) / run; i++) {
    float key[run];
    read<run>(kv.keys + static_cast<size_t>(slot) * D + (i * lanes(D) + lane) * run, key);
    KSA_UNROLL
    for (int e = 0; e < run; e++) {
      KSA_UNROLL
      for (int c = 0; c < C; c++) {
        scores[c] += queries.of[c][i * run + e] * key[e];
      }
    }
  }
}

// Adds the value in `slot` to C rows, by their weights.
template <int D, int C, typename T>
inline void add(
    Plain<D, T> kv, thread Rows<D, C>& rows, thread float*, int slot, int lane, const thread float* weights) {
  constexpr int E = elements(D);
  float value[E];
  if (lane * E < D) {
    read<E>(kv.values + static_cast<size_t>(slot) * D + lane * E, value);
  } else {
    KSA_UNROLL
    for (int e = 0; e < E; e++) {
      value[e] = 0.0f;
    }
  }
  KSA_UNROLL
  for (int c = 0; c < C; c++) {
    KSA_UNROLL
    for (int e = 0; e < E; e++) {
      rows.out[c][e] += weights[c] * value[e];
    }
  }
}

template <int D, int C, typename T>
inline void finish(Plain<D, T>, thread Rows<D, C>&, const thread float*) {}

// ---- In mlx's affine format: element i of a group is scale * bits + bias, in words of 32 bits.

template <int D, typename T, int KEY_BITS, int VALUE_BITS, int GROUP>
struct Affine {
  const device uint* keys;
  const device T* key_scales;
  const device T* key_biases;
  const device uint* values;
  const device T* value_scales;
  const device T* value_biases;
};

template <int D, typename T, int KEY_BITS, int VALUE_BITS, int GROUP>
inline Affine<D, T, KEY_BITS, VALUE_BITS, GROUP> from_row(
    Affine<D, T, KEY_BITS, VALUE_BITS, GROUP> kv, size_t row) {
  return {kv.keys + row * (D * KEY_BITS / 32),     kv.key_scales + row * (D / GROUP),
          kv.key_biases + row * (D / GROUP),       kv.values + row * (D * VALUE_BITS / 32),
          kv.value_scales + row * (D / GROUP),     kv.value_biases + row * (D / GROUP)};
}

// Bits are masked where they are in a half word, not shifted: element e is `factor` times too large.
template <int BITS>
constexpr float factor(int e) {
  return static_cast<float>(1 << e % (16 / BITS) * BITS);
}

// Run `at`, of N elements, of a row.
template <int BITS, int N>
inline void unpack(const device uint* row, int at, thread float* to) {
  constexpr int bytes = N * BITS / 8;
  constexpr int words = (bytes + 3) / 4;
  constexpr int each = 16 / BITS;
  uint word[words];
  if (bytes == 1) {
    word[0] = reinterpret_cast<const device uchar*>(row)[at];
  } else if (bytes == 2) {
    word[0] = reinterpret_cast<const device ushort*>(row)[at];
  } else {
    KSA_UNROLL
    for (int w = 0; w < words; w++) {
      word[w] = row[at * words + w];
    }
  }
  KSA_UNROLL
  for (int e = 0; e < N; e++) {
    const uint half_word = e / each % 2 == 0 ? word[e / each / 2] : word[e / each / 2] >> 16;
    to[e] = static_cast<float>(half_word & (((1u << BITS) - 1u) << e % each * BITS));
  }
}

template <int D, int C, typename T, int KEY_BITS, int VALUE_BITS, int GROUP>
inline void begin(
    Affine<D, T, KEY_BITS, VALUE_BITS, GROUP>,
    thread Queries<D, C>& queries,
    thread Rows<D, C>& rows,
    const device T* from,
    int first,
    int count,
    int lane) {
  constexpr int run = power(share(D));
  fetch<D, C, run>(queries, from, first, count, lane);
  KSA_UNROLL
  for (int c = 0; c < C; c++) {
    KSA_UNROLL
    for (int i = 0; i < share(D) / run; i++) {
      queries.sums[c][i] = 0.0f;
      KSA_UNROLL
      for (int e = 0; e < run; e++) {
        queries.sums[c][i] += queries.of[c][i * run + e];
        queries.of[c][i * run + e] /= factor<KEY_BITS>(e);
      }
    }
    KSA_UNROLL
    for (int e = 0; e < elements(D); e++) {
      rows.out[c][e] *= factor<VALUE_BITS>(e);
    }
  }
}

template <int D, int C, typename T, int KEY_BITS, int VALUE_BITS, int GROUP>
inline void dot(
    Affine<D, T, KEY_BITS, VALUE_BITS, GROUP> kv,
    const thread Queries<D, C>& queries,
    int slot,
    int lane,
    thread float* scores) {
  constexpr int run = power(share(D));
  KSA_UNROLL
  for (int i = 0; i < share(D) / run; i++) {
    const int at = i * lanes(D) + lane;
    const size_t group = static_cast<size_t>(slot) * (D / GROUP) + at * run / GROUP;
    const float scale = static_cast<float>(kv.key_scales[group]);
    const float bias = static_cast<float>(kv.key_biases[group]);
    float key[run];
    unpack<KEY_BITS, run>(kv.keys + static_cast<size_t>(slot) * (D * KEY_BITS / 32), at, key);
    float sums[C];
    KSA_UNROLL
    for (int c = 0; c < C; c++) {
      sums[c] = 0.0f;
    }
    KSA_UNROLL
    for (int e = 0; e < run; e++) {
      KSA_UNROLL
      for (int c = 0; c < C; c++) {
        sums[c] += queries.of[c][i * run + e] * key[e];
      }
    }
    KSA_UNROLL
    for (int c = 0; c < C; c++) {
      scores[c] += sums[c] * scale + queries.sums[c][i] * bias;
    }
  }
}

template <int D, int C, typename T, int KEY_BITS, int VALUE_BITS, int GROUP>
inline void add(
    Affine<D, T, KEY_BITS, VALUE_BITS, GROUP> kv,
    thread Rows<D, C>& rows,
    thread float* biases,
    int slot,
    int lane,
    const thread float* weights) {
  constexpr int E = elements(D);
  const int held = min(lane, D / E - 1);  // lanes beyond the head read what the last one does, for nothing
  const size_t group = static_cast<size_t>(slot) * (D / GROUP) + held * E / GROUP;
  const float scale = static_cast<float>(kv.value_scales[group]);
  const float bias = static_cast<float>(kv.value_biases[group]);
  float value[E];
  unpack<VALUE_BITS, E>(kv.values + static_cast<size_t>(slot) * (D * VALUE_BITS / 32), held, value);
  KSA_UNROLL
  for (int c = 0; c < C; c++) {
    const float scaled = weights[c] * scale;
    biases[c] += weights[c] * bias;
    KSA_UNROLL
    for (int e = 0; e < E; e++) {
      rows.out[c][e] += scaled * value[e];
    }
  }
}

template <int D, int C, typename T, int KEY_BITS, int VALUE_BITS, int GROUP>
inline void finish(
    Affine<D, T, KEY_BITS, VALUE_BITS, GROUP>, thread Rows<D, C>& rows, const thread float* biases) {
  KSA_UNROLL
  for (int c = 0; c < C; c++) {
    KSA_UNROLL
    for (int e = 0; e < elements(D); e++) {
      rows.out[c][e] = rows.out[c][e] / factor<VALUE_BITS>(e) + biases[c];
    }
  }
}

}  // namespace ksa
