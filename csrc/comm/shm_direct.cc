// The paths of comm/shm that need no cells: peers' buffers are read where they are.
//
// Buffers in the arena are mapped everywhere. Other memory is read with one copy by the kernel, where it allows that
// (process_vm_readv): above kDirectFrom that beats two copies through cells where every rank sends and receives. Whoever is
// read from must wait until all its readers are done (`finished`).
#include <sys/uio.h>

#include "base/error.h"
#include "base/failpoint.h"
#include "comm/shm.h"
#include "comm/shm_region.h"

namespace roundel::comm {
namespace {

constexpr size_t kDirectFrom = 32u << 10;  // of the longest part: below, a system call costs more than a copy saves
constexpr size_t kReadAtOnce = 4u << 20;   // between two looks around
constexpr int64_t kInArena = int64_t{1} << 62;

bool reads_from(const Operation& o, int reader, int owner) {
  switch (o.kind) {
    case OpKind::Gather:
      return reader == o.root && owner != o.root;
    case OpKind::Broadcast:
    case OpKind::Scatter:
      return owner == o.root && reader != o.root;
    default:
      return reader != owner;
  }
}

}  // namespace

// What the flag line says of this rank's input: where it is, or -1 when it must go through cells; 0 where nobody reads it.
int64_t ShmCommunicator::offer(const Operation& o) const {
  const bool by_parts = o.kind != OpKind::Broadcast;
  const size_t most = by_parts ? longest(o.parts) : o.in.count;
  if (reduces(o.kind) || most * size_of(o.dtype()) < kDirectFrom) return -1;
  bool is_read = false;
  for (int r = 0; r < size_; ++r) is_read |= reads_from(o, r, rank_);
  if (!is_read) return 0;
  if (const auto offset = memory_.arena().offset_of(o.in.data, o.in.bytes())) return kInArena | static_cast<int64_t>(*offset);
  // Where a rank only sends or only receives, the two copies through cells run side by side on two cores, and take less time.
  const bool both = o.kind == OpKind::AllGather || o.kind == OpKind::AllToAll;
  return both && memory_.readable() ? reinterpret_cast<int64_t>(o.in.data) : -1;
}

// Copies `bytes` from `at` bytes into what `peer` has offered.
void ShmCommunicator::fetch(const Operation& o, int peer, void* to, size_t at, size_t bytes) {
  const int64_t offered = regions_[static_cast<size_t>(peer)]->lines[o.sequence % kSlots].detail;
  auto* target = static_cast<std::byte*>(to);
  if ((offered & kInArena) != 0)
    return deliver(target, memory_.arena_base(peer) + (offered & ~kInArena) + at, bytes, o.out.bytes());
  for (size_t done = 0; done < bytes; done += kReadAtOnce) {
    const size_t n = std::min(kReadAtOnce, bytes - done);
    if (memory_.read(peer, target + done, static_cast<uint64_t>(offered) + at + done, n)) {
      if (done + n < bytes) look_around(o, [] { return std::vector<int>{}; });
      continue;
    }
    const int rank = memory_.ranks()[static_cast<size_t>(peer)];
    world_->monitor->await_trouble(o.describe());
    throw PeerLost(format("the memory of rank %d cannot be read any more", rank), {rank}, world_->epoch);
  }
}

void ShmCommunicator::exchange_directly(const Operation& o) {
  const size_t element = size_of(o.dtype());
  const bool by_sender = o.kind == OpKind::AllGather || o.kind == OpKind::Gather;  // parts lie in `out`, else in `in`
  const auto place = [&](int r) {
    return o.kind == OpKind::Broadcast || o.kind == OpKind::Scatter ? o.out.at(0) : o.out.at(o.parts.begin(r));
  };
  const auto bytes = [&](int r) {
    if (o.kind == OpKind::Broadcast) return o.out.bytes();
    return (by_sender ? o.parts.count(r) : o.parts.count(rank_)) * element;
  };
  const bool writes = o.out.count > 0 || o.out.data != nullptr;
  for (int i = 0; i < size_; ++i) {
    const int r = (rank_ + i) % size_;
    const size_t at = by_sender || o.kind == OpKind::Broadcast ? 0 : o.parts.begin(rank_) * element;
    if (r != rank_ && reads_from(o, rank_, r)) fetch(o, r, place(r), at, bytes(r));
    const bool own = r == rank_ && writes && (!has_root(o.kind) || rank_ == o.root);
    if (own) deliver(place(r), o.in.at(0) + at, bytes(r), o.out.bytes());
  }
  finish(o);
  for (int r = 0; r < size_; ++r)
    if (reads_from(o, r, rank_)) await(o, r, regions_[static_cast<size_t>(r)]->finished, o.sequence);
}

}  // namespace roundel::comm
