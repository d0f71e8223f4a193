// Bruck's algorithms, ceil(log2 P) rounds for any P, for small messages at many ranks.
//
// Bruck, Ho, Kipnis, Upfal & Weathersby, "Efficient algorithms for all-to-all communications in multiport message-passing
// systems", IEEE TPDS 1997.
//
//   all-gather   ceil(log2 P) rounds, (P-1)/P * n elements: in round k all that a rank has goes to the rank 2^k before it. The
//                parts of a rank are a window of those from its own on, at their places in Out: no rotation in the end, but
//                a window that goes past the last rank is two messages
//   all-to-all   ceil(log2 P) rounds, about log2(P)/2 * n elements: a block that has i ranks to go travels 2^k in every round k
//   of
//                which bit k of i is set, together with all others that do
//
// Messages take up what several brought, so these plans run in one piece.
#include <algorithm>
#include <bit>

#include "base/error.h"
#include "plan/algorithms.h"
#include "plan/builder.h"
#include "plan/direct.h"

namespace roundel::plan {
namespace {

// Parts of `count` ranks from `first` on, around the end: one place or two.
std::vector<Place> window(const Parts& parts, int first, int count) {
  const int size = parts.size(), begin = first % size, end = begin + count;
  if (end <= size) return {parts.run(begin, end)};
  return {parts.run(begin, size), parts.run(0, end - size)};
}

Plan make_allgather(const Shape& shape) {
  Builder plan;
  for (int have = 1; have < shape.size; have *= 2) {
    const int count = std::min(have, shape.size - have);
    const int to = (shape.rank - have + shape.size) % shape.size, from = (shape.rank + have) % shape.size;
    plan.begin_round();
    for (const Place& place : window(shape.parts, shape.rank, count)) plan.add(send(to, place));
    for (const Place& place : window(shape.parts, from, count)) plan.add(recv(from, place));
  }
  return plan.take(true, true);
}

Cost cost_of_allgather(const Shape& shape) {
  if (shape.parts.total() == 0) return {};
  Cost most;
  for (int rank = 0; rank < shape.size; ++rank) {
    Cost cost;
    for (int have = 1; have < shape.size; have *= 2) {
      const int count = std::min(have, shape.size - have);
      const Amount out = amounts({window(shape.parts, rank, count)})[0];
      const Amount in = amounts({window(shape.parts, rank + have, count)})[0];
      cost = cost + Cost{1, out.elements, out.places + in.places, 0};
    }
    most.take_max(cost);
  }
  return most;
}

// Block i of a rank is the one that has i ranks to go from it. Those that come in a round stay where they were received until a
// later round, or the end, takes them up.
Plan make_alltoall(const Shape& shape) {
  const int size = shape.size;
  const size_t count = shape.parts.count(0);
  for (int r = 0; r < size; ++r) ROUNDEL_CHECK(shape.parts.count(r) == count);
  std::vector<Place> block;
  for (int i = 0; i < size; ++i) block.push_back(in(shape.parts.begin((shape.rank + i) % size), count));

  Builder plan;
  const Place packed = plan.scratch(static_cast<size_t>(size / 2) * count);
  for (int hop = 1; hop < size; hop *= 2) {
    std::vector<Place*> going;
    for (int i = hop; i < size; ++i)
      if (i & hop) going.push_back(&block[static_cast<size_t>(i)]);
    const Place outgoing{Buffer::Scratch, packed.begin, going.size() * count}, incoming = plan.scratch(outgoing.count);
    plan.begin_round();
    for (size_t k = 0; k < going.size(); ++k) {
      plan.add(copy({Buffer::Scratch, outgoing.begin + k * count, count}, *going[k]));
      *going[k] = {Buffer::Scratch, incoming.begin + k * count, count};
    }
    plan.exchange(send((shape.rank + hop) % size, outgoing), recv((shape.rank - hop + size) % size, incoming));
  }
  plan.begin_round();
  for (int i = 0; i < size; ++i) plan.add(copy(shape.parts[(shape.rank - i + size) % size], block[static_cast<size_t>(i)]));
  return plan.take(true, true);
}

Cost cost_of_alltoall(const Shape& shape) {
  if (shape.parts.total() == 0) return {};
  Cost cost;
  for (int hop = 1; hop < shape.size; hop *= 2) {
    size_t going = 0;
    for (int i = hop; i < shape.size; ++i) going += i & hop ? 1 : 0;
    cost = cost + Cost{1, going * shape.parts.count(0), 2, 0};
  }
  return cost;
}

}  // namespace

constinit const Algorithm bruck_allgather = {
    .name = "bruck",
    .collective = Collective::AllGather,
    .make = make_allgather,
    .cost = cost_of_allgather,
    .single_fold = true,
    .nested = true,
};

constinit const Algorithm bruck_alltoall = {
    .name = "bruck",
    .collective = Collective::AllToAll,
    .make = make_alltoall,
    .cost = cost_of_alltoall,
    .single_fold = true,
    .nested = true,
};

}  // namespace roundel::plan
