// Ring all-reduce: 2(P-1) rounds, 2(P-1)/P * n elements sent per rank; optimal in bytes, linear in latency.
// Ring reduce-scatter and all-gather: its two halves, P-1 rounds and (P-1)/P * n elements each.
// Patarasuk & Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 2009.
//
// Exactly, for uneven parts: each half takes a rank past all parts but one (its own when reducing, its successor's when
// gathering), so the busiest rank sends n less the smallest part, twice n less the two smallest neighbours for both halves.
#include <algorithm>

#include "plan/algorithms.h"
#include "plan/builder.h"

namespace roundel::plan {
namespace {

struct Ring {
  int rank;
  int size;
  int next() const { return (rank + 1) % size; }
  int prev() const { return back(1); }
  int back(int steps) const { return (rank - steps % size + size) % size; }
};

// Part r sets out at rank r + 1 and comes home to r, richer by one contribution at each hop.
void reduce_scatter(Builder& plan, const Ring& ring, const Parts& part) {
  for (int s = 0; s < ring.size - 1; ++s)
    plan.exchange(send(ring.next(), part[ring.back(s + 1)]),
                  recv_reduce(ring.prev(), part[ring.back(s + 2)], s == ring.size - 2));
}

// Part r sets out at rank r and travels once around.
void allgather(Builder& plan, const Ring& ring, const Parts& part) {
  for (int s = 0; s < ring.size - 1; ++s)
    plan.exchange(send(ring.next(), part[ring.back(s)]), recv(ring.prev(), part[ring.back(s + 1)]));
}

Plan make_allreduce(const Shape& shape) {
  if (shape.size == 1) return alone(shape);
  const Ring ring{shape.rank, shape.size};
  Builder plan;
  reduce_scatter(plan, ring, shape.parts);
  allgather(plan, ring, shape.parts);
  return plan.take(false);
}

Plan make_reduce_scatter(const Shape& shape) {
  if (shape.size == 1) return alone(shape);
  Builder plan;
  reduce_scatter(plan, {shape.rank, shape.size}, shape.parts);
  return plan.take(false);
}

Plan make_allgather(const Shape& shape) {
  Builder plan;
  allgather(plan, {shape.rank, shape.size}, shape.parts);
  return plan.take(true);
}

// One trip around: what x(j) says of every position j of the ring but one, for the rank that is spared least.
template <class X>
size_t one_trip(const Shape& shape, X x) {
  size_t all = 0, spared = x(shape.parts, 0);
  for (int j = 0; j < shape.size; ++j) {
    all += x(shape.parts, j);
    spared = std::min(spared, x(shape.parts, j));
  }
  return all - spared;
}

// The same for two trips, which spare a rank two neighbouring positions.
template <class X>
size_t two_trips(const Shape& shape, X x) {
  return one_trip(shape, [&](const Parts& part, int j) { return x(part, j) + x(part, (j + 1) % part.size()); });
}

size_t elements(const Parts& part, int j) { return part.count(j); }

// In a round part j goes out and part j - 1 comes in.
size_t messages(const Parts& part, int j) {
  return (part.count(j) > 0 ? 1u : 0u) + (part.count((j + part.size() - 1) % part.size()) > 0 ? 1u : 0u);
}

// However few parts there are, each must go all the way.
size_t rounds(const Shape& shape) { return shape.parts.total() > 0 ? static_cast<size_t>(shape.size - 1) : 0; }

}  // namespace

constinit const Algorithm ring_allreduce = {
    .name = "ring",
    .collective = Collective::AllReduce,
    .make = make_allreduce,
    .cost = [](const Shape& shape) -> Cost {
      return {2 * rounds(shape), two_trips(shape, elements), two_trips(shape, messages), one_trip(shape, elements)};
    },
    .single_fold = false,
};

constinit const Algorithm ring_reduce_scatter = {
    .name = "ring",
    .collective = Collective::ReduceScatter,
    .make = make_reduce_scatter,
    .cost = [](const Shape& shape) -> Cost {
      return {rounds(shape), one_trip(shape, elements), one_trip(shape, messages), one_trip(shape, elements)};
    },
    .single_fold = false,
};

constinit const Algorithm ring_allgather = {
    .name = "ring",
    .collective = Collective::AllGather,
    .make = make_allgather,
    .cost = [](const Shape& shape) -> Cost { return {rounds(shape), one_trip(shape, elements), one_trip(shape, messages), 0}; },
    .single_fold = true,
};

}  // namespace roundel::plan
