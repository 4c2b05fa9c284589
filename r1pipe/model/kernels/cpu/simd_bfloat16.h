// What simd.h's vocabulary has for bfloat16, where the processor multiplies it (AVX512_BF16): 16 numbers, widened
// and rounded, and 32 as pairs of neighbours, whose products are added to 16 floats.
#pragma once

namespace r1pipe {

constexpr bool PAIRS = true;

using Pairs = __m512bh;

inline Floats load(const BFloat16* x, Lanes lanes = ALL) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x)), 16));
}
inline void store(BFloat16* to, Floats x, Lanes lanes = ALL) {
  _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}

inline Pairs load_pairs(const BFloat16* x, int64_t left) {
  const __mmask32 lanes = left >= 32 ? 0xffffffff : left <= 0 ? 0 : (1u << left) - 1;
  return (Pairs)_mm512_maskz_loadu_epi16(lanes, x);
}
inline Floats multiply_add(Pairs a, Pairs b, Floats c) { return _mm512_dpbf16_ps(c, a, b); }
inline Pairs broadcast_pair(const BFloat16* x) {
  int32_t pair;
  std::memcpy(&pair, x, 4);
  return (Pairs)_mm512_set1_epi32(pair);
}

// a0 b0 a1 b1 ... of each 128-bit part's first, or last, four numbers
inline Pairs zip_first(Pairs a, Pairs b) { return (Pairs)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b); }
inline Pairs zip_last(Pairs a, Pairs b) { return (Pairs)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b); }

// to [32] = the 128-bit parts of a and b in turn, as `zip_first` and `zip_last` left them
inline void store_zipped(float* to, Floats a, Floats b) {
  const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(a, front, b));
  _mm512_storeu_ps(to + UNIT, _mm512_permutex2var_ps(a, back, b));
}

// The columns [c, c + 16) of the rows 2k and 2k + 1 with each column's two numbers adjacent.
inline Words together(const BFloat16* const* rows, int64_t k, int64_t c, Lanes lanes) {
  const Words low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, rows[2 * k] + c));
  const Words high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, rows[2 * k + 1] + c));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

}  // namespace r1pipe
