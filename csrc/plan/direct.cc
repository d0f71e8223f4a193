// Direct all-reduce: 2 rounds, 2(P-1)/P * n elements sent per rank; optimal in bytes and rounds where the network carries all
// pairs at once, and every sum is rounded once, by the owner of its part. And its relatives, in which all pairs talk, too.
//
// Thakur, Rabenseifner & Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005.
//
//                   rounds  elements sent                                            messages
//   all-reduce      2       2(P-1)/P * n  exactly: n + (P-2) times the largest part  4(P-1)
//   reduce-scatter  1        (P-1)/P * n  exactly: n less the smallest part          2(P-1)
//   all-gather      1        (P-1)/P * n  exactly: P-1 times the largest part        2(P-1)
//   reduce          2             n       every owner sends its sum to the root      3(P-1) or so
//   broadcast       1        (P-1) * n    by the root                                P-1
//
// All P contributions to a part are added up in one pass, (P-1) times the largest part. Peers are visited from the next rank
// on, so that rank 0 is not everyone's first.
#include "plan/direct.h"

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

Plan make_reduce(const Shape& shape) {
  Builder plan;
  reduce_scatter_within(plan, everyone(shape), by_parts(shape), true);
  plan.begin_round();
  if (shape.rank != shape.root) plan.add(send(shape.root, shape.parts[shape.rank]));
  for (int r = 0; r < shape.size && shape.rank == shape.root; ++r)
    if (r != shape.root) plan.add(recv(r, shape.parts[r]));
  return plan.take(true);
}

// The costs of what `cost` says of every rank, given what all own and what it owns.
template <class F>
Cost worst(const Shape& shape, F cost) {
  const std::vector<Amount> owned = amounts(by_parts(shape));
  const Amount all = sum(owned);
  Cost most;
  for (int r = 0; r < shape.size; ++r) most.take_max(cost(r, all, owned[static_cast<size_t>(r)]));
  return most;
}

Cost cost_of_allreduce(const Shape& shape) {
  const size_t size = static_cast<size_t>(shape.size);
  return worst(shape, [&](int, Amount all, Amount mine) {
    return cost_of_reduce_scatter(size, all, mine) + cost_of_allgather(size, all, mine);
  });
}

Cost cost_of_reduce(const Shape& shape) {
  return worst(shape, [&](int rank, Amount all, Amount mine) {
    Cost cost = cost_of_reduce_scatter(static_cast<size_t>(shape.size), all, mine);
    const size_t messages = rank == shape.root ? (all - mine).places : mine.places;
    if (rank != shape.root) cost.elements_sent += mine.elements;
    cost.messages += messages;
    cost.rounds += messages > 0 ? 1 : 0;
    return cost;
  });
}

}  // namespace

Amount operator-(Amount a, Amount b) { return {a.elements - b.elements, a.places - b.places}; }

Cost operator+(const Cost& a, const Cost& b) {
  return {a.rounds + b.rounds, a.elements_sent + b.elements_sent, a.messages + b.messages, a.elements_added + b.elements_added};
}

std::vector<Amount> amounts(const Owned& owned) {
  std::vector<Amount> of_member(owned.size());
  for (size_t i = 0; i < owned.size(); ++i)
    for (const Place& place : owned[i]) of_member[i].add(place.count);
  return of_member;
}

Amount sum(const std::vector<Amount>& amounts) {
  Amount total;
  for (const Amount& amount : amounts) total = {total.elements + amount.elements, total.places + amount.places};
  return total;
}

Cost cost_of_reduce_scatter(size_t size, Amount all, Amount mine) {
  if (size == 1) return {};
  const Amount theirs = all - mine;
  return {.rounds = all.places > 0 ? 1u : 0u,
          .elements_sent = theirs.elements,
          .messages = theirs.places + (size - 1) * mine.places,
          .elements_added = (size - 1) * mine.elements};
}

Cost cost_of_allgather(size_t size, Amount all, Amount mine) {
  if (size == 1) return {};
  return {.rounds = all.places > 0 ? 1u : 0u,
          .elements_sent = (size - 1) * mine.elements,
          .messages = (all - mine).places + (size - 1) * mine.places};
}

constinit const Algorithm direct_allreduce = {
    .name = "direct",
    .collective = Collective::AllReduce,
    .make = make_allreduce,
    .cost = cost_of_allreduce,
    .single_fold = true,
};

constinit const Algorithm direct_reduce_scatter = {
    .name = "direct",
    .collective = Collective::ReduceScatter,
    .make = make_reduce_scatter,
    .cost =
        [](const Shape& shape) {
          return worst(shape, [&](int, Amount all, Amount mine) {
            return cost_of_reduce_scatter(static_cast<size_t>(shape.size), all, mine);
          });
        },
    .single_fold = true,
};

constinit const Algorithm direct_allgather = {
    .name = "direct",
    .collective = Collective::AllGather,
    .make = make_allgather,
    .cost =
        [](const Shape& shape) {
          return worst(shape, [&](int, Amount all, Amount mine) {
            return cost_of_allgather(static_cast<size_t>(shape.size), all, mine);
          });
        },
    .single_fold = true,
};

constinit const Algorithm direct_broadcast = {
    .name = "direct",
    .collective = Collective::Broadcast,
    .make = make_broadcast,
    .cost = [](const Shape& shape) -> Cost {
      const size_t others = static_cast<size_t>(shape.size - 1), count = shape.parts.total();
      if (others == 0 || count == 0) return {};
      return {.rounds = 1, .elements_sent = others * count, .messages = others};
    },
    .single_fold = true,
};

constinit const Algorithm direct_reduce = {
    .name = "direct",
    .collective = Collective::Reduce,
    .make = make_reduce,
    .cost = cost_of_reduce,
    .single_fold = true,
};

}  // namespace roundel::plan
