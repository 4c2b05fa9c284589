// The product of packed weights in AVX2: a block of sums stays in registers while the depth goes by.
//
// Each sum is added in the depth's order whatever the block, so that a row's bits do not depend on the rows beside it.
#pragma once

namespace r1pipe {

constexpr int64_t EIGHT = 8;  // floats of a register

// Sums of ROWS x (8 * COLUMNS) outputs, of which `outputs` are there.
template <int ROWS, int COLUMNS>
[[gnu::noinline]] void block_product(const float* in, int64_t in_stride, int64_t depth, const float* panel, float* out,
                                     int64_t out_stride, int64_t outputs, bool add) {
  constexpr int64_t WIDTH = COLUMNS * EIGHT;
  const bool whole = outputs >= WIDTH;
  float edge[ROWS * WIDTH];  // in place of outputs that are fewer
  float* to = whole ? out : edge;
  const int64_t stride = whole ? out_stride : WIDTH;
  if (!whole) std::fill_n(edge, ROWS * WIDTH, 0.0f);
  if (!whole && add)
    for (int r = 0; r < ROWS; r++) std::copy_n(out + r * out_stride, outputs, edge + r * WIDTH);
  __m256 sum[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; c++)
      sum[r][c] = add ? _mm256_loadu_ps(to + r * stride + c * EIGHT) : _mm256_setzero_ps();
#pragma GCC unroll 2  // else the loop's own instructions cost a fifth
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
    for (int c = 0; c < COLUMNS; c++) _mm256_storeu_ps(to + r * stride + c * EIGHT, sum[r][c]);
  if (!whole)
    for (int r = 0; r < ROWS; r++) std::copy_n(edge + r * WIDTH, outputs, out + r * out_stride);
}

// out [rows, outputs] (+)= in [rows, depth] * weight^T; `in_stride` and `out_stride` are those between rows. A panel
// stays in the inner caches while all rows go by.
template <typename T>
inline void multiply(const T* in, int64_t in_stride, int64_t rows, const Packed<T>& weight, float* out,
                     int64_t out_stride, bool add = false) {
  for (int64_t first = 0; first < weight.outputs; first += PANEL) {
    const int64_t outputs = std::min(PANEL, weight.outputs - first), whole = rows / 6 * 6;
    const T* panel = weight.data + first * weight.depth;
    const auto blocks = [&]<int ROWS, int COLUMNS>(int64_t begin, int64_t end) {
      for (int64_t c = 0; c < outputs; c += COLUMNS * EIGHT)
        for (int64_t row = begin; row < end; row += ROWS)
          block_product<ROWS, COLUMNS>(in + row * in_stride, in_stride, weight.depth, panel + c,
                                       out + row * out_stride + first + c, out_stride, outputs - c, add);
    };
    blocks.template operator()<6, 2>(0, whole);
    switch (rows - whole) {
      case 5: blocks.template operator()<5, 2>(whole, rows); break;
      case 4: blocks.template operator()<4, 2>(whole, rows); break;
      case 3: blocks.template operator()<3, 4>(whole, rows); break;
      case 2: blocks.template operator()<2, 4>(whole, rows); break;
      case 1: blocks.template operator()<1, 8>(whole, rows); break;
    }
  }
}

inline void release_tiles(bool = true) {}

}  // namespace r1pipe
