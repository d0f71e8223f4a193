// Recursive halving and doubling. Reduce-scatter: at each level a rank exchanges with a peer the half of its block that the
// peer goes on with, (P-1)/P * n elements sent in log2 P rounds and as many messages each way. All-gather is the way back.
// All-reduce is one after the other: 2 log2 P rounds, 2(P-1)/P * n elements; optimal in bytes and close to it in rounds.
//
// Rabenseifner, "Optimization of collective reduction operations", ICCS 2004; for any P by folding, Thakur, Rabenseifner &
// Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005. Folding costs 2 rounds and n elements
// more (all-gather: n back, reduce-scatter: n there).
//
// Blocks are nested, so these plans run in one piece.
#include "plan/halving.h"

#include <bit>

#include "plan/algorithms.h"

namespace roundel::plan {

Folding::Folding(int size)
    : power(static_cast<int>(std::bit_floor(static_cast<unsigned>(size)))),
      extra(size - power),
      levels(std::bit_width(static_cast<unsigned>(power)) - 1) {}

namespace {

// The halves of a seat's block at a level.
struct Halves {
  Place mine, theirs;
};
Halves halves(int seat, int level, const Parts& cut) {
  const int width = cut.size() >> (level + 1), mine = seat & ~(width - 1), theirs = mine ^ width;
  return {cut.run(mine, mine + width), cut.run(theirs, theirs + width)};
}

size_t some(size_t count) { return count > 0 ? 1 : 0; }

}  // namespace

void halve(Builder& plan, const Seat& seat, const Parts& cut) {
  const int levels = static_cast<int>(seat.peers.size());
  for (int level = 0; level < levels; ++level) {
    const int peer = seat.peers[static_cast<size_t>(level)];
    const auto [mine, theirs] = halves(seat.seat, level, cut);
    plan.exchange(send(peer, theirs), recv_reduce(peer, mine, level == levels - 1));
  }
}

void redouble(Builder& plan, const Seat& seat, const Parts& cut) {
  for (int level = static_cast<int>(seat.peers.size()) - 1; level >= 0; --level) {
    const int peer = seat.peers[static_cast<size_t>(level)];
    const auto [mine, theirs] = halves(seat.seat, level, cut);
    plan.exchange(send(peer, mine), recv(peer, theirs));
  }
}

Cost cost_of_halving(int seat, int levels, const Parts& cut) {
  Cost cost;
  for (int level = 0; level < levels; ++level) {
    const auto [mine, theirs] = halves(seat, level, cut);
    cost = cost + Cost{some(mine.count + theirs.count), theirs.count, some(mine.count) + some(theirs.count), mine.count};
  }
  return cost;
}

Cost cost_of_redoubling(int seat, int levels, const Parts& cut) {
  Cost cost;
  for (int level = 0; level < levels; ++level) {
    const auto [mine, theirs] = halves(seat, level, cut);
    cost = cost + Cost{some(mine.count + theirs.count), mine.count, some(mine.count) + some(theirs.count), 0};
  }
  return cost;
}

Plan allreduce_by_halving(const Shape& shape, Seat (*seat_of)(const Folding&, int)) {
  if (shape.size == 1) return alone(shape);
  const Folding fold(shape.size);
  const int partner = fold.partner(shape.rank);
  const Place all = whole(shape);
  Builder plan;
  if (fold.sits_out(shape.rank)) {
    plan.exchange(send(partner, all));
    plan.exchange(recv(partner, all));
    return plan.take(false, true);
  }
  const Seat seat = seat_of(fold, fold.player(shape.rank));
  const Parts cut = Parts::even(all.count, fold.power);
  if (fold.has_partner(shape.rank)) plan.exchange(recv_reduce(partner, all, false));
  halve(plan, seat, cut);
  redouble(plan, seat, cut);
  if (fold.has_partner(shape.rank)) plan.exchange(send(partner, all));
  return plan.take(false, true);
}

Cost cost_of_allreduce_by_halving(const Shape& shape, Seat (*seat_of)(const Folding&, int)) {
  const Folding fold(shape.size);
  const size_t count = shape.parts.total();
  const Parts cut = Parts::even(count, fold.power);
  Cost most;
  for (int player = 0; player < fold.power; ++player) {
    const int seat = seat_of(fold, player).seat;
    Cost cost = cost_of_halving(seat, fold.levels, cut) + cost_of_redoubling(seat, fold.levels, cut);
    if (player < fold.extra) cost = cost + Cost{2 * some(count), count, 2 * some(count), count};
    most.take_max(cost);
  }
  return most;
}

namespace {

// The widest distance first, so that every block is a run of ranks.
Seat seat_of(const Folding& fold, int player) {
  Seat seat{player};
  for (int distance = fold.power / 2; distance >= 1; distance /= 2) seat.peers.push_back(fold.rank_of(player ^ distance));
  return seat;
}

// The parts of those whom a player speaks for are one.
Parts by_player(const Shape& shape, const Folding& fold) {
  std::vector<size_t> counts;
  for (int player = 0; player < fold.power; ++player)
    counts.push_back(shape.parts.run(fold.first_of(player), fold.first_of(player + 1)).count);
  return Parts::of(counts);
}

Plan make_reduce_scatter(const Shape& shape) {
  if (shape.size == 1) return alone(shape);
  const Folding fold(shape.size);
  const int partner = fold.partner(shape.rank);
  Builder plan;
  if (fold.sits_out(shape.rank)) {
    plan.exchange(send(partner, whole(shape)));
    plan.exchange(recv(partner, shape.parts[shape.rank]));
    return plan.take(false, true);
  }
  if (fold.has_partner(shape.rank)) plan.exchange(recv_reduce(partner, whole(shape), false));
  halve(plan, seat_of(fold, fold.player(shape.rank)), by_player(shape, fold));
  if (fold.has_partner(shape.rank)) plan.exchange(send(partner, shape.parts[partner]));
  return plan.take(false, true);
}

Plan make_allgather(const Shape& shape) {
  const Folding fold(shape.size);
  const int partner = fold.partner(shape.rank);
  Builder plan;
  if (fold.sits_out(shape.rank)) {
    plan.exchange(send(partner, shape.parts[shape.rank]));
    plan.exchange(recv(partner, whole(shape)));
    return plan.take(true, true);
  }
  if (fold.has_partner(shape.rank)) plan.exchange(recv(partner, shape.parts[partner]));
  redouble(plan, seat_of(fold, fold.player(shape.rank)), by_player(shape, fold));
  if (fold.has_partner(shape.rank)) plan.exchange(send(partner, whole(shape)));
  return plan.take(true, true);
}

Cost cost_of_reduce_scatter(const Shape& shape) {
  const Folding fold(shape.size);
  const size_t all = shape.parts.total();
  const Parts cut = by_player(shape, fold);
  if (all == 0) return {};
  Cost most;
  size_t folded = 0;  // elements of those who sit out
  for (int player = 0; player < fold.power; ++player) {
    Cost cost = cost_of_halving(player, fold.levels, cut);
    if (player < fold.extra) {
      const size_t back = shape.parts.count(fold.first_of(player)), both = some(all) + some(back);
      folded += back;
      cost = cost + Cost{both, back, both, all};
      most.take_max({both, all, both, 0});  // the partner's
    }
    most.take_max(cost);
  }
  most.rounds = static_cast<size_t>(fold.levels) + (fold.extra > 0 ? 1 : 0) + some(folded);
  return most;
}

Cost cost_of_allgather(const Shape& shape) {
  const Folding fold(shape.size);
  const size_t all = shape.parts.total();
  const Parts cut = by_player(shape, fold);
  if (all == 0) return {};
  Cost most;
  size_t folded = 0;  // elements of those who sit out
  for (int player = 0; player < fold.power; ++player) {
    Cost cost = cost_of_redoubling(player, fold.levels, cut);
    if (player < fold.extra) {
      const size_t there = shape.parts.count(fold.first_of(player)), both = some(all) + some(there);
      folded += there;
      cost = cost + Cost{both, all, both, 0};
      most.take_max({both, there, both, 0});  // the partner's
    }
    most.take_max(cost);
  }
  most.rounds = static_cast<size_t>(fold.levels) + (fold.extra > 0 ? 1 : 0) + some(folded);
  return most;
}

}  // namespace

constinit const Algorithm halving_allreduce = {
    .name = "halving",
    .collective = Collective::AllReduce,
    .make = [](const Shape& shape) { return allreduce_by_halving(shape, seat_of); },
    .cost = [](const Shape& shape) { return cost_of_allreduce_by_halving(shape, seat_of); },
    .single_fold = false,
    .nested = true,
};

constinit const Algorithm halving_reduce_scatter = {
    .name = "halving",
    .collective = Collective::ReduceScatter,
    .make = make_reduce_scatter,
    .cost = cost_of_reduce_scatter,
    .single_fold = false,
    .nested = true,
};

constinit const Algorithm doubling_allgather = {
    .name = "doubling",
    .collective = Collective::AllGather,
    .make = make_allgather,
    .cost = cost_of_allgather,
    .single_fold = true,
    .nested = true,
};

}  // namespace roundel::plan
