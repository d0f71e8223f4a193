#include "comm/shm.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"

namespace roundel::comm {
namespace {

constexpr size_t kSlots = 4;    // operations between the fastest and the slowest rank: receivers do not wait for each other
constexpr size_t kInline = 96;  // the first 32 bytes share a cache line with the flag
constexpr size_t kOneShot = 32u << 10;  // above it two shots read less than N copies; bench allreduce -b 4K -e 256K
constexpr size_t kArenaFrom =
    2u << 10;                         // below, one shot reads N copies faster than two meetings take; bench allreduce --arena
constexpr size_t kCell = 128u << 10;  // kDepth cells and results of a rank are 1 MB: a usual L2
constexpr size_t kDepth = 4;          // cells between the fastest and the slowest rank
constexpr size_t kTile = 32u << 10;   // a tile and its sum stay in L1/L2 while the sum is copied to N places
constexpr size_t kAlign = 64;         // slices start on cache lines, so that no two ranks write one

}  // namespace

// What a rank says when it enters an operation. `sequence` is written last.
struct alignas(128) ShmLine {
  std::atomic<uint64_t> sequence;
  int64_t arena_offset;  // of the buffer, or -1
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
  alignas(128) std::atomic<uint64_t> finished;  // the last arena operation whose slice is written everywhere
  alignas(4096) std::byte once[kSlots][kOneShot];
  std::byte cells[kDepth][kCell];
  std::byte results[kDepth][kCell];
};
static_assert(sizeof(ShmRegion) <= transport::kCollectiveBytes);

namespace {

// Where slice r of `count` elements lies when slices start on cache lines.
plan::Place slice_of(size_t count, size_t element, int r, int size) {
  const size_t unit = std::max<size_t>(1, kAlign / element);
  const size_t units = (count + unit - 1) / unit;
  const auto part = static_cast<size_t>(r), parts = static_cast<size_t>(size);
  const size_t begin = std::min(count, units * part / parts * unit), end = std::min(count, units * (part + 1) / parts * unit);
  return {plan::Buffer::Out, begin, end - begin};
}

void copy_bytes(void* to, const void* from, size_t bytes) {
  if (bytes > 0 && to != from) std::memcpy(to, from, bytes);
}

void copy_scaled(DType dtype, void* to, const void* from, size_t count, double factor) {
  if (factor == 1)
    copy_bytes(to, from, count * size_of(dtype));
  else
    kernels::scale(dtype, to, from, count, factor);
}

}  // namespace

ShmCommunicator::ShmCommunicator(std::shared_ptr<transport::World> world)
    : Communicator(std::move(world)),
      memory_(*world_->memory),
      rank_(memory_.index()),
      size_(memory_.size()),
      entered_(static_cast<size_t>(memory_.size())) {
  for (int r = 0; r < size_; ++r) regions_.push_back(reinterpret_cast<ShmRegion*>(memory_.collectives(r)));
}

// Waits until ready(); `peer` is whom it needs.
template <class Ready>
void ShmCommunicator::await(const Operation& o, int peer, Ready ready) {
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
    memory_.bell().sleep_on_futex(ready, o.deadline);
    backoff.reset();
  }
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
    await(o, r, [&] { return line.sequence.load(std::memory_order_acquire) >= must_be_entered; });
    known = must_be_entered;
  }
  ShmLine& line = regions_[static_cast<size_t>(rank_)]->lines[o.sequence % kSlots];
  line.arena_offset = -1;
  line.signature = o.signature;
  return line;
}

void ShmCommunicator::publish(const Operation& o, ShmLine& line) {
  line.sequence.store(o.sequence, std::memory_order_release);
  ring_peers();
}

