// The routed experts' SwiGLUs, forward and backward, without a copy of the tokens for each of their experts; a dense
// SwiGLU is one expert that every token visits.
//
// Tokens are processed in chunks: one thread has a chunk's sums and adds experts in order, so that results are
// deterministic. Within a chunk, the rows of each expert are gathered block by block.

#include "products.h"

namespace {

using namespace r1pipe;

struct Sizes {
  int64_t tokens, top_k, experts, width, inner, chunk;
  int64_t chunks() const { return (tokens + chunk - 1) / chunk; }
};

// The routing: for each expert the rows of its tokens, chunk by chunk, each group padded to UNIT.
struct Visits {
  std::vector<int64_t> start;  // [experts * chunks + 1]
  std::vector<int64_t> slot;   // of each row: token * top_k + k, or -1

  Visits(const Sizes& sizes, const int64_t* experts_NK) : start(sizes.experts * sizes.chunks() + 1) {
    const int64_t slots = sizes.tokens * sizes.top_k, per_chunk = sizes.chunk * sizes.top_k;
    auto group = [&](int64_t s) { return (experts_NK ? experts_NK[s] : 0) * sizes.chunks() + s / per_chunk; };
    for (int64_t s = 0; s < slots; s++) start[group(s) + 1]++;
    for (size_t g = 1; g < start.size(); g++) start[g] = start[g - 1] + up_to(start[g], UNIT);
    slot.assign(start.back(), -1);
    std::vector<int64_t> next(start);
    for (int64_t s = 0; s < slots; s++) slot[next[group(s)]++] = s;
  }
};

template <typename T>
struct Layer {
  Sizes sizes;
  const Visits& visits;
  const T *x, *gate_up, *down;
  const float* weights_NK;  // null: 1

  // Pointers to the rows of `of` [tokens, width] of the rows [first, first + count).
  void gather(const T* of, int64_t first, int64_t count, Rows<T>& rows) const {
    static thread_local std::vector<T> nothing;
    nothing.resize(sizes.width);
    rows.resize(count);
    for (int64_t i = 0; i < count; i++) {
      const int64_t slot = visits.slot[first + i];
      rows[i] = slot < 0 ? nothing.data() : of + slot / sizes.top_k * sizes.width;
    }
  }

  void lay_out(const Rows<T>& rows, T* to) const {
    for (size_t i = 0; i < rows.size(); i++) std::copy_n(rows[i], sizes.width, to + i * sizes.width);
  }

  float weight(int64_t slot) const { return slot < 0 ? 0.0f : weights_NK ? weights_NK[slot] : 1.0f; }

  void add(const float* rows, int64_t first, int64_t count, int64_t chunk, float* sums) const {
    for (int64_t i = 0; i < count; i++) {
      const int64_t slot = visits.slot[first + i];
      if (slot < 0) continue;
      float* to = sums + (slot / sizes.top_k - chunk * sizes.chunk) * sizes.width;
      const float* from = rows + i * sizes.width;
#pragma omp simd
      for (int64_t d = 0; d < sizes.width; d++) to[d] += from[d];
    }
  }

