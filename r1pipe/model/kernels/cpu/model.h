// The arguments from model/native.py: sizes, weights and a batch. Axes as in forward.cpp.
#pragma once

#include <cstdint>

namespace r1pipe {

struct Shape {  // numbers of ModelConfig
  int64_t layers, width, heads, nope, rope, value, latent, query_rank, vocabulary;
  int64_t dense_layers, dense_inner, experts, top_k, groups, open_groups, inner, shared_inner;
  int64_t group_best;  // the best experts, whose scores are summed to a group's
  int64_t sigmoid, normalise;
  double eps, latent_eps, scale, routed_scale;
};

struct Layer {  // norms, gate and bias are float, the others packed in the batch's type; null if missing
  const float *attention_norm, *query_norm, *latent_norm, *mlp_norm, *gate, *bias;
  const void* first;     // projections of the layer's input: queries (or compressed queries), then latent and rotary key
  const void* query;     // from the compressed query
  const void* up_key;    // [heads, latent, nope]
  const void* up_value;  // [heads, value, latent]
  const void* out;
  const void *gate_up, *down;  // of all routed experts, or of the dense layer
  const void *shared_gate_up, *shared_down;
};

struct Ends {
  const void* embedding;  // [vocabulary, width], not packed
  const float* norm;
  const void* head;
};

struct Batch {
  int64_t tokens, wanted;                         // N, and the number of those with logits
  const int64_t *token, *slot, *position, *want;  // [N], [N], [N]; the wanted tokens' places, ascending
  void* cache;                                    // [layers, slots, length, W] with these strides:
  int64_t layer_stride, slot_stride, entry_stride;
  const float* rotation;  // [positions, rope / 2, 2]: cosine and sine
  float* logits;          // [wanted, vocabulary]
  int64_t* experts;       // [MoE layers, tokens, K], the experts chosen; null: not requested
};

}  // namespace r1pipe
