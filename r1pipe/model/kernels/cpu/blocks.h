// Operands of matrix products from scattered rows: every matrix is a list of pointers to its rows, so that gathering
// costs nothing extra. Works on 32 bits at a time: a float, or two neighbours along the depth.
#pragma once

#include <stdexcept>
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
  if (bf16) {
    if constexpr (PAIRS)
      run.template operator()<BFloat16>();
    else
      throw std::invalid_argument("this processor does not multiply bfloat16");
  } else {
    run.template operator()<float>();
  }
}

template <typename T>
using Rows = std::vector<const T*>;

template <typename T>
inline Rows<T> rows_of(const T* data, int64_t stride, int64_t count) {
  Rows<T> rows(count);
  for (int64_t i = 0; i < count; i++) rows[i] = data + i * stride;
  return rows;
}

// The columns [c, c + 16) of row k.
inline Words together(const float* const* rows, int64_t k, int64_t c, Lanes lanes) {
  return load_words(rows[k] + c, lanes);
}

// The weight [outputs, depth] for in * weight^T.
template <typename T>
[[gnu::noinline]] Packed<T> pack_outputs(const T* const* rows, int64_t outputs, int64_t depth, T* to) {
  const int64_t words = depth / STEP<T>;
  for (int64_t first = 0; first < outputs; first += UNIT) {
    uint32_t* panel = reinterpret_cast<uint32_t*>(to + first / PANEL * PANEL * depth) + first % PANEL;
    for (int64_t d = 0; d < words; d += UNIT) {
      Words a[UNIT];
      for (int64_t i = 0; i < UNIT; i++) {
        const bool there = first + i < outputs;
        const Lanes lanes = there ? first_of(words - d) : NONE;
        a[i] = load_words(reinterpret_cast<const uint32_t*>(rows[there ? first + i : 0]) + d, lanes);
      }
      transpose(a);
      for (int64_t i = 0; i < std::min(UNIT, words - d); i++) store_words(panel + (d + i) * PANEL, a[i]);
    }
  }
  return {to, outputs, depth};
}

// The weight [depth, outputs] for in * weight.
template <typename T>
[[gnu::noinline]] Packed<T> pack_depth(const T* const* rows, int64_t depth, int64_t outputs, T* to) {
  for (int64_t first = 0; first < outputs; first += UNIT) {
    uint32_t* panel = reinterpret_cast<uint32_t*>(to + first / PANEL * PANEL * depth) + first % PANEL;
    const Lanes lanes = first_of(outputs - first);
    for (int64_t k = 0; k < depth / STEP<T>; k++) store_words(panel + k * PANEL, together(rows, k, first, lanes));
  }
  return {to, outputs, depth};
}

// to [width, count] = rows [count, width] from column `first` on, transposed.
template <typename T>
[[gnu::noinline]] void transposed(const T* const* rows, int64_t count, int64_t first, int64_t width, T* to) {
  const int64_t words = count / STEP<T>;
  for (int64_t c = 0; c < width; c += UNIT) {
    const Lanes lanes = first_of(width - c);
    for (int64_t k = 0; k < words; k += UNIT) {
      Words a[UNIT];
      for (int64_t i = 0; i < UNIT; i++) a[i] = k + i < words ? together(rows, k + i, first + c, lanes) : Words{};
      transpose(a);
      for (int64_t i = 0; i < std::min(UNIT, width - c); i++)
        store_words(reinterpret_cast<uint32_t*>(to + (c + i) * count) + k, a[i], first_of(words - k));
    }
  }
}

template <typename T>
inline void rounded(const float* x, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += UNIT) {
    const Lanes lanes = first_of(count - i);
    store(to + i, load(x + i, lanes), lanes);
  }
}

// As gemm.h's: e^x to 2 units in the last place; NaN stays NaN.
inline Floats exponential(Floats x) {
  x = smaller(broadcast(88.0f), larger(broadcast(-87.0f), x));
  const Floats n = nearest(x * broadcast(1.44269504f));
  Floats r = multiply_add(n, broadcast(-0.693359375f), x);
  r = multiply_add(n, broadcast(2.12194440e-4f), r);
  Floats p = broadcast(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = multiply_add(p, r, broadcast(c));
  p = multiply_add(p, r * r, r + broadcast(1.0f));
  return times_power(p, n);
}

inline Floats sigmoid(Floats x) {
  const Floats one = broadcast(1.0f);
  return one / (one + exponential(zeros() - x));
}

// to = x with its pairs rotated by (cosine, sine), or by the inverse
template <typename From, typename T>
inline void turn(const From* x, const float* rotation, int64_t width, bool back, T* to) {
  const Floats sign = broadcast(back ? -1.0f : 1.0f);
  for (int64_t i = 0; i < width; i += UNIT) {
    const Lanes lanes = first_of(width - i);
    const Floats by = load(rotation + i, lanes), pairs = load(x + i, lanes);
    store(to + i, turned(pairs, by, sign), lanes);
  }
}

}  // namespace r1pipe
