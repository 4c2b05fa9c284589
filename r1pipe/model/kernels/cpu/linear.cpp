// A Linear without bias and the log-probabilities of tokens under a head, forward and backward.

#include "products.h"

namespace {

using namespace r1pipe;

template <typename T>
void linear_backward_weights(int64_t rows, int64_t width, int64_t outputs, int64_t stride, const T* x, const T* d_out, T* d_weight) {
  const int64_t parts = std::min<int64_t>(omp_get_max_threads(), outputs);
  share(parts, [&](int64_t p) {
    const Tiles tiles;
    const Part part = part_of(outputs, p, parts);
    float* sums = scratch<float, struct LinearSums>(part.count * width);
    weight_gradient<T>({0, rows}, part, width, apart(d_out, outputs), apart(x, stride), false, sums);
    rounded(sums, part.count * width, d_weight + part.first * width);
  });
}

// The log-probability of `target` under softmax(row), and log(sum(exp(row))). Never inlined: sampler and trainer must
// add in the same order.
[[gnu::noinline]] float logprob(const float* row, int64_t vocabulary, int64_t target, float* logsum) {
  float largest = row[0], sum = 0.0f;
#pragma omp simd reduction(max : largest)
  for (int64_t v = 0; v < vocabulary; v++) largest = row[v] > largest ? row[v] : largest;
#pragma omp simd reduction(+ : sum)
  for (int64_t v = 0; v < vocabulary; v++) sum += exponential(row[v] - largest);
  *logsum = largest + std::log(sum);
  return row[target] - largest - std::log(sum);
}

template <typename T>
struct Head {
  int64_t rows, width, vocabulary;
  float temperature;
  const T *x, *weight;
  const int64_t* targets_N;

  Packed<T> packed() const {
    T* panels = scratch<T, struct HeadPanels>(up_to(vocabulary, PANEL) * width);
    return pack_outputs(rows_of(weight, width, vocabulary).data(), vocabulary, width, panels);
  }

  // logits [64, vocabulary] of a block of rows
  float* logits(const RowBlock<T>& block, const Packed<T>& head) const {
    float* logits = scratch<float, struct Logits>(BLOCK * vocabulary);
    multiply(block.data, block.stride, block.filled, head, logits, vocabulary);
    if (temperature != 1.0f)
      for (int64_t i = 0; i < block.count * vocabulary; i++) logits[i] /= temperature;
    return logits;
  }

  // The logits themselves, [rows, vocabulary], divided by the temperature.
  void all_logits(float* logits_NV) const {
    const Packed<T> head = packed();
    share_rows(rows, BLOCK, [&](int64_t first, int64_t) {
      const Tiles tiles;
      const RowBlock<T> block(x, rows, width, width, first);
      std::copy_n(logits(block, head), block.count * vocabulary, logits_NV + first * vocabulary);
    });
  }

  void forward(float* logprobs_N, float* logsums_N) const {
    const Packed<T> head = packed();
    share_rows(rows, BLOCK, [&](int64_t first, int64_t) {
      const Tiles tiles;
      const RowBlock<T> block(x, rows, width, width, first);
      const float* all = logits(block, head);
      for (int64_t i = 0; i < block.count; i++) {
        const int64_t n = first + i;
        logprobs_N[n] = logprob(all + i * vocabulary, vocabulary, targets_N[n], logsums_N + n);
      }
    });
  }

  // d_logits [chunk, vocabulary] is memory for the logits' gradients of `chunk` rows at once.
  void backward(const float* logsums_N, const float* d_logprobs_N, int64_t chunk, T* d_logits, T* d_x, T* d_weight) const {
    const Packed<T> head = packed();
    T* panels = scratch<T, struct HeadPanelsBack>(up_to(width, PANEL) * vocabulary);
    const Packed<T> back = pack_depth(rows_of(weight, width, vocabulary).data(), vocabulary, width, panels);
    float* sums = scratch<float, struct HeadSums>(vocabulary * width);
    for (int64_t begin = 0; begin < rows; begin += chunk) {
      const int64_t count = std::min(chunk, rows - begin);
      share_rows(count, BLOCK, [&](int64_t first, int64_t) {
        const Tiles tiles;
        const RowBlock<T> block(x + begin * width, count, width, width, first);
        const float* all = logits(block, head);
        for (int64_t i = 0; i < block.count; i++) {
          const int64_t n = begin + first + i;
          gradient(all + i * vocabulary, targets_N[n], logsums_N[n], d_logprobs_N[n], d_logits + (first + i) * vocabulary);
        }
      });
      product(d_logits, count, vocabulary, back, d_x + begin * width);
      const int64_t parts = std::min<int64_t>(omp_get_max_threads(), vocabulary);
      share(parts, [&](int64_t p) {
        const Tiles tiles;
        const Part part = part_of(vocabulary, p, parts);
        weight_gradient<T>({0, count}, part, width, apart(d_logits, vocabulary), apart(x + begin * width, width), begin > 0,
                           sums + part.first * width);
      });
    }
    rounded(sums, vocabulary * width, d_weight);
  }

