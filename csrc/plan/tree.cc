// Binomial tree. Broadcast: ceil(log2 P) rounds, of n elements each for the root, which sends most. All-reduce is a reduction
// to rank 0 and a broadcast from there: 2 ceil(log2 P) rounds, ceil(log2 P) * n elements sent by rank 0. Optimal in latency,
// for small messages.
//
// Thakur, Rabenseifner & Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005.
#include <bit>

#include "plan/algorithms.h"
#include "plan/builder.h"

namespace roundel::plan {
namespace {

// The tree as `rank` sees it. Ranks are counted from the root; at `reach` 1, 2, 4, ... a multiple of 2 * reach is the parent of
// the one `reach` further on, whose subtree is the `reach` ranks from there.
struct Tree {
  int rank, size, root;

  int me() const { return (rank - root + size) % size; }
  bool parent_at(int reach) const { return me() % (2 * reach) == 0 && me() + reach < size; }
  bool child_at(int reach) const { return me() % (2 * reach) == reach; }
  int child(int reach) const { return (rank + reach) % size; }
  int parent(int reach) const { return (rank - reach + size) % size; }
  int top() const { return static_cast<int>(std::bit_ceil(static_cast<unsigned>(size))) / 2; }
};

// Small subtrees first. Rank 0 is the root and every subtree is a run of ranks, so sums are in rank order.
void reduce(Builder& plan, const Tree& tree, Place all) {
  for (int reach = 1; reach <= tree.top(); reach *= 2) {
    if (tree.parent_at(reach)) plan.exchange(recv_reduce(tree.child(reach), all, tree.me() == 0 && reach == tree.top()));
    if (tree.child_at(reach)) plan.exchange(send(tree.parent(reach), all));
  }
}

// Large subtrees first: they have the longest way to go.
void broadcast(Builder& plan, const Tree& tree, Place all) {
  for (int reach = tree.top(); reach >= 1; reach /= 2) {
    if (tree.parent_at(reach)) plan.exchange(send(tree.child(reach), all));
    if (tree.child_at(reach)) plan.exchange(recv(tree.parent(reach), all));
  }
}

Plan make_allreduce(const Shape& shape) {
  if (shape.size == 1) return alone(shape);
  const Tree tree{shape.rank, shape.size, 0};
  Builder plan;
  reduce(plan, tree, whole(shape));
  broadcast(plan, tree, whole(shape));
  return plan.take(false);
}

Plan make_broadcast(const Shape& shape) {
  Builder plan;
  broadcast(plan, {shape.rank, shape.size, shape.root}, whole(shape));
  return plan.take(true);
}

// ceil(log2 P), or 0 where there is nothing to send.
size_t levels(const Shape& shape) {
  return shape.parts.total() == 0 ? 0 : static_cast<size_t>(std::bit_width(static_cast<unsigned>(shape.size - 1)));
}

}  // namespace

constinit const Algorithm tree_allreduce = {
    .name = "tree",
    .collective = Collective::AllReduce,
    .make = make_allreduce,
    .rounds = [](const Shape& shape) { return 2 * levels(shape); },
    .elements_sent = [](const Shape& shape) { return levels(shape) * shape.parts.total(); },
    .single_fold = false,
};

constinit const Algorithm tree_broadcast = {
    .name = "tree",
    .collective = Collective::Broadcast,
    .make = make_broadcast,
    .rounds = [](const Shape& shape) { return levels(shape); },
    .elements_sent = [](const Shape& shape) { return levels(shape) * shape.parts.total(); },
    .single_fold = true,
};

}  // namespace roundel::plan
