// The whole model over a ragged batch of new tokens on the latent cache, in one call, for prefill and decoding.
//
// A layer is three passes over the batch: latents (every token's cache entry must be written before any attention),
// attention and gate, experts. In decoding the first two are one. Threads share a pass by blocks of rows, or by
// experts; every sum has a fixed order, so results do not depend on the threads. Attention is absorbed (V2 section
// 2.1.2): keys and values are never expanded, as in r1pipe/model/mla.py `decode`, which together with moe.py is this
// file's reference.
//
// N tokens, D hidden width, H heads, C latent width, R rotary width, W = C + R, E experts, K chosen, T the type of
// weights, cache and operands of products. Sums stay in float.
#include "latent_attention.h"
#include "gate.h"

namespace r1pipe {

constexpr int64_t ROWS = 32;  // in a block, whose activations stay in a core's own cache

template <typename T>
class Forward {
 public:
  Forward(const Shape& s, const Layer* layers, const Ends& ends, const Batch& b)
      : s(s), layers(layers), ends(ends), b(b), N(b.tokens), W(s.latent + s.rope), sorted(b.tokens * s.top_k),
        alone(b.wanted == b.tokens) {
    x = scratch<float, struct Residual>(N * s.width);
    query = scratch<float, struct Queries>(N * s.heads * W);
    weights = scratch<float, struct Weights>(sorted);
    sorted_weights = scratch<float, struct SortedWeights>(sorted);
    routed = scratch<float, struct Routed>(sorted * s.width);
    normed = scratch<T, struct Normed>(N * s.width);
    slot = scratch<int64_t, struct Slots>(N);
    position = scratch<int64_t, struct Positions>(N);
    chosen = scratch<int64_t, struct Chosen>(sorted);
    place = scratch<int64_t, struct Places>(sorted);
    order = scratch<int64_t, struct Order>(sorted);
    items = scratch<Item, struct Items>(sorted / ROWS + N / ROWS + s.experts + 2);
    std::copy_n(b.slot, N, slot);
    std::copy_n(b.position, N, position);
  }

  void run() {
    over_rows([&](int64_t row, int64_t rows) { embed(row, rows); });
    for (int64_t n = 0; n < s.layers; n++) {
      over_rows([&](int64_t row, int64_t rows) {
        add_routed(n - 1, row, rows);
        write_latents(n, row, rows);
        if (alone) look_and_choose(n, row, rows);
      });
      if (n + 1 == s.layers && !alone) keep_wanted();
      if (!alone) over_rows([&](int64_t row, int64_t rows) { look_and_choose(n, row, rows); });
      sort_by_expert(n);
      share(count, [&](int64_t i) {
        const Tiles released;
        feed_forward(n, items[i]);
      });
    }
    over_rows([&](int64_t row, int64_t rows) {
      add_routed(s.layers - 1, row, rows);
      head(row, rows);
    });
  }

 private:
  struct Item {  // rows [first, end) of one expert's sorted tokens, or (expert -1) of all tokens
    int64_t expert, first, end;
  };

  const Shape& s;
  const Layer* layers;
  const Ends& ends;
  const Batch& b;
  int64_t N;  // current tokens
  const int64_t W, sorted;
  const bool alone;                // every token gets logits: all slots differ, and none waits for another
  float *x, *query;                // [N, D], the residual stream; [N, H, W]
  float *weights, *sorted_weights; // [N, K]; [N * K] by expert
  float* routed;                   // [N * K, D], by expert
  T* normed;                       // [N, D]
  int64_t *slot, *position;        // [N]
  int64_t *chosen, *place, *order; // [N, K]: expert, and its place among the sorted; [N * K]: token of the sorted
  Item* items;
  int64_t count = 0;

  template <typename F>
  void over_rows(F work) {
    share_rows(N, ROWS, [&](int64_t row, int64_t rows) {
      const Tiles released;
      work(row, rows);
    });
  }

  Packed<T> packed(const void* data, int64_t outputs, int64_t depth) const {
    return {static_cast<const T*>(data), outputs, depth};
  }

  // The first cache entry of a token's slot.
  T* entries(int64_t layer, int64_t row) const {
    return static_cast<T*>(b.cache) + layer * b.layer_stride + slot[row] * b.slot_stride;
  }

