// Shared memory of the ranks of one host: each rank owns one sealed memfd that all others map.
//
//   [header, doorbell][collectives: flag lines and cells, laid out by comm/shm][rings: one per peer, from this rank][arena]
//
// The memfd is sparse: what is never touched costs address space only. It has no name in any file system, so nothing can be
// left behind and the size of /dev/shm does not matter; it is sealed against shrinking, so a peer cannot make us fault.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "transport/channel.h"
#include "transport/doorbell.h"
#include "transport/handshake.h"
#include "transport/monitor.h"

namespace roundel::transport {

inline constexpr size_t kCollectiveBytes = 16u << 20;  // per rank: room for comm/shm's lines and cells
inline constexpr size_t kRingBytes = 512u << 10;       // per ordered pair; half of a usual L2, so that both ends work in cache

struct SegmentHeader;

// Buffers that the library allocates in this rank's segment, where peers can read and write them. Any thread.
class Arena {
 public:
  Arena(std::byte* base, size_t bytes) : base_(base), bytes_(bytes) {}
  // 64-byte aligned (4096 from a page up), zero on first use. Throws Error when the address space is used up.
  std::byte* allocate(size_t bytes);
  void free(std::byte* data);
  // Where [data, data + bytes) lies in the arena, or nothing when it is not inside.
  std::optional<size_t> offset_of(const void* data, size_t bytes) const;

 private:
  std::byte* base_;
  size_t bytes_;
  std::mutex mutex_;
  std::map<size_t, size_t> used_;  // offset -> bytes, ascending
};

// What this rank sees of its host's ranks. Indices are local: 0..local_size-1.
class SharedMemory {
 public:
  // Makes this rank's segment. `ranks`: the global ranks, ascending. A group's arena is smaller than the job's.
  SharedMemory(const Identity& identity, const std::vector<int>& ranks, bool group = false);
  ~SharedMemory();

  // Exchanges descriptors with the host's other ranks over authenticated unix sockets; before anything below. Throws Timeout,
  // PeerLost, HandshakeError, Error, and leaves the connections open then: others must not take their end for this rank's.
  void meet(const Identity& identity, const Patience& patience);

  int index() const { return index_; }
  int size() const { return static_cast<int>(segments_.size()); }
  const std::vector<int>& ranks() const { return ranks_; }

  std::byte* collectives(int index) const;
  std::byte* arena_base(int index) const;
  Arena& arena() { return *arena_; }
  Doorbell& bell() { return bells_[static_cast<size_t>(index_)]; }
  const Doorbell& bell(int index) const { return bells_[static_cast<size_t>(index)]; }

  // Byte stream to and from a peer, through the rings.
  std::unique_ptr<Channel> channel(int index);

  // Whether all peers can read this process's whole memory (process_vm_readv), which the kernel grants to processes of one user
  // unless it was told otherwise. Tried at the start.
  bool readable() const { return readable_; }
  // Copies from a readable peer's memory. False when the peer is gone or the address is none of its own.
  bool read(int index, void* to, uint64_t address, size_t bytes) const;

  // For the monitor, once.
  std::vector<Watch> take_watches() { return std::move(watches_); }

 private:
  size_t index_of(int rank) const;
  void connect_all(const Identity& identity, const Patience& patience);
  void greet(int rank, Fd connection);
  void take_memory(const Watch& from, const Identity& identity, const Patience& patience);
  void adopt(int index, Fd memory, Fd event);
  bool can_read(int index) const;

  std::vector<int> ranks_;
  int index_ = 0;
  Fd memory_, event_;  // to hand out, until all are met
  std::vector<Mapping> segments_;
  std::vector<Doorbell> bells_;
  std::vector<Watch> watches_;
  std::vector<pid_t> processes_;  // by index; 0 where it cannot be seen
  uint64_t probe_ = 0;            // a random number that peers try to read
  bool readable_ = false;
  std::unique_ptr<Arena> arena_;
};

}  // namespace roundel::transport