// Waits for a peer to enter this operation, and checks that it is the same one.
const ShmLine& ShmCommunicator::meet(const Operation& o, int peer) {
  const ShmLine& line = regions_[static_cast<size_t>(peer)]->lines[o.sequence % kSlots];
  await(o, peer, [&] { return line.sequence.load(std::memory_order_acquire) >= o.sequence; });
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

void ShmCommunicator::execute(const Operation& o) {
  ShmLine& line = enter(o);
  const size_t shared_bytes = o.kind == OpKind::AllGather ? o.out.bytes() : std::max(o.in.bytes(), o.out.bytes());
  const bool in_place = o.kind == OpKind::AllReduce && o.in.data == o.out.data && shared_bytes > kArenaFrom;
  const auto offset = in_place ? memory_.arena().offset_of(o.out.data, o.out.bytes()) : std::nullopt;
  if (!offset && shared_bytes <= kOneShot) return one_shot(o, line);
  if (offset) {
    line.arena_offset = static_cast<int64_t>(*offset);
    if (o.prescale != 1) kernels::scale(o.out.dtype, o.out.data, o.out.data, o.out.count, o.prescale);
  }
  publish(o, line);
  switch (o.kind) {
    case OpKind::AllReduce: {
      std::vector<std::byte*> copies;  // all of them, or the path through the cells
      for (int r = 0; r < size_; ++r) {
        const ShmLine& theirs = r == rank_ ? line : meet(o, r);
        if (theirs.arena_offset >= 0) copies.push_back(memory_.arena_base(r) + theirs.arena_offset);
      }
      if (static_cast<int>(copies.size()) == size_) return reduce_in_arena(o, copies);
      if (!offset || o.prescale == 1) return reduce_through_cells(o);
      Operation scaled = o;
      scaled.prescale = 1;  // already done, in place
      return reduce_through_cells(scaled);
    }
    case OpKind::ReduceScatter:
    case OpKind::AllToAll:
      meet_all(o);
      return scatter_through_cells(o);
    case OpKind::AllGather:
      meet_all(o);
      return gather_through_cells(o);
    case OpKind::Broadcast:
      return broadcast_through_cells(o);
    default:
      ROUNDEL_CHECK(false);
  }
}

// Everyone's data in its flag line, or beside it; everyone reads everyone's.
void ShmCommunicator::one_shot(const Operation& o, ShmLine& line) {
  const size_t slot = o.sequence % kSlots;
  const bool broadcasts = o.kind == OpKind::Broadcast;
  const size_t bytes = o.in.bytes();
  const size_t element = size_of(o.in.dtype);
  const auto data_of = [&](int r) {
    ShmRegion& region = *regions_[static_cast<size_t>(r)];
    const size_t theirs = o.kind == OpKind::AllGather ? o.parts.count(r) * element : bytes;
    return theirs <= kInline ? region.lines[slot].inline_data : region.once[slot];
  };
  if (!broadcasts || rank_ == o.root) copy_scaled(o.in.dtype, data_of(rank_), o.in.data, o.in.count, o.prescale);
  publish(o, line);

  if (broadcasts) {
    meet_for_broadcast(o);
    return copy_bytes(o.out.data, data_of(o.root), o.out.bytes());
  }
  bool all_published = true;
  for (int r = 0; r < size_; ++r)
    if (r != rank_ && meet(o, r).arena_offset >= 0) all_published = false;
  if (!all_published) return reduce_through_cells(o);  // some ranks hoped to reduce in place; see execute()
  switch (o.kind) {
    case OpKind::AllReduce:
    case OpKind::ReduceScatter: {
      const size_t begin = o.kind == OpKind::ReduceScatter ? o.parts.begin(rank_) : 0;
      std::vector<const void*> inputs;
      for (int r = 0; r < size_; ++r) inputs.push_back(data_of(r) + begin * element);
      return kernels::reduce(o.kernel_op(), o.out.dtype, o.out.data, inputs, o.out.count, o.finish(size_));
    }
    case OpKind::AllGather:
      for (int r = 0; r < size_; ++r) copy_bytes(o.out.at(o.parts.begin(r)), data_of(r), o.parts.count(r) * element);
      return;
    case OpKind::AllToAll: {
      const size_t each = bytes / static_cast<size_t>(size_);
      for (int r = 0; r < size_; ++r)
        copy_bytes(static_cast<std::byte*>(o.out.data) + static_cast<size_t>(r) * each,
                   data_of(r) + static_cast<size_t>(rank_) * each, each);
      return;
    }
    default:
      return;  // a barrier is over when all have come
  }
}

// copies[r] is rank r's buffer. This rank sums its slice of all of them into its own, then writes the sum to the others, tile
// by tile.
void ShmCommunicator::reduce_in_arena(const Operation& o, const std::vector<std::byte*>& copies) {
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
  }
  regions_[static_cast<size_t>(rank_)]->finished.store(o.sequence, std::memory_order_release);
  ring_peers();
  for (int r = 0; r < size_; ++r)
    if (r != rank_)
      await(o, r, [&] { return regions_[static_cast<size_t>(r)]->finished.load(std::memory_order_acquire) >= o.sequence; });
}

namespace {

// Publishing a count of chunks, and the test that others wait for.
void advance(std::atomic<uint64_t>& counter, uint64_t to) { counter.store(to, std::memory_order_release); }
bool reached(const std::atomic<uint64_t>& counter, uint64_t count) { return counter.load(std::memory_order_acquire) >= count; }

}  // namespace

