// The vocabulary of registers that the kernels are written in: 16 floats, or 16 words of 32 bits, whatever the
// processor has. Only simd_*.h and the product (brgemm.h, microkernel.h) know its instructions.
//
//   Floats, Words         16 numbers; + - * / are of each lane
//   Lanes                 the first so many lanes, which numbers fill at the end of a row: first_of(left), or ALL
//   Mask                  any of the lanes
//   HELD                  HELD x HELD Floats are sums that registers hold beside their operands
//   load, store           of floats, anywhere in memory; lanes that are not there are read as 0 and not written
//   multiply_add(a, b, c) a * b + c rounded once; multiply_subtract: a * b - c
//   smaller, larger       of two; the second where one is NaN
//   nearest(x)            rounded to a whole number, ties to even
#pragma once

#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace r1pipe {

using BFloat16 = c10::BFloat16;

constexpr int64_t UNIT = 16;  // numbers in a register; blocks of rows are padded to a multiple

}  // namespace r1pipe

#ifdef __AVX512BW__
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif

#ifdef __AVX512BF16__
#include "simd_bfloat16.h"
#else
namespace r1pipe {
constexpr bool PAIRS = false;  // whether there are products of bfloat16
}
#endif
