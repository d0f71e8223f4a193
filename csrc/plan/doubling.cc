// Recursive doubling all-reduce: log2 P rounds of n elements, with a rank 1, 2, 4, ... away. Optimal in latency, for the
// smallest messages. Any P by folding, which costs 2 rounds and n elements more.
//
// Thakur, Rabenseifner & Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005.
//
// Both ends of an exchange add the same two sums, the lower ranks' first, so that all ranks get the same bits.
#include "plan/algorithms.h"
#include "plan/halving.h"

namespace roundel::plan {
namespace {

Plan make_allreduce(const Shape& shape) {
  if (shape.size == 1) return alone(shape);
  const Folding fold(shape.size);
  const int partner = fold.partner(shape.rank);
  const Place all = whole(shape);
  Builder plan;
  if (fold.sits_out(shape.rank)) {
    plan.exchange(send(partner, all));
    plan.exchange(recv(partner, all));
    return plan.take(false);
  }
  const int me = fold.player(shape.rank);
  const Place theirs = plan.scratch(all.count);
  if (fold.has_partner(shape.rank)) plan.exchange(recv_reduce(partner, all, false));
  for (int distance = 1; distance < fold.power; distance *= 2) {
    const int peer = fold.rank_of(me ^ distance);
    const bool last = 2 * distance == fold.power;
    plan.exchange(send(peer, all), recv(peer, theirs));
    plan.exchange((me & distance) == 0 ? roundel::plan::fold(all, {all, theirs}, last)
                                       : roundel::plan::fold(all, {theirs, all}, last));
  }
  if (fold.has_partner(shape.rank)) plan.exchange(send(partner, all));
  return plan.take(false);
}

Cost cost(const Shape& shape) {
  const Folding fold(shape.size);
  const size_t count = shape.parts.total();
  if (count == 0) return {};
  const size_t levels = static_cast<size_t>(fold.levels), folds = fold.extra > 0 ? 1 : 0;
  return {levels + 2 * folds, (levels + folds) * count, 2 * levels + 2 * folds, (levels + folds) * count};
}

}  // namespace

constinit const Algorithm doubling_allreduce = {
    .name = "doubling",
    .collective = Collective::AllReduce,
    .make = make_allreduce,
    .cost = cost,
    .single_fold = false,
};

}  // namespace roundel::plan
