// One collective call of one rank, with its buffers' types erased.
#pragma once

#include <string>
#include <vector>

#include "base/clock.h"
#include "base/signature.h"
#include "base/view.h"
#include "kernels/kernels.h"
#include "plan/plan.h"

namespace roundel::comm {

// Buffers by kind (counts in elements, `parts` per rank):
//   AllReduce      in, out: the same count; out may be in
//   ReduceScatter  in: parts.total(), out: parts.count(rank)
//   AllGather      in: parts.count(rank), out: parts.total(); in may be its part of out
//   Broadcast      in: read at root, out: written elsewhere; may be the same
//   AllToAll       in, out: parts.total(), equal parts; out must not be in
//   Reduce         in: everywhere, out: the same count at root, where it may be in; none elsewhere
//   Gather         in: parts.count(rank), out: parts.total() at root, none elsewhere; in may be its part of out
//   Scatter        in: parts.total() at root, none elsewhere; out: parts.count(rank), at root it may be its part of in
//   AllToAllV      in: sends.total(), out: parts.total(); sends.count(r) elements go to rank r, parts.count(r) come from it
//   PointToPoint   in: what is sent, or out: where it is received; root is the peer
// When the steps of a fused operation began, for whoever wants to know.
struct Phases {
  Clock::time_point pack, exchange, unpack, end;
};

struct Operation {
  OpKind kind = OpKind::Barrier;
  View in, out;
  ReduceOp op = ReduceOp::Sum;
  double prescale = 1, postscale = 1;
  int root = 0;
  plan::Parts parts;
  plan::Parts sends;           // AllToAllV
  std::vector<int64_t> shape;  // AllReduce, Broadcast: of the array, or of all members; only compared between ranks
  std::string name;
  std::vector<std::pair<View, View>> members;  // of a fused AllReduce, whose own buffers the communicator provides
  double timeout = 0;                          // seconds; 0: ROUNDEL_TIMEOUT
  Phases* phases = nullptr;                    // filled in when it is fused

  // Filled in by the communicator.
  uint64_t sequence = 0;
  uint64_t record = 0;  // its number in the flight recorder
  Signature signature;
  Deadline deadline;

  // Adds an all-reduce of the same op, scales and dtype, the `position`-th of its call, to this one. The positions are part of
  // what ranks must agree on.
  void fuse(const View& from, const View& to, const std::vector<int64_t>& shape, size_t position);
  bool sends_data() const { return kind == OpKind::PointToPoint && in.data != nullptr; }
  DType dtype() const;
  size_t count() const;  // the elements that all ranks agree on; of an AllToAllV there is no such number
  size_t bytes() const { return count() * size_of(dtype()); }
  kernels::Finish finish(int size) const;  // average and postscale, done in the completing pass
  ReduceOp kernel_op() const { return op == ReduceOp::Average ? ReduceOp::Sum : op; }
  std::string describe() const;  // "all-reduce 'fc.weight' (operation 17)"
};

// Checks counts, parts, root and op against `size` and `rank`; throws InvalidArgument saying what was expected and what came.
void validate(const Operation& operation, int rank, int size);

// Everything that must be equal on all ranks, in 16 bytes.
Signature sign(const Operation& operation);

}  // namespace roundel::comm
