// The reduction operators and what follows them, once for CPU and CUDA, for one element or for a vector of them.
// Integers wrap around, and saturate where a scaled result leaves their range. Which NaN survives when two meet in a sum or a
// product is the processor's choice; min and max keep the first.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "kernels/isa.h"

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

template <class T, bool = std::is_integral_v<T>>
struct Arithmetic {
  HOST_DEVICE static T add(T a, T b) { return a + b; }
  HOST_DEVICE static T multiply(T a, T b) { return a * b; }
};

template <class T>
struct Arithmetic<T, true> {
  // Unsigned and at least as wide as int: overflow is defined, and the promotion of uint16_t to int cannot undo that.
  using Wide = std::conditional_t<(sizeof(T) < 4), uint32_t, std::make_unsigned_t<T>>;
  HOST_DEVICE static T add(T a, T b) { return static_cast<T>(static_cast<Wide>(a) + static_cast<Wide>(b)); }
  HOST_DEVICE static T multiply(T a, T b) { return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b)); }
};

struct Sum {
  template <class T>
  HOST_DEVICE T operator()(T a, T b) const {
    return Arithmetic<T>::add(a, b);
  }
};

struct Product {
  template <class T>
  HOST_DEVICE T operator()(T a, T b) const {
    return Arithmetic<T>::multiply(a, b);
  }
};

// Written so that for floats it is the processor's min or max instruction, and a blend where the first is a NaN.
struct Min {
  template <class T>
  HOST_DEVICE T operator()(T a, T b) const {
    return a != a ? a : a < b ? a : b;
  }
};

struct Max {
  template <class T>
  HOST_DEVICE T operator()(T a, T b) const {
    return a != a ? a : a > b ? a : b;
  }
};

// bool, one byte each: any value but 0 is true, and the result is 0 or 1.
struct Or {
  HOST_DEVICE uint8_t operator()(uint8_t a, uint8_t b) const { return (a | b) != 0; }  // `|`, `&`: no branch
};

struct And {
  HOST_DEVICE uint8_t operator()(uint8_t a, uint8_t b) const { return (a != 0) & (b != 0); }
};

// x1 op x2 op ... op xn, from the left.
template <class Op>
struct Fold {
  template <class T>
  HOST_DEVICE T operator()(T a) const {
    return a;
  }
  template <class T, class... Rest>
  HOST_DEVICE T operator()(T a, T b, Rest... rest) const {
    return (*this)(Op{}(a, b), rest...);
  }
};

// (x1 + ... + xn) * factor; with one operand the scaling alone. Scalar is the type that the arithmetic is done in.
template <class Scalar>
struct ScaledSum {
  Scalar factor;
  template <class... T>
  HOST_DEVICE auto operator()(T... x) const {
    return Fold<Sum>{}(x...) * factor;
  }
};

// Toward zero, to the nearest value that T has; NaN gives 0. Comparing first keeps the conversion defined, and so its bits.
template <class T>
HOST_DEVICE T truncate(double x) {
  constexpr double low = static_cast<double>(std::numeric_limits<T>::min());
  if constexpr (sizeof(T) == 8) {
    constexpr double high = 9223372036854774784.0;  // the largest double below 2^63
    const double clamped = x > high ? high : x < low ? low : x == x ? x : 0.0;
    return x > high ? std::numeric_limits<T>::max() : static_cast<T>(clamped);
  } else {
    constexpr double high = static_cast<double>(std::numeric_limits<T>::max());
    const double clamped = x > high ? high : x < low ? low : x == x ? x : 0.0;
    return static_cast<T>(static_cast<int32_t>(clamped));
  }
}

// trunc(x / divisor * scale) in float64. With scale 1 it is exact division for up to 32 bits: a quotient that is no integer is
// further from the next one than the rounding of a float64 can carry it. And float64 division has vector instructions.
template <class T>
struct ScaledQuotient {
  double divisor, scale;
  HOST_DEVICE T operator()(T x) const { return truncate<T>(static_cast<double>(x) / divisor * scale); }
};

// x / divisor for 64 bits, which a float64 does not hold.
struct Quotient {
  int64_t divisor;
  HOST_DEVICE int64_t operator()(int64_t x) const {
    constexpr int64_t low = std::numeric_limits<int64_t>::min(), high = std::numeric_limits<int64_t>::max();
    if (divisor == -1) return x == low ? high : -x;  // the processor traps on low / -1
    return x / divisor;
  }
};

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels
