// The rows that plan files give to registry.cc. Constant-initialized, so that the table may be read at any time.
#pragma once

#include "plan/plan.h"

namespace roundel::plan {

extern const Algorithm direct_allreduce, direct_reduce_scatter, direct_allgather, direct_broadcast, direct_alltoall;
extern const Algorithm exchange_allreduce;
extern const Algorithm ring_allreduce, ring_reduce_scatter, ring_allgather;
extern const Algorithm tree_allreduce, tree_broadcast;
extern const Algorithm hierarchical_allreduce;

}  // namespace roundel::plan
