// Swing all-reduce: recursive halving and doubling whose peers are near on a ring, 1, 1, 3, 5, 11, ... ranks away to
// alternating sides: 2 log2 P rounds, 2(P-1)/P * n elements sent per rank, as in halving, but the largest messages go to the
// nearest, and hops are a third fewer in all.
//
// De Sensi, Bonato, Saam & Hoefler, "Swing: short-cutting rings for higher bandwidth allreduce", NSDI 2024, the
// bandwidth-optimal variant on a torus of one dimension. Other P than powers of two are folded as in halving.cc, instead of the
// paper's own schemes for them.
//
// In the paper rank r ends up with block r, and blocks that travel together are scattered. Which rank sums up which block is
// free, so here ranks take seats by such an order that every message is a run of blocks.
#include "plan/algorithms.h"
#include "plan/halving.h"

namespace roundel::plan {
namespace {

// The distance at a level, to the right for even ranks: 1, -1, 3, -5, 11, ...
int distance(int level) {
  int sum = 0;
  for (int i = 0, power = 1; i <= level; ++i, power *= -2) sum += power;
  return sum;
}

int peer(const Folding& ring, int player, int level) {
  const int steps = player % 2 == 0 ? distance(level) : -distance(level);
  return (player + steps) & (ring.power - 1);
}

// After level k, an even player shares its block with those 2^(k+2) apart and with their peers of later levels. So the bits of
// the even player of its last pair, lowest first, lead to its block, and in the pair the even one is first.
int seat(const Folding& ring, int player) {
  const int last = ring.levels - 1;
  const int even = player % 2 == 0 ? player : peer(ring, player, last);
  int seat = 0;
  for (int bit = 1; bit < ring.levels; ++bit) seat = 2 * seat + (even >> bit & 1);
  return 2 * seat + player % 2;
}

Seat seat_of(const Folding& ring, int player) {
  Seat taken{seat(ring, player)};
  for (int level = 0; level < ring.levels; ++level) taken.peers.push_back(ring.rank_of(peer(ring, player, level)));
  return taken;
}

}  // namespace

constinit const Algorithm swing_allreduce = {
    .name = "swing",
    .collective = Collective::AllReduce,
    .make = [](const Shape& shape) { return allreduce_by_halving(shape, seat_of); },
    .cost = [](const Shape& shape) { return cost_of_allreduce_by_halving(shape, seat_of); },
    .single_fold = false,
    .nested = true,
};

}  // namespace roundel::plan
