// The layout of the shared segment that comm/shm works in, and what its two files (shm.cc, shm_cells.cc) both need.
#pragma once

#include <algorithm>
#include <atomic>

#include "base/copy.h"
#include "base/signature.h"
#include "comm/publish.h"
#include "kernels/kernels.h"
#include "plan/plan.h"
#include "transport/shm.h"

namespace roundel::comm {

inline constexpr size_t kSlots =
    4;  // operations between the fastest and the slowest rank: receivers do not wait for each other
inline constexpr size_t kOnce = 4u << 20;           // room for one-shot operations, used from end to end for the same reason
inline constexpr size_t kInline = 96;               // the first 32 bytes share a cache line with the flag
inline constexpr size_t kOneShot = 32u << 10;       // above it two shots read less than N copies; bench allreduce -b 4K -e 256K
inline constexpr size_t kOneShotOfTwo = 64u << 10;  // of all-reduces of two ranks, where both shots read as much
inline constexpr size_t kArenaFrom =
    2u << 10;  // below, one shot reads N copies faster than two meetings take; bench allreduce --arena
inline constexpr size_t kCell = 128u << 10;  // a chunk; bench allreduce -b 16K -e 4M
inline constexpr size_t kDepth = 16;         // cells come round after 2 MB, more than an L2: docs/adr/0005
inline constexpr size_t kCrowdedDepth = 4;   // where ranks share cores, and so their caches, few cells stay in these
inline constexpr size_t kCrowdedOnce = (kSlots + 1) * kOneShot;
inline constexpr size_t kDirectFrom = 1u << 20;          // all-reduces that may be read directly: below, cells always win
inline constexpr size_t kCrowdedDirectFrom = 64u << 10;  // there every chunk of the cells takes turns on the cores
inline constexpr size_t kStreamFrom = 16u << 20;         // results as long as this leave the caches before anyone reads them
inline constexpr size_t kTile = 8u << 10;  // inputs and sum stay in L1 while the sum is copied; bench allreduce --arena
inline constexpr size_t kLine = 128;       // two cache lines, which processors fetch together
inline constexpr size_t kAlign = 64;       // slices start on cache lines, so that no two ranks write one

inline constexpr int64_t kReadDirectly = -2;  // see ShmLine::detail
inline constexpr size_t kNeighbours = 3;      // ranks between which the distance is measured

// Where peers can read an all-reduce's buffers, see place_of(); in ShmLine::inline_data.
struct Places {
  int64_t in = -1, out = -1;
};

// What a rank says when it enters an operation. `sequence` is written last.
struct alignas(128) ShmLine {
  std::atomic<uint64_t> sequence;
  // AllReduce: where in the arena the buffer is, or -1, or kReadDirectly; and Places in inline_data;
  // AllToAllV: elements of the longest part; others: see offer().
  int64_t detail;
  Signature signature;
  std::byte inline_data[kInline];
};
static_assert(sizeof(ShmLine) == 128);

// One rank's part of the segment; written by it alone, read by all. All zero is a valid start.
struct ShmRegion {
  ShmLine lines[kSlots];
  // Chunks that this rank has: put into its cells, read from its peers' (and answered with its result), read results of.
  alignas(128) std::atomic<uint64_t> staged;
  alignas(128) std::atomic<uint64_t> consumed;
  alignas(128) std::atomic<uint64_t> gathered;
  alignas(128) std::atomic<uint64_t> reduced;   // the last operation whose slice this rank has summed in its own output
  alignas(128) std::atomic<uint64_t> finished;  // the last operation for which this rank is done with its peers' buffers
  Probe probe;
  alignas(4096) std::byte once[kOnce];
  std::byte cells[kDepth][kCell];
  std::byte results[kDepth][kCell];
};
static_assert(sizeof(ShmRegion) <= transport::kCollectiveBytes);

// Where slice r of `count` elements lies when slices start on cache lines.
inline plan::Place slice_of(size_t count, size_t element, int r, int size) {
  const size_t unit = std::max<size_t>(1, kAlign / element);
  const size_t units = (count + unit - 1) / unit;
  const auto part = static_cast<size_t>(r), parts = static_cast<size_t>(size);
  const size_t begin = std::min(count, units * part / parts * unit), end = std::min(count, units * (part + 1) / parts * unit);
  return {plan::Buffer::Out, begin, end - begin};
}

inline size_t longest(const plan::Parts& parts) {
  size_t count = 0;
  for (int r = 0; r < parts.size(); ++r) count = std::max(count, parts.count(r));
  return count;
}

// Copies a part of a result of `whole` bytes to its place in the caller's memory. Not for sums, which gain nothing by it.
inline void deliver(void* to, const void* from, size_t bytes, size_t whole) {
  if (whole >= kStreamFrom)
    copy_bytes_streaming(to, from, bytes);
  else
    copy_bytes(to, from, bytes);
}

}  // namespace roundel::comm
