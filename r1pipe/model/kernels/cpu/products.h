// Products of many rows: a Linear with its gradients, also used by experts and head.
#pragma once

#include "blocks.h"

namespace r1pipe {

constexpr int64_t BLOCK = 64;   // rows of one product: its operands stay in the inner caches
constexpr int64_t DEPTH = 256;  // rows that a weight's gradient is summed over in one product

struct Span {
  int64_t first, end;
};
struct Part {
  int64_t first, count;
};

inline Part part_of(int64_t whole, int64_t part, int64_t parts) {
  const int64_t first = part * whole / parts;
  return {first, (part + 1) * whole / parts - first};
}

// Gives pointers to some of the rows, which are `stride` apart.
template <typename T>
inline auto apart(const T* of, int64_t stride) {
  return [=](int64_t first, int64_t count, Rows<T>& to) { to = rows_of(of + first * stride, stride, count); };
}

// sums [outputs.count, columns] (+)= left^T right over `rows`, taking the columns `outputs` of left. Both
// give pointers to rows; in bfloat16 an odd last row is paired with zeros.
template <typename T, typename Left, typename Right>
inline void weight_gradient(Span rows, Part outputs, int64_t columns, Left left, Right right, bool add, float* sums) {
  static thread_local Rows<T> pointers;
  static thread_local std::vector<T> nothing;
  nothing.resize(std::max(outputs.first + outputs.count, columns));
  T* turned = scratch<T, struct Turned>(outputs.count * DEPTH);
  T* panels = scratch<T, struct Panels>(up_to(columns, PANEL) * DEPTH);
  if (rows.first == rows.end && !add) std::fill_n(sums, outputs.count * columns, 0.0f);
  for (int64_t row = rows.first; row < rows.end; row += DEPTH) {
    const int64_t count = std::min(DEPTH, rows.end - row), filled = up_to(count, UNIT);
    left(row, count, pointers);
    pointers.resize(filled, nothing.data());
    transposed(pointers.data(), filled, outputs.first, outputs.count, turned);
    right(row, count, pointers);
    pointers.resize(filled, nothing.data());
    const auto packed = pack_depth(pointers.data(), filled, columns, panels);
    multiply(turned, filled, outputs.count, packed, sums, columns, add || row > rows.first);
  }
}

// The rows [first, first + BLOCK) of x, or as many as there are; the last ones copied and padded to UNIT, because
// the products compile a kernel for every number of rows.
template <typename T>
struct RowBlock {
  int64_t first, count, filled, stride;
  const T* data;

  RowBlock(const T* x, int64_t rows, int64_t width, int64_t x_stride, int64_t first)
      : first(first), count(std::min(BLOCK, rows - first)), filled(up_to(count, UNIT)), stride(x_stride),
        data(x + first * x_stride) {
    if (filled == count) return;
    T* copy = scratch<T, struct LastRows>(BLOCK * width);
    std::fill_n(copy, filled * width, T(0.0f));
    for (int64_t i = 0; i < count; i++) std::copy_n(data + i * x_stride, width, copy + i * width);
    data = copy;
    stride = width;
  }
};

// out [rows, outputs] = x [rows, depth] * weight^T
template <typename T>
inline void product(const T* x, int64_t rows, int64_t stride, const Packed<T>& weight, T* out) {
  share_rows(rows, BLOCK, [&](int64_t first, int64_t) {
    const Tiles tiles;
    const RowBlock<T> block(x, rows, weight.depth, stride, first);
    float* sums = scratch<float, struct Products>(BLOCK * weight.outputs);
    multiply(block.data, block.stride, block.filled, weight, sums, weight.outputs);
    rounded(sums, block.count * weight.outputs, out + first * weight.outputs);
  });
}

}  // namespace r1pipe
