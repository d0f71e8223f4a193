// Exchange: an all-reduce in 1 round, (P-1) * n elements sent per rank; everyone sends all to all and adds up alone, in rank
// order. Optimal in rounds; worth its bytes where they take less time than a round, and for two ranks at most sizes: a direct
// all-reduce sends them n elements, too.
//
// "Recursive doubling" of two ranks; Bruck, Ho, Kipnis, Upfal & Weathersby, "Efficient algorithms for all-to-all communications
// in multiport message-passing systems", IEEE TPDS 1997, with as many ports as peers.
#include "plan/algorithms.h"
#include "plan/builder.h"

namespace roundel::plan {
namespace {

Plan make_allreduce(const Shape& shape) {
  if (shape.size == 1) return alone(shape);
  Builder plan;
  std::vector<Place> terms(static_cast<size_t>(shape.size), whole(shape));  // by rank
  plan.begin_round();
  for (int s = 1; s < shape.size; ++s) {
    const int to = (shape.rank + s) % shape.size, from = (shape.rank - s + shape.size) % shape.size;
    Place& term = terms[static_cast<size_t>(from)];
    term = plan.scratch(term.count);
    plan.add(send(to, whole(shape)));
    plan.add(recv(from, term));
  }
  plan.exchange(fold(whole(shape), terms, true));
  return plan.take(true);
}

Cost cost(const Shape& shape) {
  const size_t others = static_cast<size_t>(shape.size - 1), count = shape.parts.total();
  if (others == 0 || count == 0) return {};
  return {1, others * count, 2 * others, others * count};
}

}  // namespace

constinit const Algorithm exchange_allreduce = {
    .name = "exchange",
    .collective = Collective::AllReduce,
    .make = make_allreduce,
    .cost = cost,
    .single_fold = true,
};

}  // namespace roundel::plan
