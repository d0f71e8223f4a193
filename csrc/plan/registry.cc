// The table of algorithms. A new one is a plan file, a line in algorithms.h and a line here.
#include "plan/algorithms.h"

namespace roundel::plan {

const std::vector<Algorithm>& algorithms() {
  // Between equal costs the earlier row is selected: direct has the fewest rounds and rounds a 16-bit sum once.
  static const std::vector<Algorithm> table = {
      direct_allreduce,
      direct_reduce_scatter,
      direct_allgather,
      direct_broadcast,
      direct_reduce,
      direct_alltoall,
      direct_alltoallv,
      direct_gather,
      direct_scatter,      //
      exchange_allreduce,  //
      pairwise_alltoall,
      pairwise_alltoallv,  //
      ring_allreduce,
      ring_reduce_scatter,
      ring_allgather,  //
      tree_allreduce,
      tree_broadcast,
      tree_reduce,  //
      tree_gather,
      tree_scatter,  //
      doubling_allreduce,
      doubling_allgather,  //
      halving_allreduce,
      halving_reduce_scatter,  //
      bruck_allgather,
      bruck_alltoall,   //
      swing_allreduce,  //
      hierarchical_allreduce,
      hierarchical_reduce_scatter,
      hierarchical_allgather,
      hierarchical_broadcast,
      hierarchical_reduce,
  };
  return table;
}

const Algorithm* find_algorithm(Collective collective, const std::string& name) {
  for (const Algorithm& row : algorithms())
    if (row.collective == collective && row.name == name) return &row;
  return nullptr;
}

}  // namespace roundel::plan
