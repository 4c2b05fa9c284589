// Attention of single tokens on latent cache entries: 4 heads by 4 entries at a time.
#pragma once

#include "blocks.h"

namespace r1pipe {

constexpr int64_t AHEAD = 24;  // entries fetched before they are needed
constexpr int64_t TILE = 4;    // heads, entries and registers of a context processed together

// How entries of one type are multiplied.
template <typename T>
struct Numbers;

template <>
struct Numbers<float> {
  using Register = Floats;
  static constexpr int64_t COUNT = 16;   // numbers of a register
  static constexpr int64_t ENTRIES = 1;  // whose values are added at once

  static Register load(const float* x, int64_t left) { return r1pipe::load(x, first_of(left)); }

  // HELD * 16 values, of which `left` are there, of the entry m
  static void values(const float* value, int64_t stride, int64_t m, int64_t, int64_t left, Register (&v)[HELD]) {
#pragma GCC unroll 4
    for (int j = 0; j < HELD; j++) v[j] = load(value + m * stride + j * UNIT, left - j * UNIT);
  }
  static Register weight(const float* w) { return broadcast(*w); }
  static void store(float* out, const Floats (&sum)[HELD]) {
    for (int j = 0; j < HELD; j++) r1pipe::store(out + j * UNIT, sum[j]);
  }
};

}  // namespace r1pipe

#ifdef __AVX512BF16__
#include "latent_bfloat16.h"
#endif

namespace r1pipe {

// Adds the dot products of HELD queries with HELD entries to sum[query * TILE + entry].
template <typename T>
inline void add_scores(const T* const* query, const T* const* entry, int64_t width, Floats* sum) {
  for (int64_t i = 0; i < width; i += Numbers<T>::COUNT) {
    typename Numbers<T>::Register e[HELD];
#pragma GCC unroll 4
    for (int j = 0; j < HELD; j++) e[j] = Numbers<T>::load(entry[j] + i, width - i);
#pragma GCC unroll 4
    for (int k = 0; k < HELD; k++) {
      const auto q = Numbers<T>::load(query[k] + i, width - i);
#pragma GCC unroll 4
      for (int j = 0; j < HELD; j++) sum[k * TILE + j] = multiply_add(q, e[j], sum[k * TILE + j]);
    }
  }
}

// Scores of TILE heads by TILE entries: out[head * stride + entry]. Pointers may repeat.
template <typename T>
inline void score_tile(const T* const (&query)[TILE], const T* const (&entry)[TILE], int64_t width, float* out,
                       int64_t stride) {
  Floats sum[UNIT];
  for (auto& one : sum) one = zeros();
#pragma GCC unroll 2
  for (int64_t k = 0; k < TILE; k += HELD)
#pragma GCC unroll 2
    for (int64_t j = 0; j < TILE; j += HELD) add_scores(query + k, entry + j, width, sum + k * TILE + j);
  store_fours(out, stride, sums_of(sum));
}

// w = exp(scale * (w - max)) as T, zeros after them up to `filled` -> the factor that makes it the softmax of scale * w.
// NaN stays NaN.
template <typename T>
inline float softmax(float* w, int64_t length, int64_t filled, float scale, T* out) {
  float largest = w[0], total = 0.0f;
#pragma omp simd reduction(max : largest)
  for (int64_t m = 0; m < length; m++) largest = w[m] > largest ? w[m] : largest;
#pragma omp simd reduction(+ : total)
  for (int64_t m = 0; m < length; m++) {
    w[m] = exponential(scale * (w[m] - largest));
    total += w[m];
  }
  std::fill(w + length, w + filled, 0.0f);
  rounded(w, filled, out);
  return 1.0f / total;
}

// As weigh_tile, for HELD heads and registers.
template <typename T>
inline void weigh(const T* weight, int64_t weight_stride, const T* value, int64_t value_stride, int64_t last,
                  int64_t left, float* out) {
  Floats sum[HELD][HELD];
  for (auto& row : sum) std::fill_n(row, HELD, zeros());
  for (int64_t m = 0; m <= last; m += Numbers<T>::ENTRIES) {
    typename Numbers<T>::Register v[HELD];
    Numbers<T>::values(value, value_stride, m, last, left, v);
#pragma GCC unroll 4
    for (int k = 0; k < HELD; k++) {
      const auto w = Numbers<T>::weight(weight + k * weight_stride + m);
#pragma GCC unroll 4
      for (int j = 0; j < HELD; j++) sum[k][j] = multiply_add(w, v[j], sum[k][j]);
    }
  }
  for (int k = 0; k < HELD; k++) Numbers<T>::store(out + k * TILE * UNIT, sum[k]);
}

// out[head * 64 + i] = sum over entries of weight[head * weight_stride + m] * value[m][i], for TILE heads and the
// first `left` of 64 values, over the entries up to `last`.
template <typename T>
inline void weigh_tile(const T* weight, int64_t weight_stride, const T* value, int64_t value_stride, int64_t last,
                       int64_t left, float* out) {
  for (int64_t k = 0; k < TILE; k += HELD) {
    int64_t j = 0;
    do {
      const int64_t at = j * UNIT;
      weigh(weight + k * weight_stride, weight_stride, value + at, value_stride, last, left - at,
            out + k * TILE * UNIT + at);
      j += HELD;
    } while (j < TILE && j * UNIT < left);
  }
}

// Fetches the first entries of a slot before they are needed: those of many slots are in main memory.
template <typename T>
inline void fetch(const T* entries, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) _mm_prefetch(entries + i, _MM_HINT_T0);
}

// context [heads, latent] = softmax(scale * queries [heads, width] . entry) . latent, over entries [length, width] whose first
// `latent` numbers are the values.
template <typename T>
void attend(const T* queries, int64_t heads, const T* entries, int64_t stride, int64_t length, int64_t width,
            int64_t latent, float scale, T* context) {
  const int64_t M = up_to(length, TILE), last = length - 1;
  float *scores = scratch<float, struct Scores>(TILE * M), tile[UNIT * TILE * TILE], factor[TILE];
  T* weights = scratch<T, struct Softmax>(TILE * M);
  for (int64_t h = 0; h < heads; h += TILE) {
    const int64_t some = std::min(TILE, heads - h);  // heads of this tile: the last one replaces missing ones
    const T* query[TILE];
    for (int64_t k = 0; k < TILE; k++) query[k] = queries + (h + std::min(k, some - 1)) * width;
    for (int64_t m = 0; m < length; m += TILE) {
      const T* entry[TILE];
      for (int64_t j = 0; j < TILE; j++) entry[j] = entries + std::min(m + j, last) * stride;
      fetch(entries + (m + AHEAD) * stride, TILE * stride);  // may be beyond the cache, which is harmless
      score_tile(query, entry, width, scores + m, M);
    }
    for (int64_t k = 0; k < TILE; k++) factor[k] = softmax(scores + k * M, length, M, scale, weights + k * M);
    for (int64_t c = 0; c < latent; c += UNIT * TILE) {
      weigh_tile(weights, M, entries + c, stride, last, latent - c, tile);
      for (int64_t k = 0; k < some; k++)
        narrow(tile + k * UNIT * TILE, std::min(UNIT * TILE, latent - c), factor[k], context + (h + k) * latent + c);
    }
  }
}

}  // namespace r1pipe
