// The products of bfloat16 entries: two neighbours at once in scores, and in contexts two entries at once.
#pragma once

namespace r1pipe {

template <>
struct Numbers<BFloat16> {
  using Register = Pairs;
  static constexpr int64_t COUNT = 32;
  static constexpr int64_t ENTRIES = 2;

  static Register load(const BFloat16* x, int64_t left) { return load_pairs(x, left); }

  // The values of two entries are interleaved: 0-3, 8-11, 16-19, 24-27 of both; 4-7, 12-15 ...; the same from 32 on.
  // Their weights are already adjacent. If the second is missing, its weight is 0 and the last one takes its place.
  static void values(const BFloat16* value, int64_t stride, int64_t m, int64_t last, int64_t left,
                     Register (&v)[HELD]) {
    const BFloat16 *first = value + m * stride, *second = value + std::min(m + 1, last) * stride;
#pragma GCC unroll 2
    for (int j = 0; j < HELD / 2; j++) {
      const Pairs a = load(first + j * COUNT, left - j * COUNT), b = load(second + j * COUNT, left - j * COUNT);
      v[2 * j] = zip_first(a, b);
      v[2 * j + 1] = zip_last(a, b);
    }
  }
  static Register weight(const BFloat16* w) { return broadcast_pair(w); }
  static void store(float* out, const Floats (&sum)[HELD]) {
    for (int j = 0; j < HELD; j += 2) store_zipped(out + j * UNIT, sum[j], sum[j + 1]);
  }
};

}  // namespace r1pipe
