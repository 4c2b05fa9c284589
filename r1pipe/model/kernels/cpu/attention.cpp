// Attention of whole rows with its gradients (FlashAttention's recomputation: arXiv:2205.14135), for short rows: the
// scores of a block of queries with all their keys exist at once. Keys are the heads' own part and one rotary part that
// all heads share; queries are rotated here, so that nothing is concatenated or expanded in memory.

#include "attention.h"

namespace {

using namespace r1pipe;

// e^(score - by), 0 where masked.
inline Floats exponential_seen(Floats scores, float by) {
  const Mask seen = differ(scores, broadcast(NOTHING));
  return where(seen, exponential(scores - broadcast(by)));
}

// Exponentials of the scores of row i over their largest, as T; returns log(sum) + largest, and the sum.
template <typename T>
std::pair<float, float> exponentials(const float* scores, int64_t tiles, int64_t i, T* to) {
  Floats most = broadcast(NOTHING), sums = zeros();
  for (int64_t tile = 0; tile < tiles; tile++)
    for (int64_t j = 0; j < TILE; j += UNIT) most = larger(load(scores + (tile * TILE + i) * TILE + j), most);
  const float largest = largest_of(most);
  for (int64_t tile = 0; tile < tiles; tile++) {
    for (int64_t j = 0; j < TILE; j += UNIT) {
      const int64_t at = (tile * TILE + i) * TILE + j;
      const Floats e = exponential_seen(load(scores + at), largest);
      store(to + at, e);
      sums = sums + e;
    }
  }
  const float sum = sum_of(sums);
  return {largest + std::log(sum), sum};
}

template <typename T>
void forward_head(const Given<T>& given, int64_t b, int64_t h, T* out, float* logsums_BHT) {
  const Tiles released;
  const AttentionSizes& sizes = given.sizes;
  const int64_t width = sizes.width(), tiles = sizes.tiles(), value_size = up_to(sizes.value, PANEL) * TILE;
  T* keys = scratch<T, struct PackedKeys>(tiles * TILE * width);
  T* values = scratch<T, struct PackedValues>(tiles * value_size);
  float* scores = scratch<float, struct Scores>(tiles * TILE * TILE);
  T* weights = scratch<T, struct Weights>(tiles * TILE * TILE);
  float* context = scratch<float, struct Context>(TILE * sizes.value);
  for (int64_t tile = 0; tile < tiles; tile++) {
    const KeyTile<T> own(given, b, h, tile);
    pack_outputs(own.key.data(), TILE, width, keys + tile * TILE * width);
    pack_depth(own.value.data(), TILE, sizes.value, values + tile * value_size);
  }
  for (int64_t first = 0; first < sizes.tokens; first += TILE) {
    const Block<T> block(given, b, h, first);
    block.scores(given, keys, scores);
    float factor[TILE];
    for (int64_t i = 0; i < block.count; i++) {
      const auto [logsum, sum] = exponentials(scores, block.tiles, i, weights);
      factor[i] = 1.0f / sum;
      logsums_BHT[(b * sizes.heads + h) * sizes.tokens + first + i] = logsum;
    }
    for (int64_t tile = 0; tile < block.tiles; tile++) {
      const Packed<T> value{values + tile * value_size, sizes.value, TILE};
      multiply(weights + tile * TILE * TILE, TILE, block.filled, value, context, sizes.value, tile > 0);
    }
    for (int64_t i = 0; i < block.count; i++) {
      T* to = out + given.place(b, first + i, h) * sizes.value;
#pragma omp simd
      for (int64_t d = 0; d < sizes.value; d++) put(to[d], context[i * sizes.value + d] * factor[i]);
    }
  }
}

template <typename T>
struct Results {
  const T *out, *d_out;  // [B, T, H, value]
  const float* logsums_BHT;
  T *d_query, *d_key_value, *d_key_rope;
  float* d_rope_parts;  // [B, H, M, rope]: each head's part of d_key_rope
};

// The weights and the gradients of the scores of a block, [tiles][64][64] each; `d_weights` is an input.
template <typename T>
void scores_back(const Given<T>& given, const Block<T>& block, const Results<T>& results, const float* scores,
                 const float* d_weights, T* weights, T* d_scores) {
  const AttentionSizes& sizes = given.sizes;
  for (int64_t i = 0; i < block.filled; i++) {
    float product = 0.0f, logsum = 0.0f;
    if (i < block.count) {
      const int64_t place = given.place(block.b, block.first + i, block.h) * sizes.value;
      const T *out = results.out + place, *d_out = results.d_out + place;
      const int64_t width = sizes.value;
#pragma omp simd reduction(+ : product)
      for (int64_t d = 0; d < width; d++) product += from(out[d]) * from(d_out[d]);
      logsum = results.logsums_BHT[(block.b * sizes.heads + block.h) * sizes.tokens + block.first + i];
    }
    for (int64_t tile = 0; tile < block.tiles; tile++) {
      const int64_t row = (tile * TILE + i) * TILE;
      if (i >= block.count) {
        std::fill_n(weights + row, TILE, T(0.0f));
        std::fill_n(d_scores + row, TILE, T(0.0f));
        continue;
      }
      for (int64_t j = row; j < row + TILE; j += UNIT) {
        const Floats w = exponential_seen(load(scores + j), logsum);
        const Mask seen = differ(w, zeros());
        store(weights + j, w);
        const Floats apart = load(d_weights + j) - broadcast(product);
        store(d_scores + j, where(seen, w * broadcast(given.scale) * apart));
      }
    }
  }
}

template <typename T>
void backward_head(const Given<T>& given, const Results<T>& results, int64_t b, int64_t h) {
  const Tiles released;
  const AttentionSizes& sizes = given.sizes;
  const int64_t width = sizes.width(), value = sizes.value, tiles = sizes.tiles(), square = TILE * TILE;
  const int64_t key_size = TILE * up_to(width, PANEL), value_size = TILE * up_to(value, PANEL);
  T* keys = scratch<T, struct PackedKeys>(tiles * TILE * width);
  T* keys_back = scratch<T, struct PackedKeysBack>(tiles * key_size);
  T* values_back = scratch<T, struct PackedValues>(tiles * TILE * value);
  float* scores = scratch<float, struct Scores>(tiles * square);
  float* d_weights = scratch<float, struct WeightGradients>(tiles * square);
  T* weights = scratch<T, struct Weights>(tiles * square);
  T* d_scores = scratch<T, struct ScoreGradients>(tiles * square);
  T* turned = scratch<T, struct Transposed>(square);
  T* d_out = scratch<T, struct OutGradients>(TILE * value);
  T* query_panels = scratch<T, struct QueryPanels>(key_size);
  T* out_panels = scratch<T, struct OutPanels>(value_size);
  float* d_query = scratch<float, struct QueryGradients>(TILE * width);
  float* d_keys = scratch<float, struct KeyGradients>(tiles * TILE * width);
  float* d_values = scratch<float, struct ValueGradients>(tiles * TILE * value);
  std::fill_n(d_keys, tiles * TILE * width, 0.0f);
  std::fill_n(d_values, tiles * TILE * value, 0.0f);
  for (int64_t tile = 0; tile < tiles; tile++) {
    const KeyTile<T> own(given, b, h, tile);
    pack_outputs(own.key.data(), TILE, width, keys + tile * TILE * width);
    pack_depth(own.key.data(), TILE, width, keys_back + tile * key_size);
    pack_outputs(own.value.data(), TILE, value, values_back + tile * TILE * value);
  }
  for (int64_t first = 0; first < sizes.tokens; first += TILE) {
    const Block<T> block(given, b, h, first);
    const int64_t filled = block.filled;
    for (int64_t i = 0; i < filled; i++) {
      if (i < block.count)
        std::copy_n(results.d_out + given.place(b, first + i, h) * value, value, d_out + i * value);
      else
        std::fill_n(d_out + i * value, value, T(0.0f));
    }
    block.scores(given, keys, scores);
    for (int64_t tile = 0; tile < block.tiles; tile++) {
      const Packed<T> packed{values_back + tile * TILE * value, TILE, value};
      multiply(d_out, value, filled, packed, d_weights + tile * square, TILE);
    }
    scores_back(given, block, results, scores, d_weights, weights, d_scores);
    const auto queries = pack_depth(rows_of(block.query, width, filled).data(), filled, width, query_panels);
    const auto outs = pack_depth(rows_of(d_out, value, filled).data(), filled, value, out_panels);
    for (int64_t tile = 0; tile < block.tiles; tile++) {
      multiply(d_scores + tile * square, TILE, filled, Packed<T>{keys_back + tile * key_size, width, TILE}, d_query, width,
               tile > 0);
      transposed(rows_of(d_scores + tile * square, TILE, filled).data(), filled, 0, TILE, turned);
      multiply(turned, filled, TILE, queries, d_keys + tile * TILE * width, width, true);
      transposed(rows_of(weights + tile * square, TILE, filled).data(), filled, 0, TILE, turned);
      multiply(turned, filled, TILE, outs, d_values + tile * TILE * value, value, true);
    }
    for (int64_t i = 0; i < block.count; i++) {
      T* to = results.d_query + given.place(b, first + i, h) * width;
      const float* d = d_query + i * width;
      rounded(d, sizes.nope, to);
      const float* rotation = given.rotation + b * given.rotation_stride + (first + i) * sizes.rope;
      turn(d + sizes.nope, rotation, sizes.rope, true, to + sizes.nope);
    }
  }
  for (int64_t m = 0; m < sizes.keys; m++) {
    T* to = results.d_key_value + (given.key(b, h, m) - given.key_value);
    rounded(d_keys + m * width, sizes.nope, to);
    rounded(d_values + m * value, value, to + sizes.nope);
    std::copy_n(d_keys + m * width + sizes.nope, sizes.rope,
                results.d_rope_parts + ((b * sizes.heads + h) * sizes.keys + m) * sizes.rope);
  }
}

template <typename T>
void backward(const Given<T>& given, const Results<T>& results) {
  const AttentionSizes& sizes = given.sizes;
  share(sizes.rows * sizes.heads, [&](int64_t i) { backward_head(given, results, i / sizes.heads, i % sizes.heads); });
  const int64_t all = sizes.keys * sizes.rope;
  share(sizes.rows, [&](int64_t b) {
    for (int64_t i = 0; i < all; i++) {
      float sum = 0.0f;
      for (int64_t h = 0; h < sizes.heads; h++) sum += results.d_rope_parts[(b * sizes.heads + h) * all + i];
      put(results.d_key_rope[b * all + i], sum);
    }
  });
}

template <typename T>
Given<T> given_of(const AttentionSizes& sizes, const void* query, const void* key_value, const void* key_rope,
                  const float* rotation, int64_t rotation_stride, const uint8_t* mask, float scale) {
  return {sizes, static_cast<const T*>(query), static_cast<const T*>(key_value), static_cast<const T*>(key_rope),
          rotation, rotation_stride, mask, scale};
}

}  // namespace

