// All-to-all, each block sent once from its source to its destination: (P-1)/P * n elements per rank, optimal.
//
//   direct     1 round, all peers at once
//   pairwise   P-1 rounds, in round s with the ranks s ahead and s behind: one peer at a time, where a network drops or delays
//              what converges
//
// Thakur, Rabenseifner & Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005. The uneven
// all-to-all is the same with lengths from a matrix; what is empty is no message.
#include <algorithm>

#include "base/error.h"
#include "plan/algorithms.h"
#include "plan/builder.h"

namespace roundel::plan {
namespace {

// What this rank has for everyone and where it puts what comes from everyone.
struct Blocks {
  std::vector<Place> in, out;
};

Blocks even_blocks(const Shape& shape) {
  Blocks blocks;
  for (int r = 0; r < shape.size; ++r) {
    ROUNDEL_CHECK(shape.parts.count(r) == shape.parts.count(0));
    blocks.in.push_back(in(shape.parts.begin(r), shape.parts.count(r)));
    blocks.out.push_back(shape.parts[r]);
  }
  return blocks;
}

Blocks uneven_blocks(const Shape& shape) {
  ROUNDEL_CHECK(shape.sends.size() == static_cast<size_t>(shape.size) * static_cast<size_t>(shape.size));
  Blocks blocks;
  size_t in_begin = 0, out_begin = 0;
  for (int r = 0; r < shape.size; ++r) {
    blocks.in.push_back(in(in_begin, shape.sent(shape.rank, r)));
    blocks.out.push_back(out(out_begin, shape.sent(r, shape.rank)));
    in_begin += blocks.in.back().count;
    out_begin += blocks.out.back().count;
  }
  return blocks;
}

Plan exchange(const Shape& shape, const Blocks& blocks, bool one_peer_at_a_time) {
  Builder plan;
  const auto at = [](int r) { return static_cast<size_t>(r); };
  plan.add(copy(blocks.out[at(shape.rank)], blocks.in[at(shape.rank)]));
  for (int s = 1; s < shape.size; ++s) {
    const int to = (shape.rank + s) % shape.size, from = (shape.rank - s + shape.size) % shape.size;
    if (one_peer_at_a_time) plan.begin_round();
    plan.add(send(to, blocks.in[at(to)]));
    plan.add(recv(from, blocks.out[at(from)]));
  }
  return plan.take(true);
}

Cost even_cost(const Shape& shape, bool one_peer_at_a_time) {
  const size_t others = static_cast<size_t>(shape.size - 1), count = shape.parts.count(0);
  if (others == 0 || count == 0) return {};
  return {.rounds = one_peer_at_a_time ? others : 1, .elements_sent = others * count, .messages = 2 * others};
}

Cost uneven_cost(const Shape& shape, bool one_peer_at_a_time) {
  Cost most;
  if (shape.sends.empty()) return most;
  std::vector<Cost> costs(static_cast<size_t>(shape.size));
  for (int s = 1; s < shape.size; ++s) {
    const std::vector<Cost> before = costs;
    for (int rank = 0; rank < shape.size; ++rank) {
      const int to = (rank + s) % shape.size, from = (rank - s + shape.size) % shape.size;
      const size_t out = shape.sent(rank, to), in = shape.sent(from, rank);
      Cost& cost = costs[static_cast<size_t>(rank)];
      cost.elements_sent += out;
      cost.messages += (out > 0 ? 1u : 0u) + (in > 0 ? 1u : 0u);
      if (out + in == 0) continue;
      // A round begins when both ends have come to it.
      size_t begin = cost.rounds;
      if (out > 0) begin = std::max(begin, before[static_cast<size_t>(to)].rounds);
      if (in > 0) begin = std::max(begin, before[static_cast<size_t>(from)].rounds);
      cost.rounds = one_peer_at_a_time ? begin + 1 : 1;
    }
  }
  for (const Cost& cost : costs) most.take_max(cost);
  return most;
}

}  // namespace

constinit const Algorithm direct_alltoall = {
    .name = "direct",
    .collective = Collective::AllToAll,
    .make = [](const Shape& shape) { return exchange(shape, even_blocks(shape), false); },
    .cost = [](const Shape& shape) { return even_cost(shape, false); },
    .single_fold = true,
};

constinit const Algorithm pairwise_alltoall = {
    .name = "pairwise",
    .collective = Collective::AllToAll,
    .make = [](const Shape& shape) { return exchange(shape, even_blocks(shape), true); },
    .cost = [](const Shape& shape) { return even_cost(shape, true); },
    .single_fold = true,
};

constinit const Algorithm direct_alltoallv = {
    .name = "direct",
    .collective = Collective::AllToAllV,
    .make = [](const Shape& shape) { return exchange(shape, uneven_blocks(shape), false); },
    .cost = [](const Shape& shape) { return uneven_cost(shape, false); },
    .single_fold = true,
};

constinit const Algorithm pairwise_alltoallv = {
    .name = "pairwise",
    .collective = Collective::AllToAllV,
    .make = [](const Shape& shape) { return exchange(shape, uneven_blocks(shape), true); },
    .cost = [](const Shape& shape) { return uneven_cost(shape, true); },
    .single_fold = true,
};

}  // namespace roundel::plan
