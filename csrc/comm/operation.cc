#include "comm/operation.h"

#include <cstring>

#include "base/crc32c.h"
#include "base/error.h"

namespace roundel::comm {
namespace {

void expect_count(const char* what, size_t expected, size_t came, int rank, const char* kind) {
  if (expected != came)
    throw InvalidArgument(format("rank %d: %s: expected %s of %zu elements, got %zu", rank, kind, what, expected, came));
}

}  // namespace

size_t Operation::count() const {
  switch (kind) {
    case OpKind::ReduceScatter:
    case OpKind::AllGather:
      return parts.total();
    case OpKind::PointToPoint:
      return sends() ? in.count : out.count;
    default:
      return out.count;
  }
}

kernels::Finish Operation::finish(int size) const {
  if (op != ReduceOp::Average) return {postscale, 1};
  if (is_floating(out.dtype)) return {postscale / size, 1};
  return {postscale, size};
}

std::string Operation::describe() const {
  std::string text = name_of(kind);
  if (!name.empty()) text += " '" + name + "'";
  if (kind == OpKind::PointToPoint) return format("%s %s rank %d", sends() ? "send" : "recv", sends() ? "to" : "from", root);
  return text + format(" (operation %llu)", static_cast<unsigned long long>(sequence));
}

void validate(const Operation& o, int rank, int size) {
  const char* kind = name_of(o.kind);
  if (o.in.data != nullptr && o.out.data != nullptr && o.in.dtype != o.out.dtype)
    throw InvalidArgument(format("rank %d: %s: expected input and output of one dtype, got %s and %s", rank, kind,
                                 name_of(o.in.dtype), name_of(o.out.dtype)));
  if (o.root < 0 || o.root >= size)
    throw InvalidArgument(format("rank %d: %s: expected a rank from 0 to %d, got %d", rank, kind, size - 1, o.root));
  const bool reduces = o.kind == OpKind::AllReduce || o.kind == OpKind::ReduceScatter;
  if (reduces && o.out.dtype == DType::Bool && o.op == ReduceOp::Average)
    throw InvalidArgument(
        format("rank %d: %s: bool has no average; use sum (or), max (or), min (and) or product (and)", rank, kind));
  const bool overlap = o.in.data != o.out.data && o.in.at(0) < o.out.at(o.out.count) && o.out.at(0) < o.in.at(o.in.count);
  switch (o.kind) {
    case OpKind::AllReduce:
    case OpKind::Broadcast:
      expect_count("an output", o.in.count, o.out.count, rank, kind);
      break;
    case OpKind::ReduceScatter:
      expect_count("an input", o.parts.total(), o.in.count, rank, kind);
      expect_count("an output", o.parts.count(rank), o.out.count, rank, kind);
      break;
    case OpKind::AllGather:
      expect_count("an input", o.parts.count(rank), o.in.count, rank, kind);
      expect_count("an output", o.parts.total(), o.out.count, rank, kind);
      break;
    case OpKind::AllToAll:
      expect_count("an output", o.in.count, o.out.count, rank, kind);
      if (o.in.count % static_cast<size_t>(size) != 0)
        throw InvalidArgument(
            format("rank %d: %s: expected a count divisible by %d ranks, got %zu elements", rank, kind, size, o.in.count));
      if (o.in.data == o.out.data && o.in.count > 0)
        throw InvalidArgument(format("rank %d: %s: expected an output apart from the input", rank, kind));
      break;
    case OpKind::PointToPoint:
      if (o.root == rank) throw InvalidArgument(format("rank %d: %s: expected another rank, got this one", rank, kind));
      break;
    case OpKind::Barrier:
      break;
  }
  const bool may_contain =
      o.kind == OpKind::AllGather || o.kind == OpKind::ReduceScatter;  // a part of the whole is checked below
  if (overlap && !may_contain)
    throw InvalidArgument(format("rank %d: %s: input and output overlap without being the same", rank, kind));
  if (overlap && o.kind == OpKind::ReduceScatter)
    throw InvalidArgument(format("rank %d: %s: expected an output apart from the input", rank, kind));
  if (overlap && o.kind == OpKind::AllGather && o.in.data != o.out.at(o.parts.begin(rank)))
    throw InvalidArgument(
        format("rank %d: %s: expected an input apart from the output, or at its place inside it", rank, kind));
}

Signature sign(const Operation& o) {
  Signature s;
  s.kind = o.kind;
  if (o.kind == OpKind::Barrier) return s;
  s.dtype = o.in.data != nullptr ? o.in.dtype : o.out.dtype;
  s.count = o.count();
  if (o.kind == OpKind::PointToPoint) return s;
  s.op = o.op;
  s.root = o.kind == OpKind::Broadcast ? static_cast<uint16_t>(o.root) : 0;
  const double scales[2] = {o.prescale, o.postscale};
  uint32_t hash = crc32c(o.name.data(), o.name.size());
  hash = crc32c(scales, sizeof scales, hash);
  hash = crc32c(o.shape.data(), o.shape.size() * sizeof(int64_t), hash);
  if (o.kind == OpKind::ReduceScatter || o.kind == OpKind::AllGather)
    for (int r = 0; r < o.parts.size(); ++r) {
      const uint64_t count = o.parts.count(r);
      hash = crc32c(&count, sizeof count, hash);
    }
  s.salt = static_cast<uint16_t>(hash ^ hash >> 16);
  return s;
}

}  // namespace roundel::comm
