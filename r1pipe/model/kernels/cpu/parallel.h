// Loops whose items are shared by OpenMP's threads, as torch's operators are.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace r1pipe {

// work(i) for every i in [0, items), in no order. A thread takes the next item when it has finished one: beside other
// processes, none waits for a share that another has not begun.
template <typename Work>
inline void share(int64_t items, const Work& work) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < items; i++) work(i);
}

// work(first, count) for blocks of rows.
template <typename Work>
inline void share_rows(int64_t rows, int64_t block, const Work& work) {
  share((rows + block - 1) / block, [&](int64_t i) { work(i * block, std::min(block, rows - i * block)); });
}

}  // namespace r1pipe