  // out = for each token the sum of the results of `block` (rows first, count; float results) for its experts
  template <typename Block>
  void by_chunks(T* out, Block block) const {
    share(sizes.chunks(), [&](int64_t c) {
      const Tiles tiles;
      const int64_t begin = c * sizes.chunk, tokens = std::min(sizes.chunk, sizes.tokens - begin);
      float* sums = scratch<float, struct Sums>(sizes.chunk * sizes.width);
      float* rows = scratch<float, struct Results>(BLOCK * sizes.width);
      std::fill_n(sums, tokens * sizes.width, 0.0f);
      for (int64_t e = 0; e < sizes.experts; e++) {
        const int64_t group = e * sizes.chunks() + c, end = visits.start[group + 1];
        for (int64_t first = visits.start[group]; first < end; first += BLOCK) {
          const int64_t count = std::min(BLOCK, end - first);
          block(e, first, count, rows);
          add(rows, first, count, c, sums);
        }
      }
      rounded(sums, tokens * sizes.width, out + begin * sizes.width);
    });
  }
};

// hidden = silu(gate) * up * weight of each row; saves gate and up.
template <typename T>
void activate(const Layer<T>& layer, const float* gate_up, int64_t first, int64_t count, T* kept, T* hidden) {
  const int64_t inner = layer.sizes.inner;
  for (int64_t row = 0; row < count; row++) {
    const Floats weight = broadcast(layer.weight(layer.visits.slot[first + row]));
    const int64_t at = row * 2 * inner;
    for (int64_t i = 0; i < inner; i += UNIT) {
      const Lanes lanes = first_of(inner - i);
      const Floats g = load(gate_up + at + i, lanes), u = load(gate_up + at + inner + i, lanes);
      store(kept + at + i, g, lanes);
      store(kept + at + inner + i, u, lanes);
      store(hidden + row * inner + i, g * sigmoid(g) * (u * weight), lanes);
    }
  }
}

// The gradients of gate and up, the recomputed hidden state, and the gradient of each row's weight.
template <typename T>
void activate_back(const Layer<T>& layer, const float* d_hidden, int64_t first, int64_t count, const T* kept, T* hidden,
                   T* d_gate_up, float* d_weights) {
  const int64_t inner = layer.sizes.inner;
  for (int64_t row = 0; row < count; row++) {
    const int64_t slot = layer.visits.slot[first + row], at = row * 2 * inner;
    const Floats weight = broadcast(layer.weight(slot)), one = broadcast(1.0f);
    Floats d_weight = zeros();
    for (int64_t i = 0; i < inner; i += UNIT) {
      const Lanes lanes = first_of(inner - i);
      const Floats g = load(kept + at + i, lanes), u = load(kept + at + inner + i, lanes);
      const Floats s = sigmoid(g), a = g * s, d = load(d_hidden + row * inner + i, lanes);
      const Floats au = a * u, dw = d * weight;
      const Floats slope = multiply_add(a, one - s, s);
      store(hidden + row * inner + i, au * weight, lanes);
      store(d_gate_up + at + i, dw * u * slope, lanes);
      store(d_gate_up + at + inner + i, dw * a, lanes);
      d_weight = multiply_add(d, au, d_weight);
    }
    if (d_weights && slot >= 0) d_weights[slot] = sum_of(d_weight);
  }
}

template <typename T, typename Use, bool outputs_first>
std::vector<Packed<T>> packed(const T* weights, int64_t experts, int64_t rows, int64_t columns) {
  const int64_t size = outputs_first ? up_to(rows, PANEL) * columns : up_to(columns, PANEL) * rows;
  T* to = scratch<T, Use>(experts * size);
  std::vector<Packed<T>> all(experts);
  share(experts, [&](int64_t e) {
    const Rows<T> pointers = rows_of(weights + e * rows * columns, columns, rows);
    all[e] = outputs_first ? pack_outputs(pointers.data(), rows, columns, to + e * size)
                           : pack_depth(pointers.data(), rows, columns, to + e * size);
  });
  return all;
}

template <typename T>
void forward(const Layer<T>& layer, T* kept, T* out) {
  const auto [tokens, top_k, experts, width, inner, chunk] = layer.sizes;
  const auto gate_up = packed<T, struct GateUp, true>(layer.gate_up, experts, 2 * inner, width);
  const auto down = packed<T, struct Down, true>(layer.down, experts, width, inner);
  layer.by_chunks(out, [&, width = width, inner = inner](int64_t e, int64_t first, int64_t count, float* result) {
    static thread_local Rows<T> rows;
    T* x = scratch<T, struct Inputs>(BLOCK * width);
    T* hidden = scratch<T, struct Hidden>(BLOCK * inner);
    float* both = scratch<float, struct Both>(BLOCK * 2 * inner);
    layer.gather(layer.x, first, count, rows);
    layer.lay_out(rows, x);
    multiply(x, width, count, gate_up[e], both, 2 * inner);
    activate(layer, both, first, count, kept + first * 2 * inner, hidden);
    multiply(hidden, inner, count, down[e], result, width);
  });
}

// Also gives the weights' half what it needs of this one: hidden [rows, inner] and d_both [rows, 2 * inner].
template <typename T>
void backward_inputs(const Layer<T>& layer, const T* kept, const T* d_out, T* hidden, T* d_both, T* d_x, float* d_weights) {
  const auto [tokens, top_k, experts, width, inner, chunk] = layer.sizes;
  const auto gate_up = packed<T, struct GateUp, false>(layer.gate_up, experts, 2 * inner, width);
  const auto down = packed<T, struct Down, false>(layer.down, experts, width, inner);
  layer.by_chunks(d_x, [&, I = inner, D = width](int64_t e, int64_t first, int64_t count, float* result) {
    static thread_local Rows<T> pointers;
    T* d = scratch<T, struct Inputs>(BLOCK * D);
    float* d_hidden = scratch<float, struct Both>(BLOCK * 2 * I);
    layer.gather(d_out, first, count, pointers);
    layer.lay_out(pointers, d);
    multiply(d, D, count, down[e], d_hidden, I);
    T* own = d_both + first * 2 * I;
    activate_back(layer, d_hidden, first, count, kept + first * 2 * I, hidden + first * I, own, d_weights);
    multiply(own, 2 * I, count, gate_up[e], result, D);
  });
}

template <typename T>
void backward_weights(const Layer<T>& layer, const T* hidden, const T* d_both, const T* d_out, T* d_gate_up, T* d_down) {
  const int64_t I = layer.sizes.inner, D = layer.sizes.width, E = layer.sizes.experts;
  auto gathered = [&](const T* of) {
    return [&layer, of](int64_t first, int64_t count, Rows<T>& to) { layer.gather(of, first, count, to); };
  };
  // with few experts, several threads share the work of one
  const int64_t parts = std::max<int64_t>(1, std::min({omp_get_max_threads() / E, 2 * I, D}));
  share(2 * E * parts, [&](int64_t task) {
    const Tiles tiles;
    const int64_t e = task / (2 * parts), part = task / 2 % parts;
    const int64_t chunks = layer.sizes.chunks(), begin = layer.visits.start[e * chunks];
    const int64_t end = layer.visits.start[(e + 1) * chunks], outputs = task % 2 ? D : 2 * I;
    const Part own = part_of(outputs, part, parts);
    float* sums = scratch<float, struct Gradient>(own.count * (task % 2 ? I : D));
    if (task % 2) {
      weight_gradient<T>({begin, end}, own, I, gathered(d_out), apart(hidden, I), false, sums);
      rounded(sums, own.count * I, d_down + (e * D + own.first) * I);
    } else {
      weight_gradient<T>({begin, end}, own, D, apart(d_both, 2 * I), gathered(layer.x), false, sums);
      rounded(sums, own.count * D, d_gate_up + (e * 2 * I + own.first) * D);
    }
  });
}

template <typename T>
Layer<T> layer_of(const Sizes& sizes, const Visits& visits, const void* x, const void* gate_up, const void* down,
                  const float* weights) {
  return {sizes, visits, static_cast<const T*>(x), static_cast<const T*>(gate_up), static_cast<const T*>(down), weights};
}

}  // namespace