  void gradient(const float* logits, int64_t target, float logsum, float d_logprob, T* to) const {
    const float factor = d_logprob / temperature;
    const Floats by = broadcast(-factor), apart = broadcast(logsum);
    for (int64_t v = 0; v < vocabulary; v += UNIT) {
      const Lanes lanes = first_of(vocabulary - v);
      store(to + v, exponential(load(logits + v, lanes) - apart) * by, lanes);
    }
    put(to[target], factor - factor * exponential(logits[target] - logsum));
  }
};

template <typename T>
Head<T> head_of(int64_t rows, int64_t width, int64_t vocabulary, float temperature, const void* x, const void* weight,
                const int64_t* targets_N) {
  return {rows, width, vocabulary, temperature, static_cast<const T*>(x), static_cast<const T*>(weight), targets_N};
}

}  // namespace

extern "C" void r1pipe_linear_forward(int64_t bf16, int64_t rows, int64_t width, int64_t outputs, int64_t stride, const void* x,
                               const void* weight, void* out) {
  with_type(bf16, [&]<typename T>() {
    T* panels = scratch<T, struct LinearPanels>(up_to(outputs, PANEL) * width);
    const Rows<T> pointers = rows_of(static_cast<const T*>(weight), width, outputs);
    product(static_cast<const T*>(x), rows, stride, pack_outputs(pointers.data(), outputs, width, panels), static_cast<T*>(out));
  });
}

extern "C" void r1pipe_linear_backward_inputs(int64_t bf16, int64_t rows, int64_t width, int64_t outputs, const void* weight,
                                       const void* d_out, void* d_x) {
  with_type(bf16, [&]<typename T>() {
    T* panels = scratch<T, struct LinearPanels>(up_to(width, PANEL) * outputs);
    const Rows<T> pointers = rows_of(static_cast<const T*>(weight), width, outputs);
    product(static_cast<const T*>(d_out), rows, outputs, pack_depth(pointers.data(), outputs, width, panels), static_cast<T*>(d_x));
  });
}

extern "C" void r1pipe_linear_backward_weights(int64_t bf16, int64_t rows, int64_t width, int64_t outputs, int64_t stride,
                                        const void* x, const void* d_out, void* d_weight) {
  with_type(bf16, [&]<typename T>() {
    linear_backward_weights(rows, width, outputs, stride, static_cast<const T*>(x), static_cast<const T*>(d_out),
                            static_cast<T*>(d_weight));
  });
}

extern "C" void r1pipe_logprobs_forward(int64_t bf16, int64_t rows, int64_t width, int64_t vocabulary, float temperature,
                                 const void* x, const void* weight, const int64_t* targets_N, float* logprobs_N,
                                 float* logsums_N) {
  with_type(bf16, [&]<typename T>() {
    head_of<T>(rows, width, vocabulary, temperature, x, weight, targets_N).forward(logprobs_N, logsums_N);
  });
}

extern "C" void r1pipe_logits_forward(int64_t bf16, int64_t rows, int64_t width, int64_t vocabulary, float temperature,
                               const void* x, const void* weight, float* logits_NV) {
  with_type(bf16, [&]<typename T>() { head_of<T>(rows, width, vocabulary, temperature, x, weight, nullptr).all_logits(logits_NV); });
}

extern "C" void r1pipe_logprobs_of_logits(int64_t, int64_t rows, int64_t vocabulary, const float* logits_NV,
                                   const int64_t* targets_N, float* logprobs_N) {
  share_rows(rows, UNIT, [&](int64_t first, int64_t count) {
    float logsum;
    for (int64_t n = first; n < first + count; n++)
      logprobs_N[n] = logprob(logits_NV + n * vocabulary, vocabulary, targets_N[n], &logsum);
  });
}

extern "C" void r1pipe_logprobs_backward(int64_t bf16, int64_t rows, int64_t width, int64_t vocabulary, float temperature,
                                  const void* x, const void* weight, const int64_t* targets_N, const float* logsums_N,
                                  const float* d_logprobs_N, int64_t chunk, void* d_logits, void* d_x, void* d_weight) {
  with_type(bf16, [&]<typename T>() {
    head_of<T>(rows, width, vocabulary, temperature, x, weight, targets_N)
        .backward(logsums_N, d_logprobs_N, chunk, static_cast<T*>(d_logits), static_cast<T*>(d_x), static_cast<T*>(d_weight));
  });
}