extern "C" void r1pipe_attention_forward(int64_t bf16, int64_t rows, int64_t tokens, int64_t keys, int64_t heads, int64_t nope,
                                  int64_t rope, int64_t value, int64_t rotation_stride, float scale, const void* query,
                                  const void* key_value, const void* key_rope, const float* rotation,
                                  const uint8_t* mask, void* out, float* logsums_BHT) {
  const AttentionSizes sizes{rows, tokens, keys, heads, nope, rope, value};
  with_type(bf16, [&]<typename T>() {
    const auto given = given_of<T>(sizes, query, key_value, key_rope, rotation, rotation_stride, mask, scale);
    share(rows * heads,
          [&](int64_t i) { forward_head(given, i / heads, i % heads, static_cast<T*>(out), logsums_BHT); });
  });
}

extern "C" void r1pipe_attention_backward(int64_t bf16, int64_t rows, int64_t tokens, int64_t keys, int64_t heads, int64_t nope,
                                   int64_t rope, int64_t value, int64_t rotation_stride, float scale, const void* query,
                                   const void* key_value, const void* key_rope, const float* rotation,
                                   const uint8_t* mask, const void* out, const float* logsums_BHT, const void* d_out,
                                   void* d_query, void* d_key_value, void* d_key_rope) {
  const AttentionSizes sizes{rows, tokens, keys, heads, nope, rope, value};
  with_type(bf16, [&]<typename T>() {
    const auto given = given_of<T>(sizes, query, key_value, key_rope, rotation, rotation_stride, mask, scale);
    backward(given, Results<T>{static_cast<const T*>(out), static_cast<const T*>(d_out), logsums_BHT,
                               static_cast<T*>(d_query), static_cast<T*>(d_key_value), static_cast<T*>(d_key_rope),
                               scratch<float, struct RopeParts>(rows * heads * keys * rope)});
  });
}
