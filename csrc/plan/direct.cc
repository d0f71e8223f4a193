// Direct all-reduce: 2 rounds, 2(P-1)/P * n elements sent per rank; optimal in bytes and rounds where the network carries all
// pairs at once, and every sum is rounded once, by the owner of its part. And its relatives, in which all pairs talk, too.
//
// Thakur, Rabenseifner & Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005.
//
//   all-reduce      2 rounds   2(P-1)/P * n   exactly: n + (P-2) times the largest part
//   reduce-scatter  1 round     (P-1)/P * n   exactly: n less the smallest part
//   all-gather      1 round     (P-1)/P * n   exactly: P-1 times the largest part
//   broadcast       1 round     (P-1) * n     by the root
//   all-to-all      P-1 rounds  (P-1)/P * n   pairwise exchange: in round s with the ranks s ahead and s behind
//
// Peers are visited from the next rank on, so that rank 0 is not everyone's first.
#include "plan/direct.h"

#include <algorithm>

#include "base/error.h"
#include "plan/algorithms.h"

namespace roundel::plan {

void reduce_scatter_within(Builder& plan, const Group& group, const Owned& owned, bool last) {
  if (group.size() == 1 && !last) return;  // nothing to add, nothing to scale
  const std::vector<Place>& mine = owned[static_cast<size_t>(group.me)];
  std::vector<std::vector<Place>> terms;  // of every place of mine, by member
  for (const Place& place : mine) terms.emplace_back(group.ranks.size(), place);

  plan.begin_round();
  for (int s = 1; s < group.size(); ++s) {
    const size_t to = static_cast<size_t>(group.ahead(s)), from = static_cast<size_t>(group.ahead(group.size() - s));
    for (const Place& place : owned[to]) plan.add(send(group.ranks[to], place));
    for (std::vector<Place>& term : terms) {
      term[from] = plan.scratch(term[from].count);
      plan.add(recv(group.ranks[from], term[from]));
    }
  }
  plan.begin_round();
  for (size_t i = 0; i < mine.size(); ++i) plan.add(fold(mine[i], terms[i], last));
}

void allgather_within(Builder& plan, const Group& group, const Owned& owned) {
  plan.begin_round();
  for (int s = 1; s < group.size(); ++s) {
    const size_t to = static_cast<size_t>(group.ahead(s)), from = static_cast<size_t>(group.ahead(group.size() - s));
    for (const Place& place : owned[static_cast<size_t>(group.me)]) plan.add(send(group.ranks[to], place));
    for (const Place& place : owned[from]) plan.add(recv(group.ranks[from], place));
  }
}

namespace {

Group everyone(const Shape& shape) {
  Group group{{}, shape.rank};
  for (int r = 0; r < shape.size; ++r) group.ranks.push_back(r);
  return group;
}

Owned by_parts(const Shape& shape) {
  Owned owned;
  for (int r = 0; r < shape.size; ++r) owned.push_back({shape.parts[r]});
  return owned;
}

Plan make_allreduce(const Shape& shape) {
  Builder plan;
  reduce_scatter_within(plan, everyone(shape), by_parts(shape), true);
  allgather_within(plan, everyone(shape), by_parts(shape));
  return plan.take(true);
}

Plan make_reduce_scatter(const Shape& shape) {
  Builder plan;
  reduce_scatter_within(plan, everyone(shape), by_parts(shape), true);
  return plan.take(true);
}

Plan make_allgather(const Shape& shape) {
  Builder plan;
  allgather_within(plan, everyone(shape), by_parts(shape));
  return plan.take(true);
}

Plan make_broadcast(const Shape& shape) {
  Builder plan;
  if (shape.rank != shape.root) plan.add(recv(shape.root, whole(shape)));
  if (shape.rank == shape.root)
    for (int s = 1; s < shape.size; ++s) plan.add(send((shape.rank + s) % shape.size, whole(shape)));
  return plan.take(true);
}

Plan make_alltoall(const Shape& shape) {
  const auto in = [&](int r) { return Place{Buffer::In, shape.parts.begin(r), shape.parts.count(r)}; };
  for (int r = 0; r < shape.size; ++r) ROUNDEL_CHECK(shape.parts.count(r) == shape.parts.count(0));

  Builder plan;
  plan.add(copy(shape.parts[shape.rank], in(shape.rank)));
  for (int s = 1; s < shape.size; ++s) {
    const int to = (shape.rank + s) % shape.size, from = (shape.rank - s + shape.size) % shape.size;
    plan.exchange(send(to, in(to)), recv(from, shape.parts[from]));
  }
  return plan.take(true);
}

size_t smallest(const Parts& parts) {
  size_t count = parts.count(0);
  for (int r = 1; r < parts.size(); ++r) count = std::min(count, parts.count(r));
  return count;
}

size_t largest(const Parts& parts) {
  size_t count = 0;
  for (int r = 0; r < parts.size(); ++r) count = std::max(count, parts.count(r));
  return count;
}

size_t others(const Shape& shape) { return static_cast<size_t>(shape.size - 1); }
bool silent(const Shape& shape) { return shape.size == 1 || shape.parts.total() == 0; }

}  // namespace

constinit const Algorithm direct_allreduce = {
    .name = "direct",
    .collective = Collective::AllReduce,
    .make = make_allreduce,
    .rounds = [](const Shape& shape) -> size_t { return silent(shape) ? 0 : 2; },
    .elements_sent = [](const Shape& shape) -> size_t {
      return silent(shape) ? 0 : shape.parts.total() + (others(shape) - 1) * largest(shape.parts);
    },
    .single_fold = true,
};

constinit const Algorithm direct_reduce_scatter = {
    .name = "direct",
    .collective = Collective::ReduceScatter,
    .make = make_reduce_scatter,
    .rounds = [](const Shape& shape) -> size_t { return silent(shape) ? 0 : 1; },
    .elements_sent = [](const Shape& shape) -> size_t { return shape.parts.total() - smallest(shape.parts); },
    .single_fold = true,
};

constinit const Algorithm direct_allgather = {
    .name = "direct",
    .collective = Collective::AllGather,
    .make = make_allgather,
    .rounds = [](const Shape& shape) -> size_t { return silent(shape) ? 0 : 1; },
    .elements_sent = [](const Shape& shape) -> size_t { return others(shape) * largest(shape.parts); },
    .single_fold = true,
};

constinit const Algorithm direct_broadcast = {
    .name = "direct",
    .collective = Collective::Broadcast,
    .make = make_broadcast,
    .rounds = [](const Shape& shape) -> size_t { return silent(shape) ? 0 : 1; },
    .elements_sent = [](const Shape& shape) -> size_t { return others(shape) * shape.parts.total(); },
    .single_fold = true,
};

constinit const Algorithm direct_alltoall = {
    .name = "direct",
    .collective = Collective::AllToAll,
    .make = make_alltoall,
    .rounds = [](const Shape& shape) -> size_t { return silent(shape) ? 0 : others(shape); },
    .elements_sent = [](const Shape& shape) -> size_t { return shape.parts.total() - shape.parts.count(0); },
    .single_fold = true,
};

}  // namespace roundel::plan
