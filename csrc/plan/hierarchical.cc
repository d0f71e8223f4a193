// Hierarchical collectives, for ranks that share hosts: inside each host, across hosts between ranks of equal index, inside
// each host. What moves is as much as in direct.cc, but every element crosses to another host once instead of once for each
// rank there.
//
// Cho et al., "BlueConnect: decomposing all-reduce for deep learning on heterogeneous network hierarchy", SysML 2019; at both
// levels the exchanges are those of direct.cc.
//
// With L ranks on each of H hosts:
//
//                   rounds  elements sent  of these leaving the host
//   all-reduce      4       2(P-1)/P * n   2(H-1)/P * n               inside, across and back
//   reduce-scatter  2        (P-1)/P * n    (H-1)/P * n               inside, across
//   all-gather      2        (P-1)/P * n    (H-1)/P * n               across, inside
//
// Hosts may have different numbers of ranks, of which m, the smallest number, are owners on every host (hosts.h).
//
// All-reduce: data is cut in m slices, and a slice in H grains, one for its owner on each host; all messages are grains, so
// that ranges stay equal or disjoint.
//
// Reduce-scatter and all-gather: the part of the rank of index i goes through the owners of index i mod m; on hosts with more
// than m ranks there is one round more, between owners and those ranks.
#include <algorithm>

#include "plan/algorithms.h"
#include "plan/hosts.h"

namespace roundel::plan {
namespace {

size_t at(int index) { return static_cast<size_t>(index); }

Cost cost_of_reduce_scatter(const std::vector<Amount>& owned, int member) {
  return plan::cost_of_reduce_scatter(owned.size(), sum(owned), owned[at(member)]);
}

Cost cost_of_allgather(const std::vector<Amount>& owned, int member) {
  return plan::cost_of_allgather(owned.size(), sum(owned), owned[at(member)]);
}

// grains[i][h]: the part of slice i that the owner of slice i on host h adds up across hosts.
Owned cut(size_t count, const Hosts& hosts) {
  const Parts slices = Parts::even(count, hosts.owners());
  Owned grains(at(hosts.owners()));
  for (int i = 0; i < hosts.owners(); ++i) {
    const Parts slice = Parts::even(slices.count(i), hosts.count());
    for (int h = 0; h < slice.size(); ++h) grains[at(i)].push_back(out(slices.begin(i) + slice.begin(h), slice.count(h)));
  }
  return grains;
}

// What each member of a host's group owns: ranks that are no owners nothing.
Owned on_host(Owned of_owners, const Group& host) {
  of_owners.resize(host.ranks.size());
  return of_owners;
}

Owned one_each(const std::vector<Place>& places) {
  Owned owned;
  for (const Place& place : places) owned.push_back({place});
  return owned;
}

Plan make_allreduce(const Shape& shape) {
  const Hosts hosts(shape);
  const Owned grains = cut(shape.parts.total(), hosts);
  const Group host = hosts.group(shape.rank);
  const Owned slices = on_host(grains, host);

  Builder plan;
  reduce_scatter_within(plan, host, slices, hosts.count() == 1);
  if (hosts.count() > 1 && host.me < hosts.owners()) {
    const Group owners = hosts.peers(shape.rank);
    const Owned shares = one_each(grains[at(host.me)]);
    reduce_scatter_within(plan, owners, shares, true);
    allgather_within(plan, owners, shares);
  }
  allgather_within(plan, host, slices);
  return plan.take(shape.size == 1);
}

Cost cost_of_allreduce(const Shape& shape) {
  const Hosts hosts(shape);
  const Owned grains = cut(shape.parts.total(), hosts);
  Cost most;
  for (int rank = 0; rank < shape.size; ++rank) {
    const Group host = hosts.group(rank);
    const std::vector<Amount> slices = amounts(on_host(grains, host));
    Cost cost = cost_of_reduce_scatter(slices, host.me) + cost_of_allgather(slices, host.me);
    if (host.me < hosts.owners()) {
      const std::vector<Amount> shares = amounts(one_each(grains[at(host.me)]));
      cost = cost + cost_of_reduce_scatter(shares, hosts.host(rank)) + cost_of_allgather(shares, hosts.host(rank));
    }
    most.take_max(cost);
  }
  if (shape.parts.total() > 0) most.rounds = (hosts.count() < shape.size ? 2 : 0) + (hosts.count() > 1 ? 2 : 0);
  return most;
}

// When every rank is through with its rounds so far, for cost.rounds.
class Clocks {
 public:
  explicit Clocks(int size) : now_(at(size)) {}
  size_t last() const { return *std::max_element(now_.begin(), now_.end()); }

