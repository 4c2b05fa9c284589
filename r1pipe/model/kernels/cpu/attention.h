// The operands of attention over whole rows, in tiles: keys with values, and blocks of queries with scores.
//
// Axes as in r1pipe/model/layers.py; scores are stored in tiles of [queries, 64 keys].
#pragma once

#include "products.h"

namespace r1pipe {

constexpr int64_t TILE = PANEL;
constexpr float NOTHING = -INFINITY;

struct AttentionSizes {
  int64_t rows, tokens, keys, heads, nope, rope, value;
  int64_t width() const { return nope + rope; }
  int64_t tiles() const { return (keys + TILE - 1) / TILE; }
};

template <typename T>
struct Given {
  AttentionSizes sizes;
  const T *query, *key_value, *key_rope;  // [B, T, H, nope + rope], [B, M, H, nope + value], [B, M, rope]
  const float* rotation;                  // [B or 1, T, rope / 2, 2]
  int64_t rotation_stride;                // between rows: 0 if all rows share it
  const uint8_t* mask;                    // [B, T, M], or null: causal
  float scale;

  const T* key(int64_t b, int64_t h, int64_t m) const {
    return key_value + ((b * sizes.keys + m) * sizes.heads + h) * (sizes.nope + sizes.value);
  }
  int64_t place(int64_t b, int64_t t, int64_t h) const { return (b * sizes.tokens + t) * sizes.heads + h; }

  // The keys of `tile` that token t attends to, one bit each.
  uint64_t seen(int64_t b, int64_t t, int64_t tile) const {
    if (!mask) {
      const int64_t count = t + 1 - tile * TILE;
      return count <= 0 ? 0 : count >= TILE ? ~0ull : (1ull << count) - 1;
    }
    const int64_t left = std::min(TILE, sizes.keys - tile * TILE);
    return nonzero(mask + (b * sizes.tokens + t) * sizes.keys + tile * TILE, left);
  }

  // Tiles of keys that any of the tokens [first, first + count) attends to.
  int64_t tiles_seen(int64_t b, int64_t first, int64_t count) const {
    for (int64_t tile = sizes.tiles(); tile > 1; tile--)
      for (int64_t t = first; t < first + count; t++)
        if (seen(b, t, tile - 1)) return tile;
    return 1;
  }
};

// The keys [64, width] and values [64, value] of one tile, padded with zeros.
template <typename T>
struct KeyTile {
  T* keys;
  Rows<T> key, value;

  KeyTile(const Given<T>& given, int64_t b, int64_t h, int64_t tile) : key(TILE), value(TILE) {
    const AttentionSizes& sizes = given.sizes;
    const int64_t width = sizes.width();
    static thread_local std::vector<T> nothing;
    nothing.resize(sizes.value);
    keys = scratch<T, struct Keys>(TILE * width);
    for (int64_t i = 0; i < TILE; i++) {
      const int64_t m = tile * TILE + i;
      key[i] = keys + i * width;
      value[i] = nothing.data();
      if (m >= sizes.keys) {
        std::fill_n(keys + i * width, width, T(0.0f));
        continue;
      }
      std::copy_n(given.key(b, h, m), sizes.nope, keys + i * width);
      std::copy_n(given.key_rope + (b * sizes.keys + m) * sizes.rope, sizes.rope, keys + i * width + sizes.nope);
      value[i] = given.key(b, h, m) + sizes.nope;
    }
  }
};

// A block of queries of one head, rotated, padded with zeros.
template <typename T>
struct Block {
  int64_t b, h, first, count, filled, tiles;
  T* query;

  Block(const Given<T>& given, int64_t b, int64_t h, int64_t first)
      : b(b), h(h), first(first), count(std::min(TILE, given.sizes.tokens - first)), filled(up_to(count, UNIT)),
        tiles(given.tiles_seen(b, first, count)) {
    const AttentionSizes& sizes = given.sizes;
    query = scratch<T, struct Queries>(TILE * sizes.width());
    for (int64_t i = 0; i < filled; i++) {
      T* to = query + i * sizes.width();
      if (i >= count) {
        std::fill_n(to, sizes.width(), T(0.0f));
        continue;
      }
      const T* x = given.query + given.place(b, first + i, h) * sizes.width();
      std::copy_n(x, sizes.nope, to);
      const float* rotation = given.rotation + b * given.rotation_stride + (first + i) * sizes.rope;
      turn(x + sizes.nope, rotation, sizes.rope, false, to + sizes.nope);
    }
  }

  // scores [tiles][64][64], of which `filled` rows are used, scaled, -inf where masked; keys are packed tile by tile
  void scores(const Given<T>& given, const T* keys, float* to) const {
    const int64_t width = given.sizes.width();
    for (int64_t tile = 0; tile < tiles; tile++) {
      float* tile_scores = to + tile * TILE * TILE;
      multiply(query, width, filled, Packed<T>{keys + tile * TILE * width, TILE, width}, tile_scores, TILE);
      for (int64_t i = 0; i < count; i++) {
        const uint64_t seen = given.seen(b, first + i, tile);
        for (int64_t j = 0; j < TILE; j += UNIT) {
          float* at = tile_scores + i * TILE + j;
          store(at, where(bits(seen >> j), load(at) * broadcast(given.scale), broadcast(NOTHING)));
        }
      }
    }
  }
};

}  // namespace r1pipe
