// Attention of single tokens on latent cache entries, in AVX-512 registers: 4 heads by 4 entries at a time.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "gemm.h"

namespace r1pipe {

constexpr int64_t LANES = 16;  // floats of a register
constexpr int64_t AHEAD = 16;  // entries fetched before they are needed: the cache of many slots lies in main memory
constexpr int64_t TILE = 4;    // heads, entries and registers of a context that are worked on together

inline int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The sums of 16 registers, in their order.
inline __m512 sums(const __m512 (&in)[LANES]) {
  __m512 a[LANES];
  std::copy(in, in + LANES, a);
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

// 16 numbers from memory, widened; of the last ones only those under `mask`.
inline __m512 load(const float* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
inline __m512 load(const BFloat16* x, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}
inline __mmask16 mask_of(int64_t left) { return left >= LANES ? 0xffff : left <= 0 ? 0 : (1 << left) - 1; }

// A register of the numbers that a dot product takes at a time, and sum += the products of two.
struct Floats {
  static constexpr int64_t COUNT = 16;
  using Register = __m512;
  static Register load(const float* x, int64_t left) { return _mm512_maskz_loadu_ps(mask_of(left), x); }
  static __m512 add_products(__m512 sum, Register x, Register y) { return _mm512_fmadd_ps(x, y, sum); }
};
#ifdef __AVX512BF16__
struct BFloats {
  static constexpr int64_t COUNT = 32;
  using Register = __m512bh;
  static Register load(const BFloat16* x, int64_t left) {
    const __mmask32 mask = left >= COUNT ? 0xffffffff : (1u << left) - 1;
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, x);
  }
  static __m512 add_products(__m512 sum, Register x, Register y) { return _mm512_dpbf16_ps(sum, x, y); }
};
#endif

template <typename T>
using Dot = std::conditional_t<sizeof(T) == 2, BFloats, Floats>;

// Scores of TILE heads by TILE entries: out[head * TILE + entry]. Pointers may repeat.
template <typename Numbers, typename T>
inline void score_tile(const T* const (&query)[TILE], const T* const (&entry)[TILE], int64_t width, float* out) {
  __m512 sum[LANES];
  for (auto& one : sum) one = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += Numbers::COUNT) {
    typename Numbers::Register e[TILE];
#pragma GCC unroll 4
    for (int j = 0; j < TILE; j++) e[j] = Numbers::load(entry[j] + i, width - i);
#pragma GCC unroll 4
    for (int k = 0; k < TILE; k++) {
      const auto q = Numbers::load(query[k] + i, width - i);
#pragma GCC unroll 4
      for (int j = 0; j < TILE; j++) sum[k * TILE + j] = Numbers::add_products(sum[k * TILE + j], q, e[j]);
    }
  }
  _mm512_storeu_ps(out, sums(sum));
}

// w = softmax(w); NaN stays NaN.
inline void softmax(float* w, int64_t length) {
  float largest = w[0], total = 0.0f;
#pragma omp simd reduction(max : largest)
  for (int64_t m = 0; m < length; m++) largest = w[m] > largest ? w[m] : largest;
#pragma omp simd reduction(+ : total)
  for (int64_t m = 0; m < length; m++) {
    w[m] = exponential(w[m] - largest);
    total += w[m];
  }
  const float factor = 1.0f / total;
#pragma omp simd
  for (int64_t m = 0; m < length; m++) w[m] *= factor;
}

// out[head * LANES * TILE + i] = sum over entries of weight[head * stride + m] * value i, for TILE heads and 64 values
template <typename T>
inline void weigh_tile(const float* weight, int64_t weight_stride, const T* value, int64_t value_stride, int64_t length,
                       int64_t left, float* out) {
  __m512 sum[TILE][TILE];
  for (auto& row : sum) std::fill_n(row, TILE, _mm512_setzero_ps());
  __mmask16 mask[TILE];
  for (int j = 0; j < TILE; j++) mask[j] = mask_of(left - j * LANES);
  for (int64_t m = 0; m < length; m++) {
    __m512 v[TILE];
#pragma GCC unroll 4
    for (int j = 0; j < TILE; j++) v[j] = load(value + m * value_stride + j * LANES, mask[j]);
#pragma GCC unroll 4
    for (int k = 0; k < TILE; k++) {
      const __m512 w = _mm512_set1_ps(weight[k * weight_stride + m]);
#pragma GCC unroll 4
      for (int j = 0; j < TILE; j++) sum[k][j] = _mm512_fmadd_ps(w, v[j], sum[k][j]);
    }
  }
  for (int k = 0; k < TILE; k++)
    for (int j = 0; j < TILE; j++) _mm512_storeu_ps(out + (k * TILE + j) * LANES, sum[k][j]);
}

// context [heads, latent] = softmax(queries [heads, width] . entry) . latent, over entries [length, width] whose first
// `latent` numbers are the values.
template <typename T>
void attend(const T* queries, int64_t heads, const T* entries, int64_t stride, int64_t length, int64_t width,
            int64_t latent, T* context) {
  const int64_t M = rounded_up(length, TILE);
  static thread_local Buffer<float> buffer;
  float* weights = buffer.of(TILE * M);
  float tile[LANES * TILE * TILE];
  for (int64_t h = 0; h < heads; h += TILE) {
    const int64_t some = std::min(TILE, heads - h);  // heads of this tile: the last one stands in for what lacks
    const T* query[TILE];
    for (int64_t k = 0; k < TILE; k++) query[k] = queries + (h + std::min(k, some - 1)) * width;
    for (int64_t m = 0; m < length; m += TILE) {
      const T* entry[TILE];
      for (int64_t j = 0; j < TILE; j++) entry[j] = entries + std::min(m + j, length - 1) * stride;
      const T* ahead = entries + (m + AHEAD) * stride;  // may lie beyond the cache: a prefetch cannot fail
      for (int64_t i = 0; i < TILE * stride; i += 64 / int64_t(sizeof(T))) _mm_prefetch(ahead + i, _MM_HINT_T0);
      score_tile<Dot<T>>(query, entry, width, tile);
      for (int64_t k = 0; k < TILE; k++) std::copy_n(tile + k * TILE, TILE, &weights[k * M + m]);
    }
    for (int64_t k = 0; k < TILE; k++) softmax(&weights[k * M], length);
    for (int64_t c = 0; c < latent; c += LANES * TILE) {
      weigh_tile(weights, M, entries + c, stride, length, latent - c, tile);
      for (int64_t k = 0; k < some; k++)
        for (int64_t i = 0; i < std::min(LANES * TILE, latent - c); i++)
          put(context[(h + k) * latent + c + i], tile[k * LANES * TILE + i]);
    }
  }
}

}  // namespace r1pipe