  // An exchange of direct.cc: whoever owns something talks to all, the others to those who do.
  void within(const std::vector<int>& ranks, const std::vector<Amount>& owned) {
    if (ranks.size() == 1 || sum(owned).places == 0) return;
    size_t owners = 0, all = 0;
    for (size_t i = 0; i < ranks.size(); ++i) {
      all = std::max(all, now_[at(ranks[i])]);
      if (owned[i].places > 0) owners = std::max(owners, now_[at(ranks[i])]);
    }
    for (size_t i = 0; i < ranks.size(); ++i)
      now_[at(ranks[i])] = 1 + (owned[i].places > 0 ? all : std::max(owners, now_[at(ranks[i])]));
  }

  // One round between an owner and the others whose parts it holds.
  void between(const Shape& shape, const Hosts& hosts, int owner) {
    const size_t before = now_[at(owner)];
    const std::vector<int>& ranks = hosts.ranks(hosts.host(owner));
    size_t begin = 0;
    for (int i = hosts.index(owner) + hosts.owners(); i < static_cast<int>(ranks.size()); i += hosts.owners()) {
      size_t& other = now_[at(ranks[at(i)])];
      if (shape.parts.count(ranks[at(i)]) == 0) continue;
      begin = std::max({begin, before, other});
      other = std::max(before, other) + 1;
      now_[at(owner)] = begin + 1;
    }
  }

