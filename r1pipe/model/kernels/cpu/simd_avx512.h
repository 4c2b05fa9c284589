// simd.h's vocabulary in AVX-512: one register of 512 bits.
#pragma once

namespace r1pipe {

using Floats = __m512;
using Words = __m512i;
using Lanes = __mmask16;
using Mask = __mmask16;

constexpr Lanes ALL = 0xffff, NONE = 0;
constexpr int64_t HELD = 4;

inline Lanes first_of(int64_t left) { return left >= UNIT ? 0xffff : left <= 0 ? 0 : (1 << left) - 1; }

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats broadcast(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* x, Lanes lanes = ALL) { return _mm512_maskz_loadu_ps(lanes, x); }
inline void store(float* to, Floats x, Lanes lanes = ALL) { _mm512_mask_storeu_ps(to, lanes, x); }

inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, 0); }
inline Floats times_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }  // x * 2^n, for whole n of floats
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }

inline Mask bits(uint64_t lowest) { return lowest; }
inline Mask differ(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }  // also where one is NaN
inline Floats where(Mask mask, Floats x) { return _mm512_maskz_mov_ps(mask, x); }         // elsewhere 0
inline Floats where(Mask mask, Floats x, Floats otherwise) { return _mm512_mask_mov_ps(otherwise, mask, x); }

// One bit for each of the `left` bytes, at most 64, that is not 0.
inline uint64_t nonzero(const uint8_t* bytes, int64_t left) {
  const __mmask64 there = left == 64 ? ~0ull : (1ull << left) - 1;
  const __m512i all = _mm512_maskz_loadu_epi8(there, bytes);
  return _mm512_test_epi8_mask(all, all);
}

// Pairs of numbers as complex ones: x turned by (cosine, sine) pairs, or with sign -1 back.
inline Floats turned(Floats x, Floats by, Floats sign) {
  const Floats crossed = _mm512_permute_ps(x, 0xb1) * (_mm512_movehdup_ps(by) * sign);
  return _mm512_fmaddsub_ps(x, _mm512_moveldup_ps(by), crossed);
}

inline Words load_words(const void* x, Lanes lanes) { return _mm512_maskz_loadu_epi32(lanes, x); }
inline void store_words(void* to, Words x) { _mm512_storeu_si512(to, x); }
inline void store_words(void* to, Words x, Lanes lanes) { _mm512_mask_storeu_epi32(to, lanes, x); }

// Transposes 16 registers of 16 words.
inline void transpose(Words (&a)[UNIT]) {
  Words b[UNIT];
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
    const Words low01 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), high01 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    const Words low23 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    const Words high23 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    b[i] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    b[8 + i] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    b[4 + i] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    b[12 + i] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
  std::copy(b, b + UNIT, a);
}

// The sums of 16 registers, in their order.
inline Floats sums_of(const Floats (&in)[UNIT]) {
  Floats a[UNIT];
  std::copy(in, in + UNIT, a);
  for (int i = 0; i < 8; i++)
    a[i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]) + _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  for (int i = 0; i < 4; i++) {
    const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(a[2 * i]), _mm512_castps_pd(a[2 * i + 1]));
    const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(a[2 * i]), _mm512_castps_pd(a[2 * i + 1]));
    a[i] = _mm512_castpd_ps(lo) + _mm512_castpd_ps(hi);
  }
  // now each 128-bit part of a[i] holds partial sums of inputs 4i..4i+3
  const Floats b0 = _mm512_shuffle_f32x4(a[0], a[1], 0x88) + _mm512_shuffle_f32x4(a[0], a[1], 0xdd);
  const Floats b1 = _mm512_shuffle_f32x4(a[2], a[3], 0x88) + _mm512_shuffle_f32x4(a[2], a[3], 0xdd);
  return _mm512_shuffle_f32x4(b0, b1, 0x88) + _mm512_shuffle_f32x4(b0, b1, 0xdd);
}

// Four numbers each to out, out + stride, ...
inline void store_fours(float* out, int64_t stride, Floats x) {
  _mm_storeu_ps(out, _mm512_extractf32x4_ps(x, 0));
  _mm_storeu_ps(out + stride, _mm512_extractf32x4_ps(x, 1));
  _mm_storeu_ps(out + 2 * stride, _mm512_extractf32x4_ps(x, 2));
  _mm_storeu_ps(out + 3 * stride, _mm512_extractf32x4_ps(x, 3));
}

}  // namespace r1pipe
