// The product of packed weights on oneDNN's batch-reduce kernels, as torch ships them: AVX-512, and AMX where there is
// one.
#pragma once

#include <ATen/native/CPUBlas.h>

namespace r1pipe {

// out [rows, outputs] (+)= in [rows, depth] * weight^T; `in_stride` and `out_stride` are those between rows.
template <typename T>
inline void multiply(const T* in, int64_t in_stride, int64_t rows, const Packed<T>& weight, float* out,
                     int64_t out_stride, bool add = false) {
  for (int64_t first = 0; first < weight.outputs; first += PANEL) {
    const int64_t outputs = std::min(PANEL, weight.outputs - first);
    at::native::cpublas::brgemm(rows, outputs, weight.depth, in_stride, PANEL, out_stride, add, in,
                                weight.data + first * weight.depth, out + first, sizeof(T) == 2);
  }
}

inline void release_tiles(bool bf16 = true) { at::native::cpublas::brgemm_release(bf16); }

}  // namespace r1pipe
