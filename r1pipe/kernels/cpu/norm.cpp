// RMSNorm over the last axis and rotary positions, forward and backward. Rows may lie apart.

#include "blocks.h"

namespace {

using namespace r1pipe;

constexpr int64_t CHUNK = 128;  // rows whose part of the weight's gradient is summed at once: the order is fixed

template <typename T>
void norm_forward(int64_t rows, int64_t width, int64_t stride, float eps, const T* x, const T* weight, T* out,
                  float* factors) {
#pragma omp parallel for
  for (int64_t i = 0; i < rows; i++) {
    const T* row = x + i * stride;
    T* to = out + i * width;
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < width; d++) squares += from(row[d]) * from(row[d]);
    const float factor = factors[i] = 1.0f / std::sqrt(squares / width + eps);
#pragma omp simd
    for (int64_t d = 0; d < width; d++) put(to[d], from(row[d]) * factor * from(weight[d]));
  }
}

template <typename T>
void norm_backward(int64_t rows, int64_t width, int64_t stride, const T* x, const T* weight, const float* factors,
                   const T* d_out, T* d_x, T* d_weight) {
  const int64_t chunks = (rows + CHUNK - 1) / CHUNK;
  float* sums = scratch<float, struct NormSums>(chunks * width);
#pragma omp parallel for
  for (int64_t c = 0; c < chunks; c++) {
    float* own = sums + c * width;
    std::fill_n(own, width, 0.0f);
    for (int64_t i = c * CHUNK; i < std::min(rows, (c + 1) * CHUNK); i++) {
      const T *row = x + i * stride, *d = d_out + i * width;
      T* to = d_x + i * width;
      const float factor = factors[i];
      float product = 0.0f;
#pragma omp simd reduction(+ : product)
      for (int64_t k = 0; k < width; k++) product += from(d[k]) * from(weight[k]) * from(row[k]);
      product *= factor * factor / width;
#pragma omp simd
      for (int64_t k = 0; k < width; k++) {
        const float g = from(d[k]), v = from(row[k]);
        own[k] += g * v * factor;
        put(to[k], factor * (g * from(weight[k]) - v * product));
      }
    }
  }
  for (int64_t k = 0; k < width; k++) {
    float sum = 0.0f;
    for (int64_t c = 0; c < chunks; c++) sum += sums[c * width + k];
    put(d_weight[k], sum);
  }
}

}  // namespace

extern "C" void norm_forward(int64_t bf16, int64_t rows, int64_t width, int64_t stride, float eps, const void* x,
                             const void* weight, void* out, float* factors) {
  with_type(bf16, [&]<typename T>() {
    norm_forward(rows, width, stride, eps, static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(out),
                 factors);
  });
}

extern "C" void norm_backward(int64_t bf16, int64_t rows, int64_t width, int64_t stride, const void* x,
                              const void* weight, const float* factors, const void* d_out, void* d_x, void* d_weight) {
  with_type(bf16, [&]<typename T>() {
    norm_backward(rows, width, stride, static_cast<const T*>(x), static_cast<const T*>(weight), factors,
                  static_cast<const T*>(d_out), static_cast<T*>(d_x), static_cast<T*>(d_weight));
  });
}

extern "C" void rotate(int64_t bf16, int64_t rows, int64_t width, int64_t stride, int64_t period, int64_t back,
                       const void* x, const float* rotation, void* out) {
  with_type(bf16, [&]<typename T>() {
#pragma omp parallel for
    for (int64_t i = 0; i < rows; i++)
      turn(static_cast<const T*>(x) + i * stride, rotation + i % period * width, width, back, static_cast<T*>(out) + i * width);
  });
}
