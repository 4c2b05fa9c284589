// Weights in the order of gemm.h's Packed. A unit is a float, or two neighbours of bfloat16: four bytes either way.
#include <algorithm>
#include <cstdint>

#include "gemm.h"

using r1pipe::PANEL;

// weights [stack, outputs, units] -> [stack, outputs / 64 rounded up, units, 64], zeros where there is no output
extern "C" void r1pipe_pack(const int32_t* weights, int64_t stack, int64_t outputs, int64_t units, int32_t* packed) {
  const int64_t panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for collapse(2)
  for (int64_t which = 0; which < stack; which++)
    for (int64_t panel = 0; panel < panels; panel++) {
      const int64_t first = panel * PANEL, there = std::min(PANEL, outputs - first);
      const int32_t* from = weights + (which * outputs + first) * units;
      int32_t* to = packed + (which * panels + panel) * units * PANEL;
      constexpr int64_t BLOCK = 16;  // units: a cache line of each output
      for (int64_t unit = 0; unit < units; unit += BLOCK) {
        const int64_t end = std::min(units, unit + BLOCK);
        for (int64_t output = 0; output < there; output++)
          for (int64_t u = unit; u < end; u++) to[u * PANEL + output] = from[output * units + u];
        for (int64_t u = unit; u < end; u++) std::fill(to + u * PANEL + there, to + (u + 1) * PANEL, 0);
      }
    }
}
