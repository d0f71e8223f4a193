// What is done to elements. Every function is pure, thread-safe and blocking; buffers need only their element's alignment.
// Cost: one pass over memory. Bits: the same on every ISA path (no contraction, one order of summation).
// ROUNDEL_ISA forces a path; the first call of any function throws InvalidArgument when that path is not to be had.
#pragma once

#include <span>

#include "base/dtype.h"

namespace roundel::kernels {

// Done to every reduced element in the pass that completes it: x * scale (floating, whatever the divisor), or
// trunc(x / divisor * scale) (integers, in float64 when scale != 1). An integer result out of range becomes the nearest value
// in it; sums and products of integers wrap around before that. bool has no finish.
struct Finish {
  double scale = 1;
  int64_t divisor = 1;
  bool identity() const { return scale == 1 && divisor == 1; }
};

// out[i] = finish(in[0][i] op in[1][i] op ... in[n-1][i]), folded in that order; 16-bit types accumulate in float32 and round
// once. `out` may be identical to any of the inputs, but not overlap one otherwise. n >= 1. ReduceOp::Average is not a kernel's
// business. bool: sum and max are "or", product and min are "and". Min and max hand on a NaN. Where two NaNs meet in a sum or a
// product, whose payload survives is not promised.
void reduce(ReduceOp op, DType dtype, void* out, std::span<const void* const> in, size_t count, Finish finish = {});

// out[i] = in[i] * factor, in float32 for 16-bit types, in float64 and truncated for integers; bool is copied. In place is
// allowed.
void scale(DType dtype, void* out, const void* in, size_t count, double factor);

// out[i] = (to) in[i] between the floating types, rounding to nearest even; in place only when the sizes are equal.
void cast(DType to, void* out, DType from, const void* in, size_t count);

// Of two vectors of float32 or float64, products and sums in float64.
struct Dots {
  double aa = 0, ab = 0, bb = 0;
};
Dots dots(DType dtype, const void* a, const void* b, size_t count);

// out[i] = x * a[i] + y * b[i], of float32 or float64, in float64 and rounded once; `out` may be a or b.
void combine(DType dtype, void* out, const void* a, const void* b, size_t count, double x, double y);

// The path in use: "avx512", "avx2" or "portable".
const char* isa();

}  // namespace roundel::kernels