// Two shots, pipelined: while chunk c is staged, the own slice of chunk c-1 is reduced and chunk c-2 is gathered.
void ShmCommunicator::reduce_through_cells(const Operation& o) {
  const size_t element = size_of(o.out.dtype), per_chunk = kCell / element;
  const uint64_t chunks = (o.out.count + per_chunk - 1) / per_chunk, base = chunks_;
  ShmRegion& mine = *regions_[static_cast<size_t>(rank_)];
  chunks_ += chunks;
  const auto length = [&](uint64_t c) { return std::min<size_t>(per_chunk, o.out.count - c * per_chunk); };
  const auto each_peer = [&](auto visit) {  // starting behind oneself, so that ranks do not queue at the same cells
    for (int i = 1; i < size_; ++i) visit((rank_ + i) % size_);
  };

  const auto stage = [&](uint64_t c) {
    const uint64_t id = base + c;
    if (id >= kDepth)
      each_peer(
          [&](int r) { await(o, r, [&] { return reached(regions_[static_cast<size_t>(r)]->consumed, id - kDepth + 1); }); });
    each_peer([&](int r) {
      const plan::Place slice = slice_of(length(c), element, r, size_);
      copy_scaled(o.in.dtype, mine.cells[id % kDepth] + slice.begin * element, o.in.at(c * per_chunk + slice.begin),
                  slice.count, o.prescale);
    });
    advance(mine.staged, id + 1);
    ring_peers();
  };
  const auto reduce = [&](uint64_t c) {
    const uint64_t id = base + c;
    const plan::Place slice = slice_of(length(c), element, rank_, size_);
    const size_t at = slice.begin * element;
    std::vector<const void*> inputs(static_cast<size_t>(size_));
    each_peer([&](int r) {
      ShmRegion& theirs = *regions_[static_cast<size_t>(r)];
      await(o, r, [&] { return reached(theirs.staged, id + 1) && (id < kDepth || reached(theirs.gathered, id - kDepth + 1)); });
      inputs[static_cast<size_t>(r)] = theirs.cells[id % kDepth] + at;
    });
    inputs[static_cast<size_t>(rank_)] = o.in.at(c * per_chunk + slice.begin);
    if (o.prescale != 1) {
      kernels::scale(o.in.dtype, mine.cells[id % kDepth] + at, inputs[static_cast<size_t>(rank_)], slice.count, o.prescale);
      inputs[static_cast<size_t>(rank_)] = mine.cells[id % kDepth] + at;
    }
    std::byte* result = mine.results[id % kDepth] + at;
    kernels::reduce(o.kernel_op(), o.out.dtype, result, inputs, slice.count, o.finish(size_));
    copy_bytes(o.out.at(c * per_chunk + slice.begin), result, slice.count * element);
    advance(mine.consumed, id + 1);
    ring_peers();
  };
  const auto gather = [&](uint64_t c) {
    const uint64_t id = base + c;
    each_peer([&](int r) {
      ShmRegion& theirs = *regions_[static_cast<size_t>(r)];
      await(o, r, [&] { return reached(theirs.consumed, id + 1); });
      const plan::Place slice = slice_of(length(c), element, r, size_);
      copy_bytes(o.out.at(c * per_chunk + slice.begin), theirs.results[id % kDepth] + slice.begin * element,
                 slice.count * element);
    });
    advance(mine.gathered, id + 1);
    ring_peers();
  };

  for (uint64_t c = 0; c < chunks + 2; ++c) {
    if (c < chunks) stage(c);
    if (c >= 1 && c - 1 < chunks) reduce(c - 1);
    if (c >= 2) gather(c - 2);
  }
}

// Reduce-scatter and all-to-all: a cell holds one piece for every rank; each takes its own pieces, summed or one beside the
// other.
void ShmCommunicator::scatter_through_cells(const Operation& o) {
  const size_t element = size_of(o.out.dtype);
  const plan::Parts parts = o.kind == OpKind::AllToAll ? plan::Parts::even(o.in.count, size_) : o.parts;
  size_t longest = 0;
  for (int r = 0; r < size_; ++r) longest = std::max(longest, parts.count(r));
  const size_t room = kCell / static_cast<size_t>(size_) / kAlign * kAlign, piece = room / element;
  const uint64_t chunks = (longest + piece - 1) / piece, base = chunks_;
  ShmRegion& mine = *regions_[static_cast<size_t>(rank_)];
  chunks_ += chunks;
  advance(mine.gathered, chunks_);  // there are no results to gather
  const auto length = [&](int r, uint64_t c) {
    const size_t count = parts.count(r);
    return c * piece < count ? std::min<size_t>(piece, count - c * piece) : 0;
  };

  const auto stage = [&](uint64_t c) {
    const uint64_t id = base + c;
    for (int r = 0; r < size_; ++r) {
      if (r != rank_ && id >= kDepth)
        await(o, r, [&] { return reached(regions_[static_cast<size_t>(r)]->consumed, id - kDepth + 1); });
    }
    for (int r = 0; r < size_; ++r)
      copy_scaled(o.in.dtype, mine.cells[id % kDepth] + static_cast<size_t>(r) * room, o.in.at(parts.begin(r) + c * piece),
                  length(r, c), o.prescale);
    advance(mine.staged, id + 1);
    ring_peers();
  };
  const auto consume = [&](uint64_t c) {
    const uint64_t id = base + c;
    const size_t count = length(rank_, c);
    std::vector<const void*> inputs;
    for (int r = 0; r < size_; ++r) {
      ShmRegion& theirs = *regions_[static_cast<size_t>(r)];
      await(o, r, [&] { return reached(theirs.staged, id + 1); });
      inputs.push_back(theirs.cells[id % kDepth] + static_cast<size_t>(rank_) * room);
    }
    if (o.kind == OpKind::ReduceScatter) {
      kernels::reduce(o.kernel_op(), o.out.dtype, o.out.at(c * piece), inputs, count, o.finish(size_));
    } else {
      for (int r = 0; r < size_; ++r)
        copy_bytes(o.out.at(parts.begin(r) + c * piece), inputs[static_cast<size_t>(r)], count * element);
    }
    advance(mine.consumed, id + 1);
    ring_peers();
  };

  for (uint64_t c = 0; c < chunks + 1; ++c) {
    if (c < chunks) stage(c);
    if (c >= 1) consume(c - 1);
  }
}

