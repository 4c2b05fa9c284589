// Stacks of weights in the order of gemm.h's Packed, for kernels/forward.py.
#include "blocks.h"

using namespace r1pipe;

// weights [stack, outputs, depth] -> [stack, outputs / 64 rounded up, depth, 64]; what no output fills is left as it is
extern "C" void r1pipe_pack(int64_t bf16, const void* weights, int64_t stack, int64_t outputs, int64_t depth, void* to) {
  with_type(bf16, [&]<typename T>() {
    const int64_t size = up_to(outputs, PANEL) * depth;
#pragma omp parallel for
    for (int64_t i = 0; i < stack; i++) {
      const auto rows = rows_of(static_cast<const T*>(weights) + i * outputs * depth, depth, outputs);
      pack_outputs(rows.data(), outputs, depth, static_cast<T*>(to) + i * size);
    }
  });
}
