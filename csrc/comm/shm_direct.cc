// The paths of comm/shm that need no cells: peers' buffers are read where they are.
//
// Buffers in the arena are mapped everywhere. Other memory is read with one copy by the kernel, where it allows that
// (process_vm_readv): above kExchangeFrom that beats two copies through cells where every rank sends and receives; of
// broadcasts and sums the Publisher finds out. Whoever is read from must wait until all its readers are done (`finished`).

#include "base/error.h"
#include "base/failpoint.h"
#include "comm/shm.h"
#include "comm/shm_region.h"

namespace roundel::comm {
namespace {

constexpr size_t kExchangeFrom = 32u << 10;  // of the longest part: below, a system call costs more than a copy saves
constexpr size_t kReadAtOnce = 4u << 20;     // between two looks around
constexpr int64_t kInArena = int64_t{1} << 62;
constexpr size_t kFetched = 384u << 10;  // of all peers together: with what is summed and the sum, less than an L2
constexpr size_t kMostFetched = 256u << 10, kLeastFetched = 16u << 10;  // of one peer; bench allreduce -np 2 -b 1M

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

// Where peers find this memory: in the arena, or an address in this process; -1 when they cannot read it.
int64_t ShmCommunicator::place_of(const View& view) const {
  if (const auto offset = memory_.arena().offset_of(view.data, view.bytes())) return kInArena | static_cast<int64_t>(*offset);
  return memory_.readable() ? reinterpret_cast<int64_t>(view.data) : -1;
}

const Places& ShmCommunicator::places_of(const Operation& o, int rank) const {
  return *reinterpret_cast<const Places*>(regions_[static_cast<size_t>(rank)]->lines[o.sequence % kSlots].inline_data);
}

// What the flag line says of this rank's input: where it is, or -1 when it must go through cells; 0 where nobody reads it.
int64_t ShmCommunicator::offer(const Operation& o) const {
  const bool by_parts = o.kind != OpKind::Broadcast;
  const size_t most = by_parts ? longest(o.parts) : o.in.count;
  if (reduces(o.kind) || most * size_of(o.dtype()) < kExchangeFrom) return -1;
  bool is_read = false;
  for (int r = 0; r < size_; ++r) is_read |= reads_from(o, r, rank_);
  if (!is_read) return 0;
  // Where a rank only sends or only receives, the two copies through cells run side by side on two cores.
  const bool directly = o.kind == OpKind::AllGather || o.kind == OpKind::AllToAll || publisher_.direct();
  const int64_t place = place_of(o.in);
  return directly || (place > 0 && (place & kInArena) != 0) ? place : -1;
}

// The place that `peer` has told, when it is mapped here.
const std::byte* ShmCommunicator::mapped(int peer, int64_t place) const {
  return (place & kInArena) != 0 ? memory_.arena_base(peer) + (place & ~kInArena) : nullptr;
}

// Copies `bytes` from a place that `peer` has told.
void ShmCommunicator::fetch(const Operation& o, int peer, int64_t place, void* to, size_t bytes) {
  auto* target = static_cast<std::byte*>(to);
  if (const std::byte* from = mapped(peer, place)) return deliver(target, from, bytes, o.out.bytes());
  for (size_t done = 0; done < bytes; done += kReadAtOnce) {
    const size_t n = std::min(kReadAtOnce, bytes - done);
    if (memory_.read(peer, target + done, static_cast<uint64_t>(place) + done, n)) {
      if (done + n < bytes) look_around(o, [] { return std::vector<int>{}; });
      continue;
    }
    const int rank = memory_.ranks()[static_cast<size_t>(peer)];
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
    if (r != rank_ && reads_from(o, rank_, r))
      fetch(o, r, regions_[static_cast<size_t>(r)]->lines[o.sequence % kSlots].detail + static_cast<int64_t>(at), place(r),
            bytes(r));
    const bool own = r == rank_ && writes && (!has_root(o.kind) || rank_ == o.root);
    if (own) deliver(place(r), o.in.at(0) + at, bytes(r), o.out.bytes());
  }
  finish(o);
  for (int r = 0; r < size_; ++r)
    if (reads_from(o, r, rank_)) await(o, r, regions_[static_cast<size_t>(r)]->finished, o.sequence);
}

// This rank fetches its slice of all inputs and sums it into its own output, a tile at a time; when all have, it fetches their
// slices. In place is allowed: nobody but rank r needs slice r of an input.
void ShmCommunicator::reduce_directly(const Operation& o) {
  const size_t element = size_of(o.dtype()), peers = static_cast<size_t>(size_) - 1;
  const size_t tile = std::clamp(kFetched / peers, kLeastFetched, kMostFetched) / kAlign * kAlign;
  fetched_.resize(tile * peers + kAlign);
  std::byte* room = fetched_.data() + -reinterpret_cast<uintptr_t>(fetched_.data()) % kAlign;
  ShmRegion& mine = *regions_[static_cast<size_t>(rank_)];

  const bool streams = publisher_.streams() && o.bytes() < kStreamFrom;  // what peers have read before, and still hold
  const plan::Place slice = slice_of(o.in.count, element, rank_, size_);
  for (size_t done = 0; done < slice.count; done += tile / element) {
    const size_t count = std::min(tile / element, slice.count - done), begin = slice.begin + done;
    std::byte* to = room;
    for (int i = 1; i < size_; ++i, to += tile) {
      const int r = (rank_ + i) % size_;
      const void*& input = inputs_[static_cast<size_t>(r)] =
          mapped(r, places_of(o, r).in + static_cast<int64_t>(begin * element));
      if (input != nullptr) continue;
      fetch(o, r, places_of(o, r).in + static_cast<int64_t>(begin * element), to, count * element);
      input = to;
    }
    inputs_[static_cast<size_t>(rank_)] = o.in.at(begin);
    std::byte* sum = streams ? room : o.out.at(begin);
    kernels::reduce(o.kernel_op(), o.dtype(), sum, inputs_, count, o.finish(size_));
    if (sum == room) publisher_.copy(o.out.at(begin), sum, count * element);
    failpoint::pass(failpoint::Point::ShmConsumed);
  }
  mine.reduced.store(o.sequence, std::memory_order_release);
  ring_peers();

  for (int i = 1; i < size_; ++i) {
    const int r = (rank_ + i) % size_;
    await(o, r, regions_[static_cast<size_t>(r)]->reduced, o.sequence);
    const plan::Place theirs = slice_of(o.in.count, element, r, size_);
    fetch(o, r, places_of(o, r).out + static_cast<int64_t>(theirs.begin * element), o.out.at(theirs.begin),
          theirs.count * element);
    failpoint::pass(failpoint::Point::ShmGathered);
  }
  finish(o);
  await_finish(o);
}

}  // namespace roundel::comm
