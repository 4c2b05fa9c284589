// The product of packed weights in AVX2: a block of sums stays in registers while the depth goes by.
//
// Each sum is added in the depth's order whatever the block, so that a row's bits do not depend on the rows beside it.
#pragma once

#include <stdexcept>

namespace r1pipe {

constexpr int64_t EIGHT = 8;  // floats of a register

// Sums of ROWS x (8 * COLUMNS) outputs; `outputs` of them are there.
template <int ROWS, int COLUMNS>
[[gnu::noinline]] void block_product(const float* in, int64_t in_stride, int64_t depth, const float* panel, float* out,
                                     int64_t out_stride, int64_t outputs, bool add) {
  __m256 sum[ROWS][COLUMNS];
  const bool whole = outputs >= COLUMNS * EIGHT;
  float edge[ROWS][COLUMNS * EIGHT];
  if (!whole && add)
    for (int r = 0; r < ROWS; r++) std::copy_n(out + r * out_stride, outputs, edge[r]);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; c++)
      sum[r][c] = add ? _mm256_loadu_ps((whole ? out + r * out_stride : edge[r]) + c * EIGHT) : _mm256_setzero_ps();
  for (int64_t k = 0; k < depth; k++) {
    __m256 w[COLUMNS];
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; c++) w[c] = _mm256_loadu_ps(panel + k * PANEL + c * EIGHT);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const __m256 x = _mm256_set1_ps(in[r * in_stride + k]);
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; c++) sum[r][c] = _mm256_fmadd_ps(x, w[c], sum[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; c++) _mm256_storeu_ps((whole ? out + r * out_stride : edge[r]) + c * EIGHT, sum[r][c]);
  if (!whole)
    for (int r = 0; r < ROWS; r++) std::copy_n(edge[r], outputs, out + r * out_stride);
}

// out [rows, outputs] (+)= in [rows, depth] * weight^T; `in_stride` and `out_stride` are those between rows.
template <typename T>
inline void multiply(const T* in, int64_t in_stride, int64_t rows, const Packed<T>& weight, float* out,
                     int64_t out_stride, bool add = false) {
  const auto blocks = [&]<int ROWS, int COLUMNS>(int64_t row) {
    for (int64_t first = 0; first < weight.outputs; first += COLUMNS * EIGHT)
      block_product<ROWS, COLUMNS>(in + row * in_stride, in_stride, weight.depth,
                                   weight.data + first / PANEL * PANEL * weight.depth + first % PANEL,
                                   out + row * out_stride + first, out_stride, weight.outputs - first, add);
  };
  int64_t row = 0;
  for (; row + 6 <= rows; row += 6) blocks.template operator()<6, 2>(row);
  switch (rows - row) {
    case 5: return blocks.template operator()<5, 2>(row);
    case 4: return blocks.template operator()<4, 2>(row);
    case 3: return blocks.template operator()<3, 4>(row);
    case 2: return blocks.template operator()<2, 4>(row);
    case 1: return blocks.template operator()<1, 8>(row);
  }
}

inline void release_tiles(bool = true) {}

}  // namespace r1pipe
