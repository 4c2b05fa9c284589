// Attention of single tokens on latent cache entries, in AVX-512 registers: 4 heads by 4 entries at a time.
#pragma once

#include "blocks.h"

namespace r1pipe {

constexpr int64_t AHEAD = 24;  // entries fetched before they are needed
constexpr int64_t TILE = 4;    // heads, entries and registers of a context processed together

// The sums of 16 registers, in their order.
inline __m512 sums(const __m512 (&in)[UNIT]) {
  __m512 a[UNIT];
  std::copy(in, in + UNIT, a);
  for (int i = 0; i < 8; i++)
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(a[2 * i]), _mm512_castps_pd(a[2 * i + 1]));
    const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(a[2 * i]), _mm512_castps_pd(a[2 * i + 1]));
    a[i] = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
  }
  // now each 128-bit part of a[i] holds partial sums of inputs 4i..4i+3
  const __m512 b0 = _mm512_add_ps(_mm512_shuffle_f32x4(a[0], a[1], 0x88), _mm512_shuffle_f32x4(a[0], a[1], 0xdd));
  const __m512 b1 = _mm512_add_ps(_mm512_shuffle_f32x4(a[2], a[3], 0x88), _mm512_shuffle_f32x4(a[2], a[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(b0, b1, 0x88), _mm512_shuffle_f32x4(b0, b1, 0xdd));
}

// Dot products and weighted sums on entries of one type.
template <typename T>
struct Numbers;

template <>
struct Numbers<float> {
  static constexpr int64_t COUNT = 16;  // of a register
  using Register = __m512;
  static Register load(const float* x, int64_t left) { return r1pipe::load(x, first_of(left)); }
  static __m512 add_products(__m512 sum, Register x, Register y) { return _mm512_fmadd_ps(x, y, sum); }
};

#ifdef __AVX512BF16__
template <>
struct Numbers<BFloat16> {
  static constexpr int64_t COUNT = 32;
  using Register = __m512bh;
  static Register load(const BFloat16* x, int64_t left) {
    const __mmask32 mask = left >= COUNT ? 0xffffffff : left <= 0 ? 0 : (1u << left) - 1;
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, x);
  }
  static __m512 add_products(__m512 sum, Register x, Register y) { return _mm512_dpbf16_ps(sum, x, y); }
};
#endif

// Scores of TILE heads by TILE entries: out[head * stride + entry]. Pointers may repeat.
template <typename T>
inline void score_tile(const T* const (&query)[TILE], const T* const (&entry)[TILE], int64_t width, float* out,
                       int64_t stride) {
  __m512 sum[UNIT];
  for (auto& one : sum) one = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += Numbers<T>::COUNT) {
    typename Numbers<T>::Register e[TILE];
#pragma GCC unroll 4
    for (int j = 0; j < TILE; j++) e[j] = Numbers<T>::load(entry[j] + i, width - i);
#pragma GCC unroll 4
    for (int k = 0; k < TILE; k++) {
      const auto q = Numbers<T>::load(query[k] + i, width - i);
#pragma GCC unroll 4
      for (int j = 0; j < TILE; j++) sum[k * TILE + j] = Numbers<T>::add_products(sum[k * TILE + j], q, e[j]);
    }
  }
  const __m512 all = sums(sum);
  _mm_storeu_ps(out, _mm512_extractf32x4_ps(all, 0));
  _mm_storeu_ps(out + stride, _mm512_extractf32x4_ps(all, 1));
  _mm_storeu_ps(out + 2 * stride, _mm512_extractf32x4_ps(all, 2));
  _mm_storeu_ps(out + 3 * stride, _mm512_extractf32x4_ps(all, 3));
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

// out[head * 64 + i] = sum over entries of weight[head * weight_stride + m] * value[m][i], for TILE heads and the
// first `left` of 64 values, over the entries up to `last`.
inline void weigh_tile(const float* weight, int64_t weight_stride, const float* value, int64_t value_stride,
                       int64_t last, int64_t left, float* out) {
  __m512 sum[TILE][TILE];
  for (auto& row : sum) std::fill_n(row, TILE, _mm512_setzero_ps());
  for (int64_t m = 0; m <= last; m++) {
    __m512 v[TILE];
#pragma GCC unroll 4
    for (int j = 0; j < TILE; j++) v[j] = Numbers<float>::load(value + m * value_stride + j * UNIT, left - j * UNIT);
#pragma GCC unroll 4
    for (int k = 0; k < TILE; k++) {
      const __m512 w = _mm512_set1_ps(weight[k * weight_stride + m]);
#pragma GCC unroll 4
      for (int j = 0; j < TILE; j++) sum[k][j] = _mm512_fmadd_ps(w, v[j], sum[k][j]);
    }
  }
  for (int k = 0; k < TILE; k++)
    for (int j = 0; j < TILE; j++) _mm512_storeu_ps(out + (k * TILE + j) * UNIT, sum[k][j]);
}

#ifdef __AVX512BF16__
// The same two entries at a time: their values are interleaved, and their weights are already adjacent. If the
// second is missing, its weight is 0 and the last one takes its place.
inline void weigh_tile(const BFloat16* weight, int64_t weight_stride, const BFloat16* value, int64_t value_stride,
                       int64_t last, int64_t left, float* out) {
  __m512 sum[TILE][TILE];
  for (auto& row : sum) std::fill_n(row, TILE, _mm512_setzero_ps());
  for (int64_t m = 0; m <= last; m += 2) {
    const BFloat16 *first = value + m * value_stride, *second = value + std::min(m + 1, last) * value_stride;
    __m512bh v[TILE];  // values 0-3, 8-11, 16-19, 24-27 of both; 4-7, 12-15 ...; the same from 32 on
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      const __m512i a = (__m512i)Numbers<BFloat16>::load(first + j * 32, left - j * 32);
      const __m512i b = (__m512i)Numbers<BFloat16>::load(second + j * 32, left - j * 32);
      v[2 * j] = (__m512bh)_mm512_unpacklo_epi16(a, b);
      v[2 * j + 1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
    }
#pragma GCC unroll 4
    for (int k = 0; k < TILE; k++) {
      int32_t pair;
      std::memcpy(&pair, weight + k * weight_stride + m, 4);
      const __m512bh w = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int j = 0; j < TILE; j++) sum[k][j] = _mm512_dpbf16_ps(sum[k][j], w, v[j]);
    }
  }
  const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
  for (int k = 0; k < TILE; k++)
    for (int j = 0; j < TILE; j += 2) {
      float* to = out + (k * TILE + j) * UNIT;
      _mm512_storeu_ps(to, _mm512_permutex2var_ps(sum[k][j], front, sum[k][j + 1]));
      _mm512_storeu_ps(to + UNIT, _mm512_permutex2var_ps(sum[k][j], back, sum[k][j + 1]));
    }
}
#endif

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
