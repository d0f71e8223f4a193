// Failpoints: places between the steps of a protocol where a test makes this process die, stop, stumble or spoil its bytes.
//
// ROUNDEL_FAILPOINT=shm-staged=kill@3 acts at the third passing of that point. Actions: kill (SIGKILL), segv, exit (code 3, no
// shutdown), stop (SIGSTOP), sleep:SECONDS, flip (one bit of the bytes given at the point), error. Always compiled in: a point
// costs one relaxed load while none is set.
#pragma once

#include <atomic>
#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace roundel::failpoint {

enum class Point : unsigned char {
  StartConnect,          // before rank 0 is called
  StartHello,            // the first word of a handshake is said
  StartCard,             // authenticated, before this rank says where it is
  StartVerdict,          // everybody is known
  StartBeforeMemory,     // before the memory's descriptors are handed to peers
  StartAfterMemory,      // after they were
  ShmEntered,            // an operation has its line, nothing is published
  ShmPublished,          // the line is published
  ShmStaged,             // a chunk is in this rank's cell
  ShmConsumed,           // a chunk of the peers' cells is done with
  ShmGathered,           // a chunk of the results is done with
  ShmArenaTile,          // a tile of everybody's arena buffer is written
  ShmFinished,           // the own slice of all arena buffers is written
  StreamQueued,          // a frame is queued
  StreamHeaderSent,      // a header is sent and its payload is not
  StreamHalfSent,        // half of a payload is sent
  StreamHeaderReceived,  // a header has come
  StreamReceived,        // bytes of a payload have come; nothing is checked yet
  StreamMatched,         // a payload is in its place
  StreamRetire,          // an operation is over
  ExecutorRound,         // before a round of a plan
  LeaveBefore,           // shutdown, before the goodbye
  LeaveAfter,            // after it
};
inline constexpr int kPoints = static_cast<int>(Point::LeaveAfter) + 1;

// "shm-staged", ... in the order above.
const std::vector<std::string>& names();

// Reads ROUNDEL_FAILPOINT, and counts from 0 when it has changed. Throws InvalidArgument. One thread at a time.
void configure();

extern std::atomic<bool> g_armed;
void hit(Point point, std::span<std::byte> bytes);
bool is_set(Point point);

inline void pass(Point point) {
  if (g_armed.load(std::memory_order_relaxed)) [[unlikely]]
    hit(point, {});
}

// `bytes`: what flip may spoil.
inline void pass(Point point, void* bytes, size_t count) {
  if (g_armed.load(std::memory_order_relaxed)) [[unlikely]]
    hit(point, {static_cast<std::byte*>(bytes), count});
}

// True when something is to happen at `point`: a caller then does in two steps what it does in one otherwise.
inline bool wants(Point point) { return g_armed.load(std::memory_order_relaxed) && is_set(point); }

}  // namespace roundel::failpoint
