// Memory of this process alone, aligned to cache lines; from some size on to pages, which are huge ones where they fit.
//
// Who copies from another process's memory, as MPI libraries do, looks up page by page, and where the two addresses differ by
// little in their last 12 bits, loads wait for stores that they only seem to depend on. Users' arrays begin right behind a
// page's start, if they are large.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>

namespace roundel {

// To be freed with std::free(). Throws Error.
std::byte* allocate_memory(size_t bytes);

struct FreeMemory {
  void operator()(std::byte* data) const { std::free(data); }
};
using Memory = std::unique_ptr<std::byte[], FreeMemory>;

}  // namespace roundel
