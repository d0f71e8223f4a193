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

constexpr int64_t kFused = -1;  // before the members' shapes; no array has a dimension like it

// `alike`: where the input must be if it overlaps the output; null: nowhere.
void expect_alike(const View& in, const View& out, const void* alike, int rank, const char* kind) {
  if (in.dtype != out.dtype)
    throw InvalidArgument(format("rank %d: %s: expected input and output of one dtype, got %s and %s", rank, kind,
                                 name_of(in.dtype), name_of(out.dtype)));
  const bool overlap = in.at(0) < out.at(out.count) && out.at(0) < in.at(in.count);
  if (!overlap || in.data == alike) return;
  throw InvalidArgument(format("rank %d: %s: input and output overlap; expected %s", rank, kind,
                               alike == nullptr ? "them apart" : "them apart, or the one at its place in the other"));
}

}  // namespace

DType Operation::dtype() const {
  if (kind == OpKind::Scatter) return out.dtype;
  if (kind == OpKind::PointToPoint) return sends_data() ? in.dtype : out.dtype;
  return in.dtype;
}

size_t Operation::count() const {
  switch (kind) {
    case OpKind::ReduceScatter:
    case OpKind::AllGather:
    case OpKind::Gather:
    case OpKind::Scatter:
      return parts.total();
    case OpKind::AllToAllV:
    case OpKind::Barrier:
      return 0;
    case OpKind::PointToPoint:
      return sends_data() ? in.count : out.count;
    default:
      return in.count;
  }
}

void Operation::fuse(const View& from, const View& to, const std::vector<int64_t>& of_shape, size_t position) {
  if (members.empty()) shape.push_back(kFused);
  members.emplace_back(from, to);
  in.count += from.count;
  out.count += to.count;
  shape.push_back(static_cast<int64_t>(position));
  shape.push_back(static_cast<int64_t>(of_shape.size()));
  shape.insert(shape.end(), of_shape.begin(), of_shape.end());
}

kernels::Finish Operation::finish(int size) const {
  if (op != ReduceOp::Average) return {postscale, 1};
  if (is_floating(dtype())) return {postscale / size, 1};
  return {postscale, size};
}

std::string Operation::describe() const {
  std::string text = name_of(kind);
  if (!name.empty()) text += " '" + name + "'";
  if (kind == OpKind::PointToPoint)
    return format("%s %s rank %d", sends_data() ? "send" : "recv", sends_data() ? "to" : "from", root);
  return text + format(" (operation %llu)", static_cast<unsigned long long>(sequence));
}

void validate(const Operation& o, int rank, int size) {
  const char* kind = name_of(o.kind);
  if (o.root < 0 || o.root >= size)
    throw InvalidArgument(format("rank %d: %s: expected a rank from 0 to %d, got %d", rank, kind, size - 1, o.root));
  if (reduces(o.kind) && o.dtype() == DType::Bool && o.op == ReduceOp::Average)
    throw InvalidArgument(
        format("rank %d: %s: bool has no average; use sum (or), max (or), min (and) or product (and)", rank, kind));
  const bool at_root = rank == o.root;
  bool reads = true, writes = true;
  size_t in = o.in.count, out = o.in.count;  // expected
  const void* alike = nullptr;               // where the input must be if the buffers overlap
  switch (o.kind) {
    case OpKind::AllReduce:
    case OpKind::Broadcast:
      alike = o.out.data;
      break;
    case OpKind::Reduce:
      writes = at_root;
      alike = o.out.data;
      break;
    case OpKind::ReduceScatter:
      in = o.parts.total();
      out = o.parts.count(rank);
      break;
    case OpKind::AllGather:
    case OpKind::Gather:
      writes = o.kind == OpKind::AllGather || at_root;
      in = o.parts.count(rank);
      out = o.parts.total();
      if (writes) alike = o.out.at(o.parts.begin(rank));
      break;
    case OpKind::Scatter:
      reads = at_root;
      in = o.parts.total();
      out = o.parts.count(rank);
      alike = o.out.at(0) - o.parts.begin(rank) * size_of(o.out.dtype);
      break;
    case OpKind::AllToAll:
      if (o.in.count % static_cast<size_t>(size) != 0)
        throw InvalidArgument(
            format("rank %d: %s: expected a count divisible by %d ranks, got %zu elements", rank, kind, size, o.in.count));
      in = o.parts.total();
      break;
    case OpKind::AllToAllV:
      in = o.sends.total();
      out = o.parts.total();
      if (o.sends.count(rank) != o.parts.count(rank))
        throw InvalidArgument(format("rank %d: %s: expected as many elements from this rank as go to it, got %zu and %zu", rank,
                                     kind, o.parts.count(rank), o.sends.count(rank)));
      break;
    case OpKind::PointToPoint:
      if (at_root) throw InvalidArgument(format("rank %d: %s: expected another rank, got this one", rank, kind));
      return;
    case OpKind::Barrier:
      return;
  }
  for (const auto& [from, to] : o.members) {
    expect_count("an output", from.count, to.count, rank, kind);
    expect_alike(from, to, to.data, rank, kind);
    if (from.dtype != o.in.dtype)
      throw InvalidArgument(
          format("rank %d: %s: expected members of dtype %s, got %s", rank, kind, name_of(o.in.dtype), name_of(from.dtype)));
  }
  if (reads) expect_count("an input", in, o.in.count, rank, kind);
  if (writes) expect_count("an output", out, o.out.count, rank, kind);
  if (reads && writes) expect_alike(o.in, o.out, alike, rank, kind);
}

Signature sign(const Operation& o) {
  Signature s;
  s.kind = o.kind;
  if (o.kind == OpKind::Barrier) return s;
  s.dtype = o.dtype();
  s.count = o.count();
  if (o.kind == OpKind::PointToPoint) return s;
  if (reduces(o.kind)) s.op = o.op;
  if (has_root(o.kind)) s.root = static_cast<uint16_t>(o.root);
  const double scales[2] = {o.prescale, o.postscale};
  uint32_t hash = crc32c(o.name.data(), o.name.size());
  hash = crc32c(scales, sizeof scales, hash);
  hash = crc32c(o.shape.data(), o.shape.size() * sizeof(int64_t), hash);
  if (has_parts(o.kind)) hash = crc32c(o.parts.offsets().data(), o.parts.offsets().size() * sizeof(size_t), hash);
  s.salt = static_cast<uint16_t>(hash ^ hash >> 16);
  return s;
}

}  // namespace roundel::comm