  template <typename Out>
  void norm(int64_t row, int64_t rows, const float* weight, Out* out) const {
    for (int64_t r = 0; r < rows; r++) rms_norm(x + (row + r) * s.width, weight, s.eps, s.width, out + r * s.width);
  }

  void embed(int64_t row, int64_t rows) {
    for (int64_t n = row; n < row + rows; n++) {
      const T* embedding = static_cast<const T*>(ends.embedding) + b.token[n] * s.width;
      widen(embedding, s.width, x + n * s.width);
    }
  }

  // Norm, projections, the tokens' cache entries, and their queries with the keys' up-projection absorbed.
  void write_latents(int64_t n, int64_t row, int64_t rows) {
    const Layer& l = layers[n];
    const int64_t H = s.heads, C = s.latent, per_head = s.nope + s.rope, queries = H * per_head;
    const int64_t lead = s.query_rank ? s.query_rank : queries, width = lead + W;
    float* projected = scratch<float, struct Projected>(rows * width);
    T* in = scratch<T, struct Input>(rows * std::max(s.width, s.query_rank));
    norm(row, rows, l.attention_norm, in);
    multiply(in, s.width, rows, packed(l.first, width, s.width), projected, width);
    const float* q = projected;
    int64_t q_stride = width;
    if (s.query_rank) {
      float* expanded = scratch<float, struct Expanded>(rows * queries);
      for (int64_t r = 0; r < rows; r++)
        rms_norm(q + r * width, l.query_norm, s.latent_eps, s.query_rank, in + r * s.query_rank);
      multiply(in, s.query_rank, rows, packed(l.query, queries, s.query_rank), expanded, queries);
      q = expanded;
      q_stride = queries;
    }
    T* nope = scratch<T, struct Nope>(H * rows * s.nope);
    for (int64_t r = 0; r < rows; r++) {
      const float *rotation = b.rotation + position[row + r] * s.rope, *latent = projected + r * width + lead;
      T* own = entries(n, row + r) + position[row + r] * b.entry_stride;
      rms_norm(latent, l.latent_norm, s.latent_eps, C, own);
      turn(latent + C, rotation, s.rope, false, own + C);
      for (int64_t h = 0; h < H; h++) {
        const float* head = q + r * q_stride + h * per_head;
        turn(head + s.nope, rotation, s.rope, false, query + ((row + r) * H + h) * W + C);
        rounded(head, s.nope, nope + (h * rows + r) * s.nope);
      }
    }
    for (int64_t h = 0; h < H; h++)
      multiply(nope + h * rows * s.nope, s.nope, rows, packed(l.up_key, C, s.nope).at(h), query + (row * H + h) * W,
               H * W);
  }

  // Once the last layer's entries are written, only the tokens that get logits continue.
  void keep_wanted() {
    const int64_t width = s.heads * W;
    for (int64_t i = 0; i < b.wanted; i++) {
      const int64_t n = b.want[i];
      if (n == i) continue;
      std::copy_n(x + n * s.width, s.width, x + i * s.width);
      std::copy_n(query + n * width, width, query + i * width);
      slot[i] = slot[n];
      position[i] = position[n];
    }
    N = b.wanted;
  }

  void look_and_choose(int64_t n, int64_t row, int64_t rows) {
    const Layer& l = layers[n];
    const int64_t H = s.heads, C = s.latent, width = H * s.value;
    T *own = scratch<T, struct Own>(H * W), *context = scratch<T, struct Context>(rows * H * C);
    for (int64_t r = 0; r < rows; r++) {
      if (row + r + 1 < N) fetch(entries(n, row + r + 1), AHEAD * b.entry_stride);
      rounded(query + (row + r) * H * W, H * W, own);
      attend(own, H, entries(n, row + r), b.entry_stride, position[row + r] + 1, W, C, s.scale,
             context + r * H * C);
    }
    float* values = scratch<float, struct Values>(rows * width);
    for (int64_t h = 0; h < H; h++)
      multiply(context + h * C, H * C, rows, packed(l.up_value, s.value, C).at(h), values + h * s.value, width);
    T* in = scratch<T, struct Heads>(rows * width);
    rounded(values, rows * width, in);
    multiply(in, width, rows, packed(l.out, s.width, width), x + row * s.width, s.width, true);
    if (n < s.dense_layers) return norm(row, rows, l.mlp_norm, normed + row * s.width);
    float *exact = scratch<float, struct Exact>(rows * s.width), *logits = scratch<float, struct Logits>(rows * s.experts);
    norm(row, rows, l.mlp_norm, exact);
    rounded(exact, rows * s.width, normed + row * s.width);
    multiply(exact, s.width, rows, Packed<float>{l.gate, s.experts, s.width}, logits, s.experts);
    for (int64_t r = 0; r < rows; r++)
      choose(s, logits + r * s.experts, l.bias, chosen + (row + r) * s.top_k, weights + (row + r) * s.top_k);
  }

