// Binomial tree. Broadcast: ceil(log2 P) rounds, of n elements each for the root, which sends most. Reduce is the same upwards:
// ceil(log2 P) rounds, n elements sent by every rank, ceil(log2 P) * n added up by the root. All-reduce is a reduction to rank
// 0 and a broadcast from there: 2 ceil(log2 P) rounds, ceil(log2 P) * n elements sent by rank 0. Optimal in latency, for small
// messages; as many messages as rounds.
//
// Thakur, Rabenseifner & Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005.
#include "plan/tree.h"

#include <algorithm>

#include "plan/algorithms.h"

namespace roundel::plan {

Tree tree_of_all(const Shape& shape, int root) {
  Tree tree{{{}, shape.rank}, root};
  for (int r = 0; r < shape.size; ++r) tree.group.ranks.push_back(r);
  return tree;
}

// Small subtrees first. Every subtree is a run of ranks, so sums from rank 0 are in rank order.
void reduce_up(Builder& plan, const Tree& tree, Place all, bool last) {
  for (int reach = 1; reach <= tree.top(); reach *= 2) {
    if (tree.parent_at(reach))
      plan.exchange(recv_reduce(tree.child(reach), all, last && tree.me() == 0 && reach == tree.top()));
    if (tree.child_at(reach)) plan.exchange(send(tree.parent(reach), all));
  }
}

// Large subtrees first: they have the longest way to go.
void broadcast_down(Builder& plan, const Tree& tree, Place all) {
  for (int reach = tree.top(); reach >= 1; reach /= 2) {
    if (tree.parent_at(reach)) plan.exchange(send(tree.child(reach), all));
    if (tree.child_at(reach)) plan.exchange(recv(tree.parent(reach), all));
  }
}

size_t children(int position, int size) {
  size_t count = 0;
  for (int reach = 1; position % (2 * reach) == 0 && position + reach < size; reach *= 2) ++count;
  return count;
}

// A parent is through with a child when it is with all smaller ones; downwards it is the same backwards in time.
size_t longest_chain(std::vector<size_t> own) {
  for (size_t position = own.size(); position-- > 0;)
    for (size_t reach = 1; position + reach < own.size() && position % (2 * reach) == 0; reach *= 2)
      own[position] = std::max(own[position], own[position + reach]) + 1;
  return own[0];
}

namespace {

Plan make_allreduce(const Shape& shape) {
  if (shape.size == 1) return alone(shape);
  const Tree tree = tree_of_all(shape, 0);
  Builder plan;
  reduce_up(plan, tree, whole(shape), true);
  broadcast_down(plan, tree, whole(shape));
  return plan.take(false);
}

Plan make_broadcast(const Shape& shape) {
  Builder plan;
  broadcast_down(plan, tree_of_all(shape, shape.root), whole(shape));
  return plan.take(true);
}

Plan make_reduce(const Shape& shape) {
  if (shape.size == 1) return alone(shape);
  Builder plan;
  reduce_up(plan, tree_of_all(shape, shape.root), whole(shape), true);
  return plan.take(false);
}

// ceil(log2 P), or 0 where there is nothing to send.
size_t levels_of(const Shape& shape) { return shape.parts.total() == 0 ? 0 : levels(shape.size); }

}  // namespace

constinit const Algorithm tree_allreduce = {
    .name = "tree",
    .collective = Collective::AllReduce,
    .make = make_allreduce,
    .cost = [](const Shape& shape) -> Cost {
      const size_t levels = levels_of(shape), count = shape.parts.total();
      return {.rounds = 2 * levels, .elements_sent = levels * count, .messages = 2 * levels, .elements_added = levels * count};
    },
    .single_fold = false,
};

constinit const Algorithm tree_broadcast = {
    .name = "tree",
    .collective = Collective::Broadcast,
    .make = make_broadcast,
    .cost = [](const Shape& shape) -> Cost {
      const size_t levels = levels_of(shape);
      return {.rounds = levels, .elements_sent = levels * shape.parts.total(), .messages = levels};
    },
    .single_fold = true,
};

constinit const Algorithm tree_reduce = {
    .name = "tree",
    .collective = Collective::Reduce,
    .make = make_reduce,
    .cost = [](const Shape& shape) -> Cost {
      const size_t levels = levels_of(shape), count = levels > 0 ? shape.parts.total() : 0;
      return {.rounds = levels, .elements_sent = count, .messages = levels, .elements_added = levels * count};
    },
    .single_fold = false,
};

}  // namespace roundel::plan
