// Hierarchical broadcast and reduce: a binomial tree over hosts and one inside each. Every host but the root's has one rank,
// the first, that talks to other hosts, so n elements come to each and leave the busiest host ceil(log2 H) times; a plain tree
// may cross between the same two hosts several times.
//
//   broadcast   ceil(log2 H) + ceil(log2 L) rounds, as many times n elements sent by the root
//   reduce      as many rounds, n elements sent by every rank, as many times n added up by the root
//
// Karonis et al., "Exploiting hierarchy in parallel computer networks to optimize collective operation performance", IPDPS
// 2000.
#include <utility>
#include <vector>

#include "plan/algorithms.h"
#include "plan/hosts.h"
#include "plan/tree.h"

namespace roundel::plan {
namespace {

struct TwoTrees {
  Tree across, inside;  // `across` only where this rank is the root of `inside`
};

TwoTrees trees(const Shape& shape, const Hosts& hosts) {
  const int host = hosts.host(shape.rank), home = hosts.host(shape.root);
  TwoTrees trees{{{{}, host}, home}, {hosts.group(shape.rank), host == home ? hosts.index(shape.root) : 0}};
  for (int h = 0; h < hosts.count(); ++h) trees.across.group.ranks.push_back(h == home ? shape.root : hosts.ranks(h)[0]);
  return trees;
}

Plan make_broadcast(const Shape& shape) {
  const auto [across, inside] = trees(shape, Hosts(shape));
  Builder plan;
  if (inside.me() == 0) broadcast_down(plan, across, whole(shape));
  broadcast_down(plan, inside, whole(shape));
  return plan.take(true);
}

Plan make_reduce(const Shape& shape) {
  if (shape.size == 1) return alone(shape);
  const auto [across, inside] = trees(shape, Hosts(shape));
  Builder plan;
  reduce_up(plan, inside, whole(shape), across.size() == 1);
  if (inside.me() == 0) reduce_up(plan, across, whole(shape), true);
  return plan.take(false);
}

// A rank's edges to children and to its parent, in both trees.
Cost cost(const Shape& shape, bool downwards) {
  const size_t count = shape.parts.total();
  if (count == 0) return {};
  const Hosts hosts(shape);
  const int home = hosts.host(shape.root);
  Cost most;
  std::vector<size_t> inside(static_cast<size_t>(hosts.count()));  // levels, by position of the host
  for (int h = 0; h < hosts.count(); ++h) {
    const int size = static_cast<int>(hosts.ranks(h).size());
    const int on_ring = (h - home + hosts.count()) % hosts.count();
    inside[static_cast<size_t>(on_ring)] = levels(size);
    for (int position = 0; position < size; ++position) {
      size_t below = children(position, size);
      if (position == 0) below += children(on_ring, hosts.count());
      const size_t above = position > 0 || on_ring > 0 ? 1 : 0;
      most.take_max({0, (downwards ? below : above) * count, below + above, downwards ? 0 : below * count});
    }
  }
  most.rounds = longest_chain(std::move(inside));
  return most;
}

}  // namespace

constinit const Algorithm hierarchical_broadcast = {
    .name = "hierarchical",
    .collective = Collective::Broadcast,
    .make = make_broadcast,
    .cost = [](const Shape& shape) { return cost(shape, true); },
    .single_fold = true,
};

constinit const Algorithm hierarchical_reduce = {
    .name = "hierarchical",
    .collective = Collective::Reduce,
    .make = make_reduce,
    .cost = [](const Shape& shape) { return cost(shape, false); },
    .single_fold = false,
};

}  // namespace roundel::plan