  // The layer's items, largest first: the part that all tokens visit, then the experts' blocks of tokens.
  void sort_by_expert(int64_t n) {
    count = 0;
    if (n < s.dense_layers || s.shared_inner)
      for (int64_t row = 0; row < N; row += ROWS) items[count++] = {-1, row, std::min(N, row + ROWS)};
    if (n < s.dense_layers) return;
    if (b.experts) std::copy_n(chosen, N * s.top_k, b.experts + (n - s.dense_layers) * sorted);
    int64_t* begin = scratch<int64_t, struct Begin>(s.experts + 1);
    std::fill_n(begin, s.experts + 1, 0);
    for (int64_t i = 0; i < N * s.top_k; i++) begin[chosen[i] + 1]++;
    std::partial_sum(begin, begin + s.experts + 1, begin);
    for (int64_t e = 0; e < s.experts; e++)
      for (int64_t first = begin[e]; first < begin[e + 1]; first += ROWS)
        items[count++] = {e, first, std::min(begin[e + 1], first + ROWS)};
    for (int64_t i = 0; i < N * s.top_k; i++) {
      place[i] = begin[chosen[i]]++;
      order[place[i]] = i / s.top_k;
      sorted_weights[place[i]] = weights[i];
    }
  }

  // One item: a routed expert, or the shared expert or dense layer, which add to x at once.
  void feed_forward(int64_t n, const Item& item) {
    const Layer& l = layers[n];
    const int64_t rows = item.end - item.first, D = s.width;
    const bool dense = n < s.dense_layers, all = item.expert < 0, shared = all && !dense;
    const int64_t inner = dense ? s.dense_inner : shared ? s.shared_inner : s.inner, which = all ? 0 : item.expert;
    const T* in = normed + item.first * D;
    if (!all) {
      T* gathered = scratch<T, struct Gathered>(rows * D);
      for (int64_t r = 0; r < rows; r++) std::copy_n(normed + order[item.first + r] * D, D, gathered + r * D);
      in = gathered;
    }
    float* gate_up = scratch<float, struct GateUp>(rows * 2 * inner);
    T* product = scratch<T, struct Product>(rows * inner);
    multiply(in, D, rows, packed(shared ? l.shared_gate_up : l.gate_up, 2 * inner, D).at(which), gate_up, 2 * inner);
    swiglu(gate_up, rows, inner, all ? nullptr : sorted_weights + item.first, product);
    multiply(product, inner, rows, packed(shared ? l.shared_down : l.down, D, inner).at(which),
             (all ? x : routed) + item.first * D, D, all);
  }

  void add_routed(int64_t n, int64_t row, int64_t rows) {
    if (n < s.dense_layers) return;
    for (int64_t i = row * s.top_k; i < (row + rows) * s.top_k; i++) {
      const float* from_ = routed + place[i] * s.width;
      float* to = x + i / s.top_k * s.width;
#pragma omp simd
      for (int64_t j = 0; j < s.width; j++) to[j] += from_[j];
    }
  }

  void head(int64_t row, int64_t rows) {
    norm(row, rows, ends.norm, normed + row * s.width);
    multiply(normed + row * s.width, s.width, rows, packed(ends.head, s.vocabulary, s.width),
             b.logits + row * s.vocabulary, s.vocabulary);
  }
};

}  // namespace r1pipe

using namespace r1pipe;

extern "C" void r1pipe_forward(int64_t bf16, const Shape* s, const Layer* layers, const Ends* ends,
                               const Batch* batch) {
  with_type(bf16, [&]<typename T>() { Forward<T>(*s, layers, *ends, *batch).run(); });
}
