// What an operation is, in 16 bytes. It travels in every frame and stands beside every shared-memory flag, so that ranks that
// call different things find out from the first message instead of exchanging garbage.
#pragma once

#include <cstdint>
#include <string>

#include "base/dtype.h"

namespace roundel {

enum class OpKind : uint8_t {
  AllReduce,
  ReduceScatter,
  AllGather,
  Broadcast,
  AllToAll,
  Barrier,
  PointToPoint,
  Reduce,
  Gather,
  Scatter,
  AllToAllV
};
inline constexpr int kOpKinds = 11;
const char* name_of(OpKind kind);  // "all-reduce"

constexpr bool reduces(OpKind kind) {
  return kind == OpKind::AllReduce || kind == OpKind::ReduceScatter || kind == OpKind::Reduce;
}
constexpr bool has_root(OpKind kind) {
  return kind == OpKind::Broadcast || kind == OpKind::Reduce || kind == OpKind::Gather || kind == OpKind::Scatter;
}
// Whether all ranks know how many elements each one has.
constexpr bool has_parts(OpKind kind) {
  return kind == OpKind::ReduceScatter || kind == OpKind::AllGather || kind == OpKind::Gather || kind == OpKind::Scatter;
}

struct Signature {
  OpKind kind = OpKind::Barrier;
  DType dtype = DType::UInt8;
  ReduceOp op = ReduceOp::Sum;
  uint8_t algorithm = 0;  // index of the plan; ranks forced to different plans must not meet
  uint16_t root = 0;
  uint16_t salt = 0;   // hash of tensor name, shape, scale factors and parts
  uint64_t count = 0;  // elements

  bool operator==(const Signature&) const = default;
  // "all-reduce of 1024 float32, sum"
  std::string describe() const;
};
static_assert(sizeof(Signature) == 16);

}  // namespace roundel
