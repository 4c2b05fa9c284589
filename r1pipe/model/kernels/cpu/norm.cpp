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
    Floats squares = zeros();
    for (int64_t d = 0; d < width; d += UNIT) {
      const Lanes lanes = first_of(width - d);
      const Floats v = load(row + d, lanes);
      squares = multiply_add(v, v, squares);
    }
    factors[i] = 1.0f / std::sqrt(sum_of(squares) / width + eps);
    const Floats factor = broadcast(factors[i]);
    for (int64_t d = 0; d < width; d += UNIT) {
      const Lanes lanes = first_of(width - d);
      store(out + i * width + d, load(row + d, lanes) * factor * load(weight + d, lanes), lanes);
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
      Floats product = zeros();
      for (int64_t k = 0; k < width; k += UNIT) {
        const Lanes lanes = first_of(width - k);
        const Floats g = load(d + k, lanes) * load(weight + k, lanes);
        product = multiply_add(g, load(row + k, lanes), product);
      }
      const Floats factor = broadcast(factors[i]);
      const Floats along = broadcast(sum_of(product) * factors[i] * factors[i] / width);
      for (int64_t k = 0; k < width; k += UNIT) {
        const Lanes lanes = first_of(width - k);
        const Floats v = load(row + k, lanes), g = load(d + k, lanes) * factor;
        store(own + k, multiply_add(g, v, load(own + k, lanes)), lanes);
        store(d_x + i * width + k, multiply_subtract(g, load(weight + k, lanes), v * along * factor), lanes);
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
