// Element types and reduction operators: the two enums that every layer speaks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace roundel {

enum class DType : uint8_t { Float32, Float64, Float16, BFloat16, Int8, Int16, Int32, Int64, UInt8, Bool };
inline constexpr int kDTypes = 10;

constexpr size_t size_of(DType dtype) {
  constexpr size_t sizes[kDTypes] = {4, 8, 2, 2, 1, 2, 4, 8, 1, 1};
  return sizes[static_cast<int>(dtype)];
}

constexpr const char* name_of(DType dtype) {
  constexpr const char* names[kDTypes] = {"float32", "float64", "float16", "bfloat16", "int8",
                                          "int16",   "int32",   "int64",   "uint8",    "bool"};
  return names[static_cast<int>(dtype)];
}

constexpr bool is_floating(DType dtype) { return dtype <= DType::BFloat16; }
constexpr bool is_half(DType dtype) { return dtype == DType::Float16 || dtype == DType::BFloat16; }

// Average is Sum followed by a division by the number of ranks; only the comm layer knows it, kernels see Sum.
enum class ReduceOp : uint8_t { Sum, Average, Min, Max, Product };
inline constexpr int kReduceOps = 5;

constexpr const char* name_of(ReduceOp op) {
  constexpr const char* names[kReduceOps] = {"sum", "average", "min", "max", "product"};
  return names[static_cast<int>(op)];
}

}  // namespace roundel
