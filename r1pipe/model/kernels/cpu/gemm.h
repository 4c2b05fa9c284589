// Matrix products of small blocks of rows with packed weights, and the few element-wise functions that the kernels
// share.
//
// T is what products are computed in, float or BFloat16; sums are always float.
#pragma once

#include <cmath>
#include <cstdlib>

#include "simd.h"

namespace r1pipe {

constexpr int64_t PANEL = 64;  // adjacent outputs of a packed weight: see pack() in model/native.py

inline int64_t up_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The weight [outputs, depth] of a Linear as panels [outputs / 64][depth][64]; for BFloat16 two neighbours of the
// depth are adjacent, [outputs / 64][depth / 2][64][2].
template <typename T>
struct Packed {
  const T* data;
  int64_t outputs, depth;
  int64_t size() const { return up_to(outputs, PANEL) * depth; }
  Packed at(int64_t index) const { return {data + index * size(), outputs, depth}; }  // of a stack of weights
};

}  // namespace r1pipe

#ifdef __AVX512BW__
#include "brgemm.h"
#else
#include "microkernel.h"
#endif

namespace r1pipe {

// Construct it where a thread's share of work begins: at its end it releases the tile registers (AMX) for torch's own
// products.
struct Tiles {
  ~Tiles() { release_tiles(); }
};

// This thread's memory for one `Use`, a name: it grows and is kept between calls, since page faults cost more than the
// computation. Not initialised.
template <typename T, typename Use>
inline T* scratch(int64_t count) {
  struct Block {
    T* data = nullptr;
    int64_t size = 0;
    ~Block() { std::free(data); }
  };
  static thread_local Block block;
  if (block.size < count) {
    std::free(block.data);
    block.data = static_cast<T*>(std::aligned_alloc(64, up_to(count * sizeof(T), 64)));
    block.size = count;
  }
  return block.data;
}

inline float from(float x) { return x; }
inline float from(BFloat16 x) {
  uint32_t bits = uint32_t(x.x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline void put(float& to, float x) { to = x; }
inline void put(BFloat16& to, float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.x = uint16_t(x == x ? rounded : 0x7fc0);
}

template <typename T>
inline void widen(const T* x, int64_t count, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) out[i] = from(x[i]);
}

template <typename T>
inline void narrow(const float* x, int64_t count, float scale, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) put(out[i], x[i] * scale);
}

// e^x to 2 units in the last place, written so that compilers vectorise it; NaN stays NaN.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  float n = std::rint(x * 1.44269504f);
  float r = std::fma(n, -0.693359375f, x);
  r = std::fma(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p, r * r, r + 1.0f);
  int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// out = x / rms(x) * weight
template <typename T>
inline void rms_norm(const float* x, const float* weight, float eps, int64_t width, T* out) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; i++) squares += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(squares / width + eps);
#pragma omp simd
  for (int64_t i = 0; i < width; i++) put(out[i], x[i] * factor * weight[i]);
}

// inner [rows, width] = silu(gate) * up * scale[row] of gate_up [rows, 2 * width]; scale null: 1
template <typename T>
inline void swiglu(const float* gate_up, int64_t rows, int64_t width, const float* scale, T* inner) {
  for (int64_t row = 0; row < rows; row++) {
    const float *gate = gate_up + row * 2 * width, *up = gate + width;
    const float factor = scale ? scale[row] : 1.0f;
    T* to = inner + row * width;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) put(to[i], gate[i] * sigmoid(gate[i]) * up[i] * factor);
  }
}

}  // namespace r1pipe
