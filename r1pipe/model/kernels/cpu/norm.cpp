// RMSNorm over the last axis and rotary positions, forward and backward. Rows need not be adjacent.

#include "blocks.h"

namespace {

using namespace r1pipe;

constexpr int64_t CHUNK = 128;  // rows whose part of the weight's gradient is summed at once, in a fixed order

template <typename Work>
void by_row(int64_t rows, const Work& work) {
  share_rows(rows, CHUNK, [&](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; i++) work(i);
  });
}

template <typename T>
void norm_forward(int64_t rows, int64_t width, int64_t stride, float eps, const T* x, const T* weight, T* out,
                  float* factors) {
  by_row(rows, [&](int64_t i) {
    const T* row = x + i * stride;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t d = 0; d < width; d += UNIT) {
      const __m512 v = load(row + d, first_of(width - d));
      squares = _mm512_fmadd_ps(v, v, squares);
    }
    factors[i] = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps);
    const __m512 factor = _mm512_set1_ps(factors[i]);
    for (int64_t d = 0; d < width; d += UNIT) {
      const __mmask16 mask = first_of(width - d);
      store(out + i * width + d, _mm512_mul_ps(_mm512_mul_ps(load(row + d, mask), factor), load(weight + d, mask)), mask);
    }
  });
}

template <typename T>
void norm_backward(int64_t rows, int64_t width, int64_t stride, const T* x, const T* weight, const float* factors,
                   const T* d_out, T* d_x, T* d_weight) {
  const int64_t chunks = (rows + CHUNK - 1) / CHUNK;
  float* sums = scratch<float, struct NormSums>(chunks * width);
  share(chunks, [&](int64_t c) {
    float* own = sums + c * width;
    std::fill_n(own, width, 0.0f);
    for (int64_t i = c * CHUNK; i < std::min(rows, (c + 1) * CHUNK); i++) {
      const T *row = x + i * stride, *d = d_out + i * width;
      __m512 product = _mm512_setzero_ps();
      for (int64_t k = 0; k < width; k += UNIT) {
        const __mmask16 mask = first_of(width - k);
        const __m512 g = _mm512_mul_ps(load(d + k, mask), load(weight + k, mask));
        product = _mm512_fmadd_ps(g, load(row + k, mask), product);
      }
      const __m512 factor = _mm512_set1_ps(factors[i]);
      const __m512 along = _mm512_set1_ps(_mm512_reduce_add_ps(product) * factors[i] * factors[i] / width);
      for (int64_t k = 0; k < width; k += UNIT) {
        const __mmask16 mask = first_of(width - k);
        const __m512 v = load(row + k, mask), g = _mm512_mul_ps(load(d + k, mask), factor);
        store(own + k, _mm512_fmadd_ps(g, v, load(own + k, mask)), mask);
        const __m512 across = _mm512_mul_ps(_mm512_mul_ps(v, along), factor);
        store(d_x + i * width + k, _mm512_fmsub_ps(g, load(weight + k, mask), across), mask);
      }
    }
  });
  for (int64_t k = 0; k < width; k++) {
    float sum = 0.0f;
    for (int64_t c = 0; c < chunks; c++) sum += sums[c * width + k];
    put(d_weight[k], sum);
  }
}

}  // namespace

extern "C" void r1pipe_norm_forward(int64_t bf16, int64_t rows, int64_t width, int64_t stride, float eps, const void* x,
                             const void* weight, void* out, float* factors) {
  with_type(bf16, [&]<typename T>() {
    norm_forward(rows, width, stride, eps, static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(out),
                 factors);
  });
}

extern "C" void r1pipe_norm_backward(int64_t bf16, int64_t rows, int64_t width, int64_t stride, const void* x,
                              const void* weight, const float* factors, const void* d_out, void* d_x, void* d_weight) {
  with_type(bf16, [&]<typename T>() {
    norm_backward(rows, width, stride, static_cast<const T*>(x), static_cast<const T*>(weight), factors,
                  static_cast<const T*>(d_out), static_cast<T*>(d_x), static_cast<T*>(d_weight));
  });
}

extern "C" void r1pipe_rotate(int64_t bf16, int64_t rows, int64_t width, int64_t stride, int64_t period, int64_t back,
                       const void* x, const float* rotation, void* out) {
  with_type(bf16, [&]<typename T>() {
    by_row(rows, [&](int64_t i) {
      turn(static_cast<const T*>(x) + i * stride, rotation + i % period * width, width, back, static_cast<T*>(out) + i * width);
    });
  });
}
