// simd.h's vocabulary in AVX2 with FMA: two registers of 256 bits.
#pragma once

namespace r1pipe {

struct Floats {
  __m256 low, high;
};
struct Words {
  __m256i low, high;
};
struct Lanes {
  int64_t left = 0;  // 16 or more: all
};
struct Mask {
  __m256i low, high;
};

constexpr Lanes ALL{UNIT}, NONE{0};
constexpr int64_t HELD = 2;

inline Lanes first_of(int64_t left) { return {left}; }
inline Mask mask_of(Lanes lanes) {
  static constexpr int32_t ON_OFF[2 * UNIT] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  const auto* at = reinterpret_cast<const __m256i*>(ON_OFF + UNIT - std::clamp<int64_t>(lanes.left, 0, UNIT));
  return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}

inline Floats operator+(Floats a, Floats b) { return {a.low + b.low, a.high + b.high}; }
inline Floats operator-(Floats a, Floats b) { return {a.low - b.low, a.high - b.high}; }
inline Floats operator*(Floats a, Floats b) { return {a.low * b.low, a.high * b.high}; }
inline Floats operator/(Floats a, Floats b) { return {a.low / b.low, a.high / b.high}; }

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

inline Floats load(const float* x, Lanes lanes = ALL) {
  if (lanes.left >= UNIT) return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)};
  const Mask mask = mask_of(lanes);
  return {_mm256_maskload_ps(x, mask.low), _mm256_maskload_ps(x + 8, mask.high)};
}
inline void store(float* to, Floats x, Lanes lanes = ALL) {
  if (lanes.left >= UNIT) {
    _mm256_storeu_ps(to, x.low);
    _mm256_storeu_ps(to + 8, x.high);
    return;
  }
  const Mask mask = mask_of(lanes);
  _mm256_maskstore_ps(to, mask.low, x.low);
  _mm256_maskstore_ps(to + 8, mask.high, x.high);
}

inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats multiply_subtract(Floats a, Floats b, Floats c) {
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Floats smaller(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Floats larger(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats nearest(Floats x) { return {_mm256_round_ps(x.low, 0), _mm256_round_ps(x.high, 0)}; }

// x * 2^n, for whole n from -126 to 127
inline __m256 times_power(__m256 x, __m256 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return x * _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline Floats times_power(Floats x, Floats n) { return {times_power(x.low, n.low), times_power(x.high, n.high)}; }

inline float sum_of(Floats x) {
  const __m256 eight = x.low + x.high;
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return two[0] + two[1];
}
inline float largest_of(Floats x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return std::max(two[0], two[1]);
}

inline Mask bits(uint64_t lowest) {
  const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), high = _mm256_slli_epi32(low, 8);
  const __m256i all = _mm256_set1_epi32(int32_t(lowest));
  return {_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low), _mm256_cmpeq_epi32(_mm256_and_si256(all, high), high)};
}
inline Mask differ(Floats a, Floats b) {  // also where one is NaN
  return {_mm256_castps_si256(_mm256_cmp_ps(a.low, b.low, _CMP_NEQ_UQ)),
          _mm256_castps_si256(_mm256_cmp_ps(a.high, b.high, _CMP_NEQ_UQ))};
}
inline Floats where(Mask mask, Floats x) {  // elsewhere 0
  return {_mm256_and_ps(_mm256_castsi256_ps(mask.low), x.low), _mm256_and_ps(_mm256_castsi256_ps(mask.high), x.high)};
}
inline Floats where(Mask mask, Floats x, Floats otherwise) {
  return {_mm256_blendv_ps(otherwise.low, x.low, _mm256_castsi256_ps(mask.low)),
          _mm256_blendv_ps(otherwise.high, x.high, _mm256_castsi256_ps(mask.high))};
}

// One bit for each of the `left` bytes, at most 64, that is not 0.
inline uint64_t nonzero(const uint8_t* bytes, int64_t left) {
  alignas(32) uint8_t all[64] = {};
  std::memcpy(all, bytes, left);
  const auto zero = [&](int at) {
    const __m256i some = _mm256_load_si256(reinterpret_cast<const __m256i*>(all + at));
    return uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(some, _mm256_setzero_si256())));
  };
  return ~(uint64_t(zero(32)) << 32 | zero(0));
}

