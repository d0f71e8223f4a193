// No lanes of our own: the compiler makes vectors of the loops over single elements, with whatever the baseline has.
#pragma once

#include "kernels/arith.h"
#include "kernels/lane.h"

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

using Float16 = Float16Lane;
using BFloat16 = BFloat16Lane;

// For the optimizers (arith.h): registers of four, which every processor that we know has.
typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
constexpr int kFloats = 4;

template <>
struct Math<Floats> {
  using Scalar = float;
  using Bits = Words;
  HOST_DEVICE static Floats splat(float x) { return Floats{x, x, x, x}; }
  HOST_DEVICE static Floats fused(Floats a, Floats b, Floats c) {
    Floats result;
    for (int i = 0; i < kFloats; ++i) result[i] = ::fmaf(a[i], b[i], c[i]);
    return result;
  }
  HOST_DEVICE static Floats root(Floats x) {
    Floats result;
    for (int i = 0; i < kFloats; ++i) result[i] = ::sqrtf(x[i]);
    return result;
  }
  HOST_DEVICE static Floats root_over(Floats x, float divisor) { return root(x) / divisor; }
  HOST_DEVICE static Floats truncate(Floats x) {
    typedef int32_t Integers __attribute__((vector_size(16)));
    return __builtin_convertvector(__builtin_convertvector(x, Integers), Floats);
  }
};

// For sums of squares: float64 from narrower elements.
struct Doubles {
  double lane[kFloats];
};

HOST_DEVICE Doubles fused(const Doubles& a, const Doubles& b, Doubles c) {
  for (int i = 0; i < kFloats; ++i) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}

template <class Lane, class T>
struct AsDoubles {
  using Storage = T;
  using One = Lane;
  HOST_DEVICE static Doubles load_doubles(const T* from) {
    Doubles x;
    for (int i = 0; i < kFloats; ++i) x.lane[i] = static_cast<double>(Lane::load(from + i));
    return x;
  }
};
using SingleDoubles = AsDoubles<FloatLane, float>;
using Float16Doubles = AsDoubles<Float16Lane, uint16_t>;
using BFloat16Doubles = AsDoubles<BFloat16Lane, uint16_t>;

template <class Lane>
struct OneByOne {
  HOST_DEVICE static Floats load(const uint16_t* from) {
    return Floats{Lane::load(from), Lane::load(from + 1), Lane::load(from + 2), Lane::load(from + 3)};
  }
  HOST_DEVICE static void store(uint16_t* to, Floats x) {
    for (int i = 0; i < kFloats; ++i) Lane::store(to + i, x[i]);
  }
};

using Float16Register = OneByOne<Float16Lane>;
using BFloat16Register = OneByOne<BFloat16Lane>;

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels
