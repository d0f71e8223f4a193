// The threads of the optimizer steps: started when first needed, asleep when there is nothing to do.
#pragma once

#include <cstddef>
#include <functional>

namespace roundel::kernels {

// body(i) for all i below `items`, on the calling thread and at most `threads` - 1 others; returns when all are done. Which
// thread takes which item is left to chance; who has come takes neighbours, ascending, and then from the end of others'. Fewer
// than 2^32 items. body must not throw. The callers' floating-point environment (flush-to-zero) holds on all threads. Any
// thread may call; while one call is under way the others' items run on their own thread alone.
void parallel_for(size_t items, int threads, const std::function<void(size_t)>& body);

// How many processors this process may run on.
int default_threads();

}  // namespace roundel::kernels