extern "C" void r1pipe_experts_forward(int64_t bf16, int64_t tokens, int64_t top_k, int64_t experts, int64_t width, int64_t inner,
                                int64_t chunk, const void* x, const void* gate_up, const void* down,
                                const float* weights_NK, const int64_t* experts_NK, void* kept, void* out) {
  const Sizes sizes{tokens, top_k, experts, width, inner, chunk};
  const Visits visits(sizes, experts_NK);
  with_type(bf16, [&]<typename T>() {
    forward(layer_of<T>(sizes, visits, x, gate_up, down, weights_NK), static_cast<T*>(kept), static_cast<T*>(out));
  });
}

extern "C" void r1pipe_experts_backward_inputs(int64_t bf16, int64_t tokens, int64_t top_k, int64_t experts, int64_t width,
                                        int64_t inner, int64_t chunk, const void* gate_up, const void* down,
                                        const float* weights_NK, const int64_t* experts_NK, const void* kept,
                                        const void* d_out, void* hidden, void* d_both, void* d_x, float* d_weights_NK) {
  const Sizes sizes{tokens, top_k, experts, width, inner, chunk};
  const Visits visits(sizes, experts_NK);
  with_type(bf16, [&]<typename T>() {
    backward_inputs(layer_of<T>(sizes, visits, nullptr, gate_up, down, weights_NK), static_cast<const T*>(kept),
                    static_cast<const T*>(d_out), static_cast<T*>(hidden), static_cast<T*>(d_both), static_cast<T*>(d_x),
                    d_weights_NK);
  });
}

extern "C" void r1pipe_experts_backward_weights(int64_t bf16, int64_t tokens, int64_t top_k, int64_t experts, int64_t width,
                                         int64_t inner, int64_t chunk, const void* x, const int64_t* experts_NK,
                                         const void* hidden, const void* d_both, const void* d_out, void* d_gate_up,
                                         void* d_down) {
  const Sizes sizes{tokens, top_k, experts, width, inner, chunk};
  const Visits visits(sizes, experts_NK);
  with_type(bf16, [&]<typename T>() {
    backward_weights(layer_of<T>(sizes, visits, x, nullptr, nullptr, nullptr), static_cast<const T*>(hidden),
                     static_cast<const T*>(d_both), static_cast<const T*>(d_out), static_cast<T*>(d_gate_up),
                     static_cast<T*>(d_down));
  });
}
