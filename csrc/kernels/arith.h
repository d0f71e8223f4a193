// What the optimizers' rules and roundings are written in: a few functions of a number, or of a register of numbers.
//
// Math<T> is specialized here for one number (CPU ends of buffers, CUDA threads) and in lanes_*.h for a register of them. Every
// function is correctly rounded or exact, so that all paths give the same bits. root_over(x, d) is root(x) / d, rounded twice.
#pragma once

#include <math.h>

#include <cstdint>

#include "kernels/isa.h"

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

template <class T>
struct Math;

template <>
struct Math<float> {
  using Scalar = float;
  using Bits = uint32_t;
  HOST_DEVICE static float splat(float x) { return x; }
  HOST_DEVICE static float fused(float a, float b, float c) { return ::fmaf(a, b, c); }  // a * b + c, rounded once
  HOST_DEVICE static float root(float x) { return ::sqrtf(x); }
  HOST_DEVICE static float root_over(float x, float divisor) { return root(x) / divisor; }
  HOST_DEVICE static float truncate(float x) { return static_cast<float>(static_cast<int32_t>(x)); }  // of |x| < 2^31
};

template <>
struct Math<double> {
  using Scalar = double;
  using Bits = uint32_t;
  HOST_DEVICE static double splat(double x) { return x; }
  HOST_DEVICE static double fused(double a, double b, double c) { return ::fma(a, b, c); }
  HOST_DEVICE static double root(double x) { return ::sqrt(x); }
  HOST_DEVICE static double root_over(double x, double divisor) { return root(x) / divisor; }
};

// Math<T>::root_over() where products and sums can be fused: three of those take a third of a division's time, and give the
// same bits unless something overflows or underflows. A root does not: it is 0, infinite or between 2^-75 and 2^64. Nor does a
// bias correction that is 1 - beta^step, or its root: 0, or between 2^-54 and 1. Brisebarre, Muller & Raina, "Accelerating
// correctly rounded floating-point division when the divisor is known in advance", IEEE Transactions on Computers 53(8), 2004.
template <class T>
HOST_DEVICE T root_over_by_fusing(T x, float divisor) {
  const T root = Math<T>::root(x);
  const T inverse = Math<T>::splat(1 / divisor);
  const T near = root * inverse;
  const T rest = Math<T>::fused(-near, Math<T>::splat(divisor), root);
  return near == Math<T>::splat(__builtin_inff()) ? near : Math<T>::fused(rest, inverse, near);
}

template <class T>
HOST_DEVICE T maximum(T a, T b) {  // a NaN stays
  return a != a ? a : (b <= a ? a : b);
}

template <class T>
HOST_DEVICE T sign(T x) {  // 0 and NaN stay what they are
  const T one = Math<T>::splat(1);
  return x > 0 ? one : (x < 0 ? -one : x);
}

// from + (to - from) * weight in the form that is exact at both ends, as torch.lerp.
template <class T>
HOST_DEVICE T lerp(T from, T to, typename Math<T>::Scalar weight) {
  if (weight < static_cast<typename Math<T>::Scalar>(0.5) && weight > static_cast<typename Math<T>::Scalar>(-0.5))
    return Math<T>::fused(Math<T>::splat(weight), to - from, from);
  return Math<T>::fused(Math<T>::splat(weight - 1), to - from, to);
}

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels
