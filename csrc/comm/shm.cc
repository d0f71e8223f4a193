#include "comm/shm.h"

#include <unistd.h>

#include <new>

#include "base/error.h"
#include "base/failpoint.h"
#include "comm/shm_region.h"

namespace roundel::comm {

namespace {

std::vector<ShmRegion*> regions_of(const transport::SharedMemory& memory) {
  std::vector<ShmRegion*> regions;
  for (int r = 0; r < memory.size(); ++r) regions.push_back(reinterpret_cast<ShmRegion*>(memory.collectives(r)));
  return regions;
}

std::vector<const Probe*> neighbours_of(const std::vector<ShmRegion*>& regions, size_t rank) {
  std::vector<const Probe*> probes;
  for (size_t i = 1; i < regions.size() && i <= kNeighbours; ++i)
    probes.push_back(&regions[(rank + i) % regions.size()]->probe);
  return probes;
}

}  // namespace

ShmCommunicator::ShmCommunicator(std::shared_ptr<transport::World> world)
    : Communicator(std::move(world)),
      memory_(*world_->memory),
      rank_(memory_.index()),
      size_(memory_.size()),
      regions_(regions_of(memory_)),
      entered_(static_cast<size_t>(size_)),
      inputs_(static_cast<size_t>(size_)),
      publisher_(regions_[static_cast<size_t>(rank_)]->probe, neighbours_of(regions_, static_cast<size_t>(rank_))),
      depth_(kDepth),
      once_(kOnce),
      once_sum_(size_ == 2 ? kOneShotOfTwo : kOneShot),
      direct_from_(kDirectFrom) {
  if (size_ > ::sysconf(_SC_NPROCESSORS_ONLN)) {  // the same on all ranks of a host, unlike the cores that each may use
    depth_ = kCrowdedDepth;
    once_ = kCrowdedOnce;
    once_sum_ = kOneShot;
    direct_from_ = kCrowdedDirectFrom;
  }
}

// Waits until a counter of `peer` has come to `target`.
void ShmCommunicator::await(const Operation& o, int peer, const std::atomic<uint64_t>& counter, uint64_t target) {
  const auto ready = [&] { return counter.load(std::memory_order_acquire) >= target; };
  if (ready()) return;
  transport::Backoff backoff(world_->spin);
  while (!ready()) {
    if (backoff.again()) continue;
    if (world_->monitor->somebody_left() && ready()) return;  // it did its part before it left
    try {
      look_around(o, [this, peer] { return std::vector<int>{memory_.ranks()[static_cast<size_t>(peer)]}; });
    } catch (const PeerLost&) {
      if (ready()) return;  // it did its part before it was lost
      throw;
    }
    memory_.bell().sleep_on_futex([&] { return ready() || disturbed(); }, o.deadline);
    backoff.reset();
  }
}

std::vector<int> ShmCommunicator::missing(const Operation& o) const {
  std::vector<int> ranks;
  for (int r = 0; r < size_; ++r)
    if (r != rank_ && regions_[static_cast<size_t>(r)]->lines[o.sequence % kSlots].sequence < o.sequence)
      ranks.push_back(memory_.ranks()[static_cast<size_t>(r)]);
  return ranks;
}

void ShmCommunicator::ring_peers() {
  for (int r = 0; r < size_; ++r)
    if (r != rank_) memory_.bell(r).ring();
}

// The line for this operation, once every peer is past the operation that used it before.
ShmLine& ShmCommunicator::enter(const Operation& o) {
  const uint64_t must_be_entered = o.sequence > kSlots ? o.sequence - kSlots + 1 : 0;
  for (int r = 0; r < size_; ++r) {
    uint64_t& known = entered_[static_cast<size_t>(r)];
    if (r == rank_ || known >= must_be_entered) continue;
    const ShmLine& line = regions_[static_cast<size_t>(r)]->lines[must_be_entered % kSlots];
    await(o, r, line.sequence, must_be_entered);
    known = must_be_entered;
  }
  ShmLine& line = regions_[static_cast<size_t>(rank_)]->lines[o.sequence % kSlots];
  line.detail = -1;
  line.signature = o.signature;
  failpoint::pass(failpoint::Point::ShmEntered);
  return line;
}

void ShmCommunicator::publish(const Operation& o, ShmLine& line) {
  line.sequence.store(o.sequence, std::memory_order_release);
  failpoint::pass(failpoint::Point::ShmPublished, line.inline_data, sizeof line.inline_data);
  ring_peers();
}

// Waits for a peer to enter this operation, and checks that it is the same one.
const ShmLine& ShmCommunicator::meet(const Operation& o, int peer) {
  const ShmLine& line = regions_[static_cast<size_t>(peer)]->lines[o.sequence % kSlots];
  await(o, peer, line.sequence, o.sequence);
  entered_[static_cast<size_t>(peer)] = o.sequence;
  if (line.signature != o.signature)
    throw Mismatch(format("[shm] rank %d called %s where rank %d called %s (operation %llu)", world_->rank,
                          o.signature.describe().c_str(), memory_.ranks()[static_cast<size_t>(peer)],
                          line.signature.describe().c_str(), static_cast<unsigned long long>(o.sequence)));
  return line;
}

void ShmCommunicator::meet_all(const Operation& o) {
  for (int r = 0; r < size_; ++r)
    if (r != rank_) meet(o, r);
}

// Receivers need root only. Root needs nobody's data, but were it to go on alone, two ranks that both think to be root would
// both succeed.
void ShmCommunicator::meet_for_broadcast(const Operation& o) {
  if (rank_ == o.root)
    meet_all(o);
  else
    meet(o, o.root);
}

// This rank is done with what is its peers'.
void ShmCommunicator::finish(const Operation& o) {
  regions_[static_cast<size_t>(rank_)]->finished.store(o.sequence, std::memory_order_release);
  failpoint::pass(failpoint::Point::ShmFinished);
  ring_peers();
}

// Peers are done with what is this rank's.
void ShmCommunicator::await_finish(const Operation& o) {
  for (int r = 0; r < size_; ++r)
    if (r != rank_) await(o, r, regions_[static_cast<size_t>(r)]->finished, o.sequence);
}

// Room for `bytes` of this operation in everyone's `once`. What was there before is kSlots operations old and read by all.
void ShmCommunicator::take_room(size_t bytes) {
  room_ = next_room_ + bytes <= once_ ? next_room_ : 0;
  next_room_ = (room_ + bytes + kLine - 1) / kLine * kLine;
}

void ShmCommunicator::execute(const Operation& o) {
  ShmLine& line = enter(o);
  switch (o.kind) {
    case OpKind::AllReduce:
      allreduce(o, line);
      break;
    case OpKind::AllToAllV:
      alltoallv(o, line);
      break;
    default:
      exchange(o, line);
  }
  publisher_.end();
}

void ShmCommunicator::exchange(const Operation& o, ShmLine& line) {
  const bool by_parts = o.kind == OpKind::AllGather || o.kind == OpKind::Gather;
  const size_t most = by_parts ? longest(o.parts) * size_of(o.dtype()) : o.bytes();
  if (most <= kOneShot) {
    take_room(most);
    return one_shot(o, line);
  }
  publisher_.choose(o.kind, o.bytes(), o.kind == OpKind::Broadcast && memory_.readable());
  line.detail = offer(o);
  publish(o, line);
  publisher_.begin_wait();
  bool direct = line.detail >= 0;
  if (o.kind == OpKind::Broadcast) {
    if (rank_ != o.root) direct = meet(o, o.root).detail >= 0;
    if (rank_ == o.root && (direct || publisher_.measures() || publisher_.timing())) meet_all(o);
  } else {
    for (int r = 0; r < size_; ++r)
      if (r != rank_) direct &= meet(o, r).detail >= 0;
  }
  if (o.kind != OpKind::Broadcast || rank_ == o.root) publisher_.end_wait();  // the others have met root only
  if (direct && !publisher_.direct()) publisher_.go_without();
  if (direct) return exchange_directly(o);
  publisher_.go(false);
  switch (o.kind) {
    case OpKind::Reduce:
      return reduce_through_cells(o);
    case OpKind::AllGather:
      return gather_through_cells(o);
    case OpKind::Broadcast:
      broadcast_through_cells(o);
      finish(o);
      if (publisher_.timing()) await_finish(o);  // root is done before those who read
      return;
    default:
      return exchange_through_cells(o, longest(o.parts));
  }
}

void ShmCommunicator::allreduce(const Operation& o, ShmLine& line) {
  const bool in_place = o.in.data == o.out.data && o.bytes() > kArenaFrom;
  const auto offset = in_place ? memory_.arena().offset_of(o.out.data, o.out.bytes()) : std::nullopt;
  if (o.bytes() <= once_sum_) {
    take_room(o.bytes());  // also on a rank that goes another way, which others may not
    if (!offset) return one_shot(o, line);
  }
  const bool readable = !offset && o.prescale == 1 && size_ > 1 && memory_.readable() && o.bytes() >= direct_from_;
  publisher_.choose(o.kind, o.bytes(), readable);
  line.detail = offset ? static_cast<int64_t>(*offset) : publisher_.direct() ? kReadDirectly : -1;
  if (offset && o.prescale != 1) kernels::scale(o.out.dtype, o.out.data, o.out.data, o.out.count, o.prescale);
  Places& places = *new (line.inline_data) Places;
  if (readable) places = {place_of(o.in), place_of(o.out)};
  publish(o, line);
  publisher_.begin_wait();
  std::vector<std::byte*> copies;  // all of them, or another path
  bool all_readable = true;
  for (int r = 0; r < size_; ++r) {
    const ShmLine& theirs = r == rank_ ? line : meet(o, r);
    if (theirs.detail >= 0) copies.push_back(memory_.arena_base(r) + theirs.detail);
    all_readable &= places_of(o, r).in >= 0;
  }
  publisher_.end_wait();
  if (static_cast<int>(copies.size()) == size_) {
    publisher_.go_without();
    return reduce_in_arena(o, copies);
  }
  const bool direct = all_readable && regions_[0]->lines[o.sequence % kSlots].detail == kReadDirectly;  // one chooses for all
  publisher_.go(direct);
  if (direct) return reduce_directly(o);
  if (!offset || o.prescale == 1) return reduce_through_cells(o);
  Operation scaled = o;
  scaled.prescale = 1;  // already done, in place
  reduce_through_cells(scaled);
}

// No rank knows what the others exchange among themselves: each publishes its longest part, which makes the number of chunks,
// and what it sends to whom.
void ShmCommunicator::alltoallv(const Operation& o, ShmLine& line) {
  line.detail = static_cast<int64_t>(longest(o.sends));
  take_room(static_cast<size_t>(size_) * sizeof(uint64_t));
  uint64_t* to = row(rank_);
  for (int r = 0; r < size_; ++r) to[r] = o.sends.count(r);
  publish(o, line);
  size_t longest_of_all = 0;
  for (int r = 0; r < size_; ++r) {
    const ShmLine& theirs = r == rank_ ? line : meet(o, r);
    longest_of_all = std::max(longest_of_all, static_cast<size_t>(theirs.detail));
  }
  for (int r = 0; r < size_; ++r)
    if (row(r)[rank_] != o.parts.count(r))
      throw Mismatch(format("[shm] rank %d: %s: expected %zu elements from rank %d, which sends %llu", world_->rank,
                            o.describe().c_str(), o.parts.count(r), memory_.ranks()[static_cast<size_t>(r)],
                            static_cast<unsigned long long>(row(r)[rank_])));
  publisher_.choose(o.kind, longest_of_all * size_of(o.dtype()));
  exchange_through_cells(o, longest_of_all);
}

uint64_t* ShmCommunicator::row(int rank) const {
  return reinterpret_cast<uint64_t*>(regions_[static_cast<size_t>(rank)]->once + room_);
}

// Everyone's data in its flag line, or beside it; everyone reads what it needs. What is a rank's own is read where it is.
void ShmCommunicator::one_shot(const Operation& o, ShmLine& line) {
  publisher_.choose(o.kind, o.bytes());
  const bool from_root = o.kind == OpKind::Broadcast || o.kind == OpKind::Scatter;
  const bool to_root = o.kind == OpKind::Reduce || o.kind == OpKind::Gather;
  const bool at_root = rank_ == o.root;
  const DType dtype = o.dtype();
  const size_t element = size_of(dtype);
  const bool by_parts = o.kind == OpKind::AllGather || o.kind == OpKind::Gather;
  const bool in_parts = o.kind == OpKind::ReduceScatter || o.kind == OpKind::Scatter || o.kind == OpKind::AllToAll;
  const auto data_of = [&](int r) {
    ShmRegion& region = *regions_[static_cast<size_t>(r)];
    if (r == rank_ && o.prescale == 1) return o.in.at(0);
    const size_t theirs = by_parts ? o.parts.count(r) * element : o.bytes();
    return theirs <= kInline ? region.lines[o.sequence % kSlots].inline_data : region.once + room_;
  };
  if (from_root ? at_root : !(to_root && at_root) || o.prescale != 1) {
    const bool inlined = o.in.bytes() <= kInline;
    std::byte* to = inlined ? line.inline_data : regions_[static_cast<size_t>(rank_)]->once + room_;
    const plan::Place own = in_parts && !inlined && o.prescale == 1 ? o.parts[rank_] : plan::Place{};
    publish_bytes(dtype, to, o.in.data, own.begin, o.prescale);
    const size_t rest = own.begin + own.count;
    publish_bytes(dtype, to + rest * element, o.in.at(rest), o.in.count - rest, o.prescale);
  }
  publish(o, line);
  if (o.kind == OpKind::Broadcast) {
    meet_for_broadcast(o);
    if (at_root) publisher_.end_wait();
    return copy_bytes(o.out.data, data_of(o.root), o.out.bytes());
  }
  bool all_published = true;
  for (int r = 0; r < size_; ++r)
    if (r != rank_ && meet(o, r).detail >= 0) all_published = false;
  publisher_.end_wait();
  if (!all_published) return reduce_through_cells(o);  // some ranks hoped to reduce in place; see allreduce()
  if (to_root && !at_root) return;
  switch (o.kind) {
    case OpKind::Reduce:
    case OpKind::AllReduce:
    case OpKind::ReduceScatter: {
      const size_t begin = o.kind == OpKind::ReduceScatter ? o.parts.begin(rank_) : 0;
      for (int r = 0; r < size_; ++r) inputs_[static_cast<size_t>(r)] = data_of(r) + begin * element;
      return kernels::reduce(o.kernel_op(), dtype, o.out.data, inputs_, o.out.count, o.finish(size_));
    }
    case OpKind::Gather:
    case OpKind::AllGather:
      for (int r = 0; r < size_; ++r) copy_bytes(o.out.at(o.parts.begin(r)), data_of(r), o.parts.count(r) * element);
      return;
    case OpKind::Scatter:
      return copy_bytes(o.out.data, data_of(o.root) + o.parts.begin(rank_) * element, o.out.bytes());
    case OpKind::AllToAll:
      for (int r = 0; r < size_; ++r)
        copy_bytes(o.out.at(o.parts.begin(r)), data_of(r) + o.parts.begin(rank_) * element, o.parts.count(r) * element);
      return;
    default:
      return;  // a barrier is over when all have come
  }
}

// copies[r] is rank r's buffer. This rank sums its slice of all of them into its own, then writes the sum to the others, tile
// by tile.
void ShmCommunicator::reduce_in_arena(const Operation& o, const std::vector<std::byte*>& copies) {
  if (world_->monitor->troubled()) world_->monitor->raise_trouble(o.describe());  // a peer may have given its buffer up
  const size_t element = size_of(o.out.dtype);
  const plan::Place slice = slice_of(o.out.count, element, rank_, size_);
  const size_t tile = kTile / element;
  std::vector<const void*> inputs(copies.size());
  for (size_t done = 0; done < slice.count; done += tile) {
    const size_t count = std::min(tile, slice.count - done), at = (slice.begin + done) * element;
    for (size_t r = 0; r < copies.size(); ++r) inputs[r] = copies[r] + at;
    std::byte* sum = copies[static_cast<size_t>(rank_)] + at;
    kernels::reduce(o.kernel_op(), o.out.dtype, sum, inputs, count, o.finish(size_));
    for (std::byte* other : copies) copy_bytes(other + at, sum, count * element);
    failpoint::pass(failpoint::Point::ShmArenaTile, sum, count * element);
  }
  finish(o);
  await_finish(o);
}

}  // namespace roundel::comm
