// Copying memory, through the caches or past them.
#pragma once

#include <cstddef>

namespace roundel {

// memcpy; from == to is allowed, and no address at all when there are no bytes.
void copy_bytes(void* to, const void* from, size_t bytes);

// The same past the caches: the lines of `to` need not be taken away from whoever has them, and are not in our cache
// afterwards. What is written is visible to whoever sees a later store of this thread.
void copy_bytes_streaming(void* to, const void* from, size_t bytes);

}  // namespace roundel