 private:
  std::vector<size_t> now_;
};

// The parts that go through the owners of an index, by host.
Owned through(int index, const Hosts& hosts, const Parts& parts) {
  Owned owned(at(hosts.count()));
  for (int h = 0; h < hosts.count(); ++h)
    for (size_t i = at(index); i < hosts.ranks(h).size(); i += at(hosts.owners()))
      owned[at(h)].push_back(parts[hosts.ranks(h)[i]]);
  return owned;
}

// The same by owner, of all hosts.
Owned through_owners(const Hosts& hosts, const Parts& parts) {
  Owned owned(at(hosts.owners()));
  for (int i = 0; i < hosts.owners(); ++i)
    for (const std::vector<Place>& places : through(i, hosts, parts))
      owned[at(i)].insert(owned[at(i)].end(), places.begin(), places.end());
  return owned;
}

// One round between the owners of a host and those whose parts they hold: `move(from, to, part)`.
template <class Move>
void between_owners_and_others(Builder& plan, const Shape& shape, const Hosts& hosts, Move move) {
  const Group host = hosts.group(shape.rank);
  plan.begin_round();
  if (host.me >= hosts.owners()) move(host.ranks[at(host.me % hosts.owners())], shape.rank);
  for (int i = host.me + hosts.owners(); host.me < hosts.owners() && i < host.size(); i += hosts.owners())
    move(shape.rank, host.ranks[at(i)]);
}

Plan make_reduce_scatter(const Shape& shape) {
  const Hosts hosts(shape);
  const Group host = hosts.group(shape.rank);
  Builder plan;
  if (hosts.count() == 1) {
    reduce_scatter_within(plan, host, through_owners(hosts, shape.parts), true);
    return plan.take(shape.size == 1);
  }
  reduce_scatter_within(plan, host, on_host(through_owners(hosts, shape.parts), host), false);
  if (host.me < hosts.owners())
    reduce_scatter_within(plan, hosts.peers(shape.rank), through(host.me, hosts, shape.parts), true);
  between_owners_and_others(plan, shape, hosts, [&](int owner, int other) {
    const Place part = shape.parts[other];
    plan.add(shape.rank == owner ? send(other, part) : recv(owner, part));
  });
  return plan.take(false);
}

Plan make_allgather(const Shape& shape) {
  const Hosts hosts(shape);
  const Group host = hosts.group(shape.rank);
  Builder plan;
  between_owners_and_others(plan, shape, hosts, [&](int owner, int other) {
    const Place part = shape.parts[other];
    plan.add(shape.rank == owner ? recv(other, part) : send(owner, part));
  });
  if (host.me < hosts.owners()) allgather_within(plan, hosts.peers(shape.rank), through(host.me, hosts, shape.parts));
  allgather_within(plan, host, on_host(through_owners(hosts, shape.parts), host));
  return plan.take(true);
}

// All but the last or first round, which scatters or gathers: `cost` for the exchange in a group.
Cost cost_through_owners(const Shape& shape, Cost (*cost_within)(const std::vector<Amount>&, int), bool owners_send) {
  const Hosts hosts(shape);
  const Owned by_owner = through_owners(hosts, shape.parts);
  std::vector<std::vector<Amount>> shares;
  for (int i = 0; i < hosts.owners(); ++i) shares.push_back(amounts(through(i, hosts, shape.parts)));
  std::vector<Amount> owned = amounts(by_owner);
  Cost most;
  for (int rank = 0; rank < shape.size; ++rank) {
    const Group host = hosts.group(rank);
    owned.resize(host.ranks.size());
    Cost cost = cost_within(owned, host.me);
    if (host.me < hosts.owners()) cost = cost + cost_within(shares[at(host.me)], hosts.host(rank));
    Amount own;  // parts that come from or go to this rank, which is no owner, or to those whose owner it is
    if (host.me >= hosts.owners()) own.add(shape.parts.count(rank));
    for (int i = host.me + hosts.owners(); host.me < hosts.owners() && i < host.size(); i += hosts.owners())
      own.add(shape.parts.count(host.ranks[at(i)]));
    const bool sends = owners_send == (host.me < hosts.owners());
    cost = cost + Cost{0, sends ? own.elements : 0, own.places, 0};
    most.take_max(cost);
  }

  Clocks clocks(shape.size);
  const auto inside = [&] {
    for (int h = 0; h < hosts.count(); ++h) {
      owned.resize(hosts.ranks(h).size());
      clocks.within(hosts.ranks(h), owned);
    }
  };
  const auto between = [&] {
    for (int r = 0; r < shape.size; ++r)
      if (hosts.index(r) < hosts.owners()) clocks.between(shape, hosts, r);
  };
  if (owners_send) inside();
  if (!owners_send) between();
  for (int i = 0; i < hosts.owners(); ++i) clocks.within(hosts.peers(hosts.ranks(0)[at(i)]).ranks, shares[at(i)]);
  if (owners_send) between();
  if (!owners_send) inside();
  most.rounds = clocks.last();
  return most;
}

}  // namespace

constinit const Algorithm hierarchical_allreduce = {
    .name = "hierarchical",
    .collective = Collective::AllReduce,
    .make = make_allreduce,
    .cost = cost_of_allreduce,
    .single_fold = false,
};

constinit const Algorithm hierarchical_reduce_scatter = {
    .name = "hierarchical",
    .collective = Collective::ReduceScatter,
    .make = make_reduce_scatter,
    .cost = [](const Shape& shape) { return cost_through_owners(shape, cost_of_reduce_scatter, true); },
    .single_fold = false,
};

constinit const Algorithm hierarchical_allgather = {
    .name = "hierarchical",
    .collective = Collective::AllGather,
    .make = make_allgather,
    .cost = [](const Shape& shape) { return cost_through_owners(shape, cost_of_allgather, false); },
    .single_fold = true,
};

}  // namespace roundel::plan
