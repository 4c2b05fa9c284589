// The gate of r1pipe/model/moe.py for one token: scores, node-limited groups, the K best and their weights.
#pragma once

#include <functional>
#include <numeric>

#include "gemm.h"
#include "model.h"

namespace r1pipe {

// logits [E] -> scores, in place
inline void score(float* logits, int64_t experts, bool by_sigmoid) {
  if (by_sigmoid) {
#pragma omp simd
    for (int64_t e = 0; e < experts; e++) logits[e] = sigmoid(logits[e]);
    return;
  }
  float largest = logits[0], total = 0.0f;
  for (int64_t e = 0; e < experts; e++) largest = logits[e] > largest ? logits[e] : largest;
  for (int64_t e = 0; e < experts; e++) total += logits[e] = exponential(logits[e] - largest);
  for (int64_t e = 0; e < experts; e++) logits[e] /= total;
}

// Closes the experts of all but the open groups: a group's score is the sum of its best experts'.
inline void close_groups(const Shape& s, float* biased) {
  const int64_t size = s.experts / s.groups;
  float *of_group = scratch<float, struct OfGroup>(s.groups), *best = scratch<float, struct Best>(size);
  for (int64_t g = 0; g < s.groups; g++) {
    std::copy_n(biased + g * size, size, best);
    std::partial_sort(best, best + s.group_best, best + size, std::greater<float>());
    of_group[g] = std::accumulate(best, best + s.group_best, 0.0f);
  }
  for (int64_t shut = s.open_groups; shut < s.groups; shut++) {
    const int64_t g = std::min_element(of_group, of_group + s.groups) - of_group;
    of_group[g] = INFINITY;
    std::fill_n(biased + g * size, size, -INFINITY);
  }
}

// logits [E], which it overwrites -> experts [K] and weights [K]. The bias (null: none) affects only the choice.
inline void choose(const Shape& s, float* logits, const float* bias, int64_t* experts, float* weights) {
  score(logits, s.experts, s.sigmoid);
  float* biased = scratch<float, struct Biased>(s.experts);
  for (int64_t e = 0; e < s.experts; e++) biased[e] = logits[e] + (bias ? bias[e] : 0.0f);
  if (s.open_groups < s.groups) close_groups(s, biased);
  float total = 1e-20f;
  for (int64_t k = 0; k < s.top_k; k++) {
    const int64_t e = std::max_element(biased, biased + s.experts) - biased;
    biased[e] = -INFINITY;
    experts[k] = e;
    weights[k] = logits[e];
    total += logits[e];
  }
  const float factor = float(s.routed_scale) / (s.normalise ? total : 1.0f);
  for (int64_t k = 0; k < s.top_k; k++) weights[k] *= factor;
}

}  // namespace r1pipe
