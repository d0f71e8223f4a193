// The paths of comm/shm for large operations: chunks flow through cells that stay in cache.
//
// A rank's counters (staged, consumed, gathered) count chunks over all operations. A cell is used again when every peer is done
// with what it held depth_ chunks ago. An operation that does not use a counter moves it to its end at once.
#include "base/failpoint.h"
#include "comm/shm.h"
#include "comm/shm_region.h"

namespace roundel::comm {
namespace {

// Publishes a count of chunks, for which peers wait.
void advance(std::atomic<uint64_t>& counter, uint64_t to) { counter.store(to, std::memory_order_release); }

}  // namespace

// Waits until every peer is done with what the cell of chunk `id` held before.
void ShmCommunicator::await_free_cell(const Operation& o, uint64_t id) {
  for (int i = 1; id >= depth_ && i < size_; ++i) {
    const int r = (rank_ + i) % size_;
    await(o, r, regions_[static_cast<size_t>(r)]->consumed, id - depth_ + 1);
  }
}

void ShmCommunicator::publish_bytes(DType dtype, void* to, const void* from, size_t count, double factor) {
  if (factor == 1)
    publisher_.copy(to, from, count * size_of(dtype));
  else
    kernels::scale(dtype, to, from, count, factor);
}

// Two shots, pipelined: while chunk c is staged, the own slice of chunk c-1 is reduced and chunk c-2 is gathered. Of a Reduce
// only root gathers, the others have no output.
void ShmCommunicator::reduce_through_cells(const Operation& o) {
  const DType dtype = o.dtype();
  const size_t element = size_of(dtype), per_chunk = kCell / element;
  const uint64_t chunks = (o.in.count + per_chunk - 1) / per_chunk, base = chunks_;
  ShmRegion& mine = *regions_[static_cast<size_t>(rank_)];
  chunks_ += chunks;
  const bool gathers = o.kind == OpKind::AllReduce || rank_ == o.root;
  if (!gathers) advance(mine.gathered, chunks_);
  const auto length = [&](uint64_t c) { return std::min<size_t>(per_chunk, o.in.count - c * per_chunk); };
  const auto each_peer = [&](auto visit) {  // starting behind oneself, so that ranks do not queue at the same cells
    for (int i = 1; i < size_; ++i) visit((rank_ + i) % size_);
  };

  const auto stage = [&](uint64_t c) {
    const uint64_t id = base + c;
    await_free_cell(o, id);
    each_peer([&](int r) {
      const plan::Place slice = slice_of(length(c), element, r, size_);
      publish_bytes(dtype, mine.cells[id % depth_] + slice.begin * element, o.in.at(c * per_chunk + slice.begin), slice.count,
                    o.prescale);
    });
    advance(mine.staged, id + 1);
    failpoint::pass(failpoint::Point::ShmStaged, mine.cells[id % depth_], kCell);
    ring_peers();
  };
  const auto reduce = [&](uint64_t c) {
    const uint64_t id = base + c;
    const plan::Place slice = slice_of(length(c), element, rank_, size_);
    const size_t at = slice.begin * element;
    each_peer([&](int r) {
      ShmRegion& theirs = *regions_[static_cast<size_t>(r)];
      await(o, r, theirs.staged, id + 1);
      if (id >= depth_) await(o, r, theirs.gathered, id - depth_ + 1);
      inputs_[static_cast<size_t>(r)] = theirs.cells[id % depth_] + at;
    });
    inputs_[static_cast<size_t>(rank_)] = o.in.at(c * per_chunk + slice.begin);
    if (o.prescale != 1) {
      kernels::scale(o.in.dtype, mine.cells[id % depth_] + at, inputs_[static_cast<size_t>(rank_)], slice.count, o.prescale);
      inputs_[static_cast<size_t>(rank_)] = mine.cells[id % depth_] + at;
    }
    std::byte* result = mine.results[id % depth_] + at;
    std::byte* sum = gathers ? o.out.at(c * per_chunk + slice.begin) : result;
    kernels::reduce(o.kernel_op(), dtype, sum, inputs_, slice.count, o.finish(size_));
    if (o.kind == OpKind::AllReduce) publisher_.copy(result, sum, slice.count * element);
    advance(mine.consumed, id + 1);
    failpoint::pass(failpoint::Point::ShmConsumed);
    ring_peers();
  };
  const auto gather = [&](uint64_t c) {
    const uint64_t id = base + c;
    each_peer([&](int r) {
      ShmRegion& theirs = *regions_[static_cast<size_t>(r)];
      await(o, r, theirs.consumed, id + 1);
      const plan::Place slice = slice_of(length(c), element, r, size_);
      copy_bytes(o.out.at(c * per_chunk + slice.begin), theirs.results[id % depth_] + slice.begin * element,
                 slice.count * element);
    });
    advance(mine.gathered, id + 1);
    failpoint::pass(failpoint::Point::ShmGathered);
    ring_peers();
  };

  for (uint64_t c = 0; c < chunks + 2; ++c) {
    if (c < chunks) stage(c);
    if (c >= 1 && c - 1 < chunks) reduce(c - 1);
    if (c >= 2 && gathers) gather(c - 2);
  }
}

// Reduce-scatter, all-to-all, gather and scatter: a cell holds one piece for every rank that this one sends to; each takes the
// pieces that are for it, summed or one beside the other. `longest`: the most elements that one rank has for another.
void ShmCommunicator::exchange_through_cells(const Operation& o, size_t longest) {
  const DType dtype = o.dtype();
  const size_t element = size_of(dtype);
  const bool gathers = o.kind == OpKind::Gather, scatters = o.kind == OpKind::Scatter, sums = o.kind == OpKind::ReduceScatter;
  const bool at_root = rank_ == o.root, sends = scatters ? at_root : !(gathers && at_root), takes = !gathers || at_root;
  const plan::Parts& to = o.kind == OpKind::AllToAllV ? o.sends : o.parts;
  const size_t room = gathers ? kCell : kCell / static_cast<size_t>(size_) / kAlign * kAlign, piece = room / element;
  const uint64_t chunks = (longest + piece - 1) / piece, base = chunks_;
  ShmRegion& mine = *regions_[static_cast<size_t>(rank_)];
  chunks_ += chunks;
  advance(mine.gathered, chunks_);  // there are no results to gather
  if (!sends) advance(mine.staged, chunks_);
  if (!takes) advance(mine.consumed, chunks_);
  const auto length = [&](size_t whole, uint64_t c) {
    return c * piece < whole ? std::min<size_t>(piece, whole - c * piece) : 0;
  };
  // What rank r has for this rank, in the cell of chunk `id`; what is this rank's own stays where it is.
  const auto cell = [&](int r, uint64_t id, int for_rank) {
    return regions_[static_cast<size_t>(r)]->cells[id % depth_] + (gathers ? 0 : static_cast<size_t>(for_rank) * room);
  };
  const auto own = [&](uint64_t c) { return o.in.at((gathers ? 0 : to.begin(rank_)) + c * piece); };

  const auto stage = [&](uint64_t c) {
    const uint64_t id = base + c;
    await_free_cell(o, id);
    if (gathers) publisher_.copy(cell(rank_, id, o.root), own(c), length(to.count(rank_), c) * element);
    for (int r = 0; r < size_ && !gathers; ++r)
      if (r != rank_ || (sums && o.prescale != 1))
        publish_bytes(dtype, cell(rank_, id, r), o.in.at(to.begin(r) + c * piece), length(to.count(r), c), o.prescale);
    advance(mine.staged, id + 1);
    failpoint::pass(failpoint::Point::ShmStaged, mine.cells[id % depth_], kCell);
    ring_peers();
  };
  const auto consume = [&](uint64_t c) {
    const uint64_t id = base + c;
    for (int i = 0; i < size_; ++i) {
      const int r = (rank_ + i) % size_;
      if (scatters && r != o.root) continue;
      const bool staged = r != rank_ || (sums && o.prescale != 1);
      if (r != rank_) await(o, r, regions_[static_cast<size_t>(r)]->staged, id + 1);
      const std::byte* from = staged ? cell(r, id, rank_) : own(c);
      inputs_[static_cast<size_t>(r)] = from;
      if (sums) continue;
      const size_t begin = scatters ? 0 : o.parts.begin(r), count = scatters ? o.parts.count(rank_) : o.parts.count(r);
      deliver(o.out.at(begin + c * piece), from, length(count, c) * element, o.out.bytes());
    }
    if (sums)
      kernels::reduce(o.kernel_op(), dtype, o.out.at(c * piece), inputs_, length(o.parts.count(rank_), c), o.finish(size_));
    advance(mine.consumed, id + 1);
    failpoint::pass(failpoint::Point::ShmConsumed);
    ring_peers();
  };

  for (uint64_t c = 0; c < chunks + 1; ++c) {
    if (c < chunks && sends) stage(c);
    if (c >= 1 && takes) consume(c - 1);
  }
}

void ShmCommunicator::gather_through_cells(const Operation& o) {
  std::byte* own = o.out.at(o.parts.begin(rank_));
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
  for (uint64_t c = 0; c < chunks + 1; ++c) {
    if (c < chunks) {
      const uint64_t id = base + c;
      await_free_cell(o, id);
      const size_t bytes = length(rank_, c) * element;
      publisher_.copy(mine.cells[id % depth_], o.in.at(c * piece), bytes);
      if (o.in.data != own) deliver(own + c * piece * element, o.in.at(c * piece), bytes, o.out.bytes());
      advance(mine.staged, id + 1);
      failpoint::pass(failpoint::Point::ShmStaged, mine.cells[id % depth_], kCell);
      ring_peers();
    }
    if (c >= 1) {
      const uint64_t id = base + c - 1;
      for (int i = 1; i < size_; ++i) {
        const int r = (rank_ + i) % size_;
        ShmRegion& theirs = *regions_[static_cast<size_t>(r)];
        await(o, r, theirs.staged, id + 1);
        deliver(o.out.at(o.parts.begin(r) + (c - 1) * piece), theirs.cells[id % depth_], length(r, c - 1) * element,
                o.out.bytes());
      }
      advance(mine.consumed, id + 1);
      failpoint::pass(failpoint::Point::ShmConsumed);
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
      await(o, o.root, root.staged, base + c + 1);
      deliver(o.out.at(c * piece), root.cells[(base + c) % depth_], length(c), o.out.bytes());
      advance(mine.consumed, base + c + 1);
      failpoint::pass(failpoint::Point::ShmConsumed);
      ring_peers();
    }
    return;
  }
  copy_bytes(o.out.data, o.in.data, o.out.bytes());
  for (uint64_t c = 0; c < chunks; ++c) {
    const uint64_t id = base + c;
    if (c == depth_) meet_all(o);  // another one that thinks it is root will never free a cell
    await_free_cell(o, id);
    publisher_.copy(mine.cells[id % depth_], o.in.at(c * piece), length(c));
    advance(mine.staged, id + 1);
    failpoint::pass(failpoint::Point::ShmStaged, mine.cells[id % depth_], kCell);
    ring_peers();
  }
  advance(mine.consumed, chunks_);
  meet_for_broadcast(o);
}

}  // namespace roundel::comm
