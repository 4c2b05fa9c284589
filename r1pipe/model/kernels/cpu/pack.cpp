// For kernels/build.py and model/native.py: whether products run, and packing of weights in gemm.h's order.
#include <exception>

#include "blocks.h"

using namespace r1pipe;

// Whether products run with this torch and processor: there may be none of bfloat16, and oneDNN, or its use of AVX-512,
// may be switched off.
extern "C" int64_t r1pipe_multiplies(int64_t bf16) {
  try {
    with_type(bf16, [&]<typename T>() {
      alignas(64) T in[UNIT] = {}, weight[UNIT * PANEL] = {};
      float out[PANEL];
      multiply(in, UNIT, 1, Packed<T>{weight, PANEL, UNIT}, out, PANEL);
      release_tiles(bf16);
    });
    return 1;
  } catch (const std::exception&) {
    return 0;
  }
}

// weights [stack, outputs, depth] -> [stack, outputs / 64 rounded up, depth, 64]; places without an output stay unchanged
extern "C" void r1pipe_pack(int64_t bf16, const void* weights, int64_t stack, int64_t outputs, int64_t depth, void* to) {
  with_type(bf16, [&]<typename T>() {
    const int64_t size = up_to(outputs, PANEL) * depth;
    share(stack, [&](int64_t i) {
      const auto rows = rows_of(static_cast<const T*>(weights) + i * outputs * depth, depth, outputs);
      pack_outputs(rows.data(), outputs, depth, static_cast<T*>(to) + i * size);
    });
  });
}