void ShmCommunicator::gather_through_cells(const Operation& o) {
  const size_t element = size_of(o.out.dtype), piece = kCell / element;
  size_t longest = 0;
  for (int r = 0; r < size_; ++r) longest = std::max(longest, o.parts.count(r));
  const uint64_t chunks = (longest + piece - 1) / piece, base = chunks_;
  ShmRegion& mine = *regions_[static_cast<size_t>(rank_)];
  chunks_ += chunks;
  advance(mine.gathered, chunks_);
  const auto length = [&](int r, uint64_t c) {
    const size_t count = o.parts.count(r);
    return c * piece < count ? std::min<size_t>(piece, count - c * piece) : 0;
  };
  copy_bytes(o.out.at(o.parts.begin(rank_)), o.in.data, o.in.bytes());

  for (uint64_t c = 0; c < chunks + 1; ++c) {
    if (c < chunks) {
      const uint64_t id = base + c;
      for (int r = 0; r < size_; ++r)
        if (r != rank_ && id >= kDepth)
          await(o, r, [&] { return reached(regions_[static_cast<size_t>(r)]->consumed, id - kDepth + 1); });
      copy_bytes(mine.cells[id % kDepth], o.in.at(c * piece), length(rank_, c) * element);
      advance(mine.staged, id + 1);
      ring_peers();
    }
    if (c >= 1) {
      const uint64_t id = base + c - 1;
      for (int i = 1; i < size_; ++i) {
        const int r = (rank_ + i) % size_;
        ShmRegion& theirs = *regions_[static_cast<size_t>(r)];
        await(o, r, [&] { return reached(theirs.staged, id + 1); });
        copy_bytes(o.out.at(o.parts.begin(r) + (c - 1) * piece), theirs.cells[id % kDepth], length(r, c - 1) * element);
      }
      advance(mine.consumed, id + 1);
      ring_peers();
    }
  }
}

// Root stages, the others copy out.
void ShmCommunicator::broadcast_through_cells(const Operation& o) {
  const size_t element = size_of(o.out.dtype), piece = kCell / element;
  const uint64_t chunks = (o.out.count + piece - 1) / piece, base = chunks_;
  ShmRegion& mine = *regions_[static_cast<size_t>(rank_)];
  chunks_ += chunks;
  advance(mine.gathered, chunks_);
  const auto length = [&](uint64_t c) { return std::min<size_t>(piece, o.out.count - c * piece) * element; };
  if (rank_ != o.root) {
    advance(mine.staged, chunks_);  // nobody waits for what only root stages
    meet_for_broadcast(o);
    ShmRegion& root = *regions_[static_cast<size_t>(o.root)];
    for (uint64_t c = 0; c < chunks; ++c) {
      await(o, o.root, [&] { return reached(root.staged, base + c + 1); });
      copy_bytes(o.out.at(c * piece), root.cells[(base + c) % kDepth], length(c));
      advance(mine.consumed, base + c + 1);
      ring_peers();
    }
    return;
  }
  copy_bytes(o.out.data, o.in.data, o.out.bytes());
  for (uint64_t c = 0; c < chunks; ++c) {
    const uint64_t id = base + c;
    for (int r = 0; r < size_; ++r)
      if (r != rank_ && id >= kDepth)
        await(o, r, [&] { return reached(regions_[static_cast<size_t>(r)]->consumed, id - kDepth + 1); });
    copy_bytes(mine.cells[id % kDepth], o.in.at(c * piece), length(c));
    advance(mine.staged, id + 1);
    ring_peers();
  }
  advance(mine.consumed, chunks_);
  meet_for_broadcast(o);
}

}  // namespace roundel::comm
