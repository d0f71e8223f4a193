// Copying memory at the speed of the cache, whatever the addresses.
#pragma once

#include <cstddef>

namespace roundel {

// memcpy, which on some processors (AMD Zen 3 and 4 with glibc before 2.39) falls to a fifth of its speed from 2 KB up when the
// two addresses lie unluckily to each other modulo 4096: it uses REP MOVSB there. glibc bug 30994. Nothing overlaps; from == to
// is allowed.
void copy_bytes(void* to, const void* from, size_t bytes);

}  // namespace roundel