// Pairs of numbers as complex ones: x turned by (cosine, sine) pairs, or with sign -1 back.
inline __m256 turned(__m256 x, __m256 by, __m256 sign) {
  const __m256 crossed = _mm256_permute_ps(x, 0xb1) * (_mm256_movehdup_ps(by) * sign);
  return _mm256_fmaddsub_ps(x, _mm256_moveldup_ps(by), crossed);
}
inline Floats turned(Floats x, Floats by, Floats sign) {
  return {turned(x.low, by.low, sign.low), turned(x.high, by.high, sign.high)};
}

inline Words load_words(const void* x, Lanes lanes) {
  const Floats same = load(static_cast<const float*>(x), lanes);
  return {_mm256_castps_si256(same.low), _mm256_castps_si256(same.high)};
}
inline void store_words(void* to, Words x, Lanes lanes = ALL) {
  store(static_cast<float*>(to), {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}, lanes);
}

// Transposes 8 registers of 8 words.
inline void transpose(__m256i (&a)[8]) {
  __m256i b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // now 128-bit part p of a[4q + i] is rows 4q..4q+3 of column 4p + i
    b[i] = _mm256_permute2x128_si256(a[i], a[4 + i], 0x20);
    b[4 + i] = _mm256_permute2x128_si256(a[i], a[4 + i], 0x31);
  }
  std::copy(b, b + 8, a);
}

// Transposes 16 registers of 16 words, as four squares of 8 x 8.
inline void transpose(Words (&a)[UNIT]) {
  __m256i top_left[8], top_right[8], bottom_left[8], bottom_right[8];
  for (int i = 0; i < 8; i++) {
    top_left[i] = a[i].low;
    top_right[i] = a[i].high;
    bottom_left[i] = a[8 + i].low;
    bottom_right[i] = a[8 + i].high;
  }
  for (auto* square : {&top_left, &top_right, &bottom_left, &bottom_right}) transpose(*square);
  for (int i = 0; i < 8; i++) {
    a[i] = {top_left[i], bottom_left[i]};
    a[8 + i] = {top_right[i], bottom_right[i]};
  }
}

// Of 4 registers a partial sum of each in every 128-bit part, in their order.
inline __m256 sums_of_four(const Floats* in) {
  __m256 a[4];
  for (int i = 0; i < 4; i++) a[i] = in[i].low + in[i].high;
  const __m256 first = _mm256_unpacklo_ps(a[0], a[1]) + _mm256_unpackhi_ps(a[0], a[1]);
  const __m256 last = _mm256_unpacklo_ps(a[2], a[3]) + _mm256_unpackhi_ps(a[2], a[3]);
  return _mm256_shuffle_ps(first, last, 0x44) + _mm256_shuffle_ps(first, last, 0xee);
}

// The sums of 16 registers, in their order.
inline Floats sums_of(const Floats (&in)[UNIT]) {
  const auto eight = [&](int at) {
    const __m256 a = sums_of_four(in + at), b = sums_of_four(in + at + 4);
    return _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
  };
  return {eight(0), eight(8)};
}

// Four numbers each to out, out + stride, ...
inline void store_fours(float* out, int64_t stride, Floats x) {
  _mm_storeu_ps(out, _mm256_castps256_ps128(x.low));
  _mm_storeu_ps(out + stride, _mm256_extractf128_ps(x.low, 1));
  _mm_storeu_ps(out + 2 * stride, _mm256_castps256_ps128(x.high));
  _mm_storeu_ps(out + 3 * stride, _mm256_extractf128_ps(x.high, 1));
}

}  // namespace r1pipe
