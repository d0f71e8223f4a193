// Hierarchical all-reduce, for ranks that share hosts: reduce-scatter inside each host, all-reduce across hosts between ranks
// of equal index, all-gather inside each host. With L ranks on each of H hosts: 4 rounds, 2(P-1)/P * n elements sent per rank,
// of which only 2(H-1)/P * n leave the host.
//
// Cho et al., "BlueConnect: decomposing all-reduce for deep learning on heterogeneous network hierarchy", SysML 2019; at both
// levels the exchanges are those of direct.cc.
//
// Hosts may have different numbers of ranks. The smallest number, m, is how many slices the data is cut in; rank i < m of a
// host owns slice i there. A slice is cut in H grains, one for the owner on each host; all messages are grains, so that ranges
// stay equal or disjoint.
//
// Exactly: the busiest rank is the first of some host: n + (H-2) grains of its own + (L-1) slices, of the largest slice. Rounds
// inside hosts fall away if no host has two ranks, rounds across if there is one host.
#include <algorithm>

#include "base/error.h"
#include "plan/algorithms.h"
#include "plan/direct.h"

namespace roundel::plan {
namespace {

using Hosts = std::vector<std::vector<int>>;  // ranks of every host, ascending

Hosts hosts_of(const Shape& shape) {
  ROUNDEL_CHECK(shape.host.empty() || shape.host.size() == static_cast<size_t>(shape.size));
  Hosts hosts;
  for (int r = 0; r < shape.size; ++r) {
    const size_t host = shape.host.empty() ? 0 : static_cast<size_t>(shape.host[static_cast<size_t>(r)]);
    ROUNDEL_CHECK(host <= hosts.size());  // numbered in order of first appearance
    if (host == hosts.size()) hosts.emplace_back();
    hosts[host].push_back(r);
  }
  return hosts;
}

size_t smallest(const Hosts& hosts) {
  return std::min_element(hosts.begin(), hosts.end(), [](auto& a, auto& b) { return a.size() < b.size(); })->size();
}

size_t largest(const Hosts& hosts) {
  return std::max_element(hosts.begin(), hosts.end(), [](auto& a, auto& b) { return a.size() < b.size(); })->size();
}

// grains[i][h]: the part of slice i that the owner of slice i on host h adds up across hosts.
std::vector<std::vector<Place>> cut(size_t count, const Hosts& hosts) {
  const int owners = static_cast<int>(smallest(hosts));
  const Parts slices = Parts::even(count, owners);
  std::vector<std::vector<Place>> grains(static_cast<size_t>(owners));
  for (int i = 0; i < owners; ++i) {
    const Parts slice = Parts::even(slices.count(i), static_cast<int>(hosts.size()));
    for (int h = 0; h < slice.size(); ++h)
      grains[static_cast<size_t>(i)].push_back({Buffer::Out, slices.begin(i) + slice.begin(h), slice.count(h)});
  }
  return grains;
}

Group host_of(int rank, const Hosts& hosts) {
  for (const std::vector<int>& ranks : hosts) {
    const auto found = std::find(ranks.begin(), ranks.end(), rank);
    if (found != ranks.end()) return {ranks, static_cast<int>(found - ranks.begin())};
  }
  ROUNDEL_CHECK(!"every rank has a host");
}

// The owners of slice `index`, one on each host.
Group owners_of(size_t index, int rank, const Hosts& hosts) {
  Group group;
  for (const std::vector<int>& ranks : hosts) {
    if (ranks[index] == rank) group.me = group.size();
    group.ranks.push_back(ranks[index]);
  }
  return group;
}

Plan make_allreduce(const Shape& shape) {
  const Hosts hosts = hosts_of(shape);
  const std::vector<std::vector<Place>> grains = cut(shape.parts.total(), hosts);
  const Group host = host_of(shape.rank, hosts);
  const size_t index = static_cast<size_t>(host.me);
  Owned slices = grains;
  slices.resize(host.ranks.size());  // ranks beyond the m-th own nothing

  Builder plan;
  reduce_scatter_within(plan, host, slices, hosts.size() == 1);
  if (hosts.size() > 1 && index < grains.size()) {
    const Group owners = owners_of(index, shape.rank, hosts);
    Owned shares;
    for (const Place& grain : grains[index]) shares.push_back({grain});
    reduce_scatter_within(plan, owners, shares, true);
    allgather_within(plan, owners, shares);
  }
  allgather_within(plan, host, slices);
  return plan.take(shape.size == 1);
}

size_t rounds(const Shape& shape) {
  const Hosts hosts = hosts_of(shape);
  if (shape.parts.total() == 0) return 0;
  const size_t inside = largest(hosts) > 1 ? 2 : 0;
  const size_t across = hosts.size() > 1 ? 2 : 0;
  return inside + across;
}

size_t elements_sent(const Shape& shape) {
  const Hosts hosts = hosts_of(shape);
  const std::vector<Place> slice = cut(shape.parts.total(), hosts)[0];
  size_t slice_count = 0, most = 0;
  for (const Place& grain : slice) slice_count += grain.count;
  for (size_t h = 0; h < hosts.size(); ++h) {
    const size_t inside = shape.parts.total() - slice_count + (hosts[h].size() - 1) * slice_count;
    const size_t across = slice_count - slice[h].count + (hosts.size() - 1) * slice[h].count;
    most = std::max(most, inside + across);
  }
  return most;
}

}  // namespace

constinit const Algorithm hierarchical_allreduce = {
    .name = "hierarchical",
    .collective = Collective::AllReduce,
    .make = make_allreduce,
    .rounds = rounds,
    .elements_sent = elements_sent,
    .single_fold = false,
};

}  // namespace roundel::plan
