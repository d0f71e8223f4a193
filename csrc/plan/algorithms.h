// The rows that plan files give to registry.cc. Constant-initialized, so that the table may be read at any time.
#pragma once

#include "plan/plan.h"

namespace roundel::plan {

extern const Algorithm direct_allreduce, direct_reduce_scatter, direct_allgather, direct_broadcast, direct_reduce;
extern const Algorithm exchange_allreduce;
extern const Algorithm direct_alltoall, direct_alltoallv, pairwise_alltoall, pairwise_alltoallv;
extern const Algorithm direct_gather, direct_scatter, tree_gather, tree_scatter;
extern const Algorithm ring_allreduce, ring_reduce_scatter, ring_allgather;
extern const Algorithm tree_allreduce, tree_broadcast, tree_reduce;
extern const Algorithm halving_allreduce, halving_reduce_scatter, doubling_allgather, doubling_allreduce;
extern const Algorithm swing_allreduce;
extern const Algorithm bruck_allgather, bruck_alltoall;
extern const Algorithm hierarchical_allreduce, hierarchical_reduce_scatter, hierarchical_allgather;
extern const Algorithm hierarchical_broadcast, hierarchical_reduce;

}  // namespace roundel::plan
