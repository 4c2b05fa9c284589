// Operands of matrix products from scattered rows: every matrix is a list of pointers to its rows, so that gathering
// costs nothing extra. Works on 32 bits at a time: a float, or two neighbours along the depth.
#pragma once

#include <vector>

#include "gemm.h"
#include "parallel.h"

namespace r1pipe {

// Numbers along the depth in 32 bits.
template <typename T>
constexpr int64_t STEP = 4 / sizeof(T);

// Calls `run` for the type of the caller's tensors.
template <typename Run>
inline void with_type(bool bf16, Run run) {
  if (bf16)
    run.template operator()<BFloat16>();
  else
    run.template operator()<float>();
}

template <typename T>
using Rows = std::vector<const T*>;

template <typename T>
inline Rows<T> rows_of(const T* data, int64_t stride, int64_t count) {
  Rows<T> rows(count);
  for (int64_t i = 0; i < count; i++) rows[i] = data + i * stride;
  return rows;
}

// The columns [c, c + 16) of row k, or of the rows 2k and 2k + 1 with each column's two numbers adjacent.
inline __m512i together(const float* const* rows, int64_t k, int64_t c, __mmask16 mask) {
  return _mm512_maskz_loadu_epi32(mask, rows[k] + c);
}
inline __m512i together(const BFloat16* const* rows, int64_t k, int64_t c, __mmask16 mask) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, rows[2 * k] + c));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, rows[2 * k + 1] + c));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Transposes 16 registers of 16 numbers.
inline void transpose(__m512i (&a)[UNIT]) {
  __m512i b[UNIT];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // now 128-bit part p of a[4q + i] is rows 4q..4q+3 of column 4p + i
    const __m512i low01 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), high01 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    const __m512i low23 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    const __m512i high23 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    b[i] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    b[8 + i] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    b[4 + i] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    b[12 + i] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
  std::copy(b, b + UNIT, a);
}

// The weight [outputs, depth] for in * weight^T.
template <typename T>
[[gnu::noinline]] Packed<T> pack_outputs(const T* const* rows, int64_t outputs, int64_t depth, T* to) {
  const int64_t words = depth / STEP<T>;
  for (int64_t first = 0; first < outputs; first += UNIT) {
    uint32_t* panel = reinterpret_cast<uint32_t*>(to + first / PANEL * PANEL * depth) + first % PANEL;
    for (int64_t d = 0; d < words; d += UNIT) {
      __m512i a[UNIT];
      for (int64_t i = 0; i < UNIT; i++) {
        const bool there = first + i < outputs;
        const __mmask16 mask = there ? first_of(words - d) : 0;
        a[i] = _mm512_maskz_loadu_epi32(mask, reinterpret_cast<const uint32_t*>(rows[there ? first + i : 0]) + d);
      }
      transpose(a);
      for (int64_t i = 0; i < std::min(UNIT, words - d); i++) _mm512_storeu_si512(panel + (d + i) * PANEL, a[i]);
    }
  }
  return {to, outputs, depth};
}

// The weight [depth, outputs] for in * weight.
template <typename T>
[[gnu::noinline]] Packed<T> pack_depth(const T* const* rows, int64_t depth, int64_t outputs, T* to) {
  for (int64_t first = 0; first < outputs; first += UNIT) {
    uint32_t* panel = reinterpret_cast<uint32_t*>(to + first / PANEL * PANEL * depth) + first % PANEL;
    const __mmask16 mask = first_of(outputs - first);
    for (int64_t k = 0; k < depth / STEP<T>; k++) _mm512_storeu_si512(panel + k * PANEL, together(rows, k, first, mask));
  }
  return {to, outputs, depth};
}

// to [width, count] = rows [count, width] from column `first` on, transposed.
template <typename T>
[[gnu::noinline]] void transposed(const T* const* rows, int64_t count, int64_t first, int64_t width, T* to) {
  const int64_t words = count / STEP<T>;
  for (int64_t c = 0; c < width; c += UNIT) {
    const __mmask16 mask = first_of(width - c);
    for (int64_t k = 0; k < words; k += UNIT) {
      __m512i a[UNIT];
      for (int64_t i = 0; i < UNIT; i++) a[i] = k + i < words ? together(rows, k + i, first + c, mask) : _mm512_setzero_si512();
      transpose(a);
      for (int64_t i = 0; i < std::min(UNIT, width - c); i++)
        _mm512_mask_storeu_epi32(reinterpret_cast<uint32_t*>(to + (c + i) * count) + k, first_of(words - k), a[i]);
    }
  }
}

// 16 numbers, widened and rounded; those outside the mask are read as 0 and not written.
inline __m512 load(const float* x, __mmask16 mask = 0xffff) { return _mm512_maskz_loadu_ps(mask, x); }
inline __m512 load(const BFloat16* x, __mmask16 mask = 0xffff) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}
inline void store(float* to, __m512 x, __mmask16 mask = 0xffff) { _mm512_mask_storeu_ps(to, mask, x); }
inline void store(BFloat16* to, __m512 x, __mmask16 mask = 0xffff) {
#ifdef __AVX512BF16__
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
#else  // compiled, but not called: r1pipe/model/kernels/build.py requires the instruction
  alignas(64) float from[UNIT];
  alignas(32) BFloat16 out[UNIT];
  _mm512_store_ps(from, x);
  for (int64_t i = 0; i < UNIT; i++) put(out[i], from[i]);
  _mm256_mask_storeu_epi16(to, mask, _mm256_load_si256(reinterpret_cast<const __m256i*>(out)));
#endif
}

template <typename T>
inline void rounded(const float* x, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += UNIT) store(to + i, load(x + i, first_of(count - i)), first_of(count - i));
}

// As gemm.h's: e^x to 2 units in the last place; NaN stays NaN.
inline __m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

inline __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// to = x with its pairs rotated by (cosine, sine), or by the inverse
template <typename From, typename T>
inline void turn(const From* x, const float* rotation, int64_t width, bool back, T* to) {
  const __m512 sign = _mm512_set1_ps(back ? -1.0f : 1.0f);
  for (int64_t i = 0; i < width; i += UNIT) {
    const __mmask16 mask = first_of(width - i);
    const __m512 by = load(rotation + i, mask), pairs = load(x + i, mask);
    const __m512 crossed = _mm512_mul_ps(_mm512_permute_ps(pairs, 0xb1), _mm512_mul_ps(_mm512_movehdup_ps(by), sign));
    store(to + i, _mm512_fmaddsub_ps(pairs, _mm512_moveldup_ps(by), crossed), mask);
  }
}

}  // namespace r1pipe
