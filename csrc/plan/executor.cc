#include "plan/executor.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "base/copy.h"
#include "base/error.h"
#include "base/failpoint.h"

namespace roundel::plan {
namespace {

constexpr size_t kWindow = 4;  // pieces under way: one sending, one receiving, one reducing, one waiting
constexpr size_t kTileAlignment = 64, kLargeTileAlignment = 4096;  // see base/memory.h
constexpr size_t kLargeTile = 64u << 10;
constexpr size_t kMaxPieces = 1u << 16;  // per range: the low half of a message's index

size_t aligned_for_tile(size_t at, size_t bytes) {
  const size_t alignment = bytes >= kLargeTile ? kLargeTileAlignment : kTileAlignment;
  return (at + alignment - 1) / alignment * alignment;
}

// A range is cut into pieces by its own length alone, so both ends of a message cut it alike. Nested plans are not cut.
struct Cut {
  Cut(size_t count, size_t element, bool nested, size_t piece_bytes) : count(count) {
    const size_t bytes = count * element;
    size_t piece = nested ? std::max(bytes, element) : std::max(piece_bytes, (bytes + kMaxPieces - 1) / kMaxPieces);
    piece_elements = (piece + element - 1) / element;
    pieces = (count + piece_elements - 1) / piece_elements;
  }
  size_t begin(size_t piece) const { return piece * piece_elements; }
  size_t length(size_t piece) const { return piece < pieces ? std::min(piece_elements, count - begin(piece)) : 0; }
  size_t count, piece_elements, pieces;
};

}  // namespace

// One run: the buffers, and what is known of every step before it starts.
struct Executor::Job {
  const Plan& plan;
  transport::Tag tag;
  View in, out;
  ReduceOp op;
  kernels::Finish finish;
  size_t element;
  size_t piece_bytes;
  const std::byte* given;                                  // what Out would hold at the start; nullptr: Out does
  size_t nested_scratch = 0;                               // offset of all scratch space in one, where places may overlap
  std::vector<uint32_t> ordinal{};                         // by step: messages between the same two ranks before it
  std::vector<std::pair<size_t, size_t>> scratch_tiles{};  // begin of a scratch place, offset of its tile; ascending
  std::vector<size_t> incoming_tiles{};                    // by step: offset of a RecvReduce's tile
  std::vector<std::pair<size_t, size_t>> first_writes{};   // with `given`: begin of a place in Out, its first step; ascending

  Cut cut(size_t count) const { return {count, element, plan.nested, piece_bytes}; }
  // Nothing has been written there before this step.
  bool is_as_given(const Place& place, size_t step) const {
    if (given == nullptr || place.buffer != Buffer::Out) return false;
    const auto first = std::lower_bound(first_writes.begin(), first_writes.end(), std::pair{place.begin, size_t{0}});
    return first == first_writes.end() || first->first != place.begin || step <= first->second;
  }
  transport::Tag message(size_t step, size_t piece) const {
    transport::Tag with_index = tag;
    with_index.index += ordinal[step] << 16 | static_cast<uint32_t>(piece);
    return with_index;
  }
};

// One piece of every range on its way through the rounds.
struct Executor::Lane {
  struct Pending {
    transport::Ticket ticket;
    size_t step;
    size_t begin, count;  // elements of the place
  };
  size_t piece = 0;
  std::byte* tiles = nullptr;
  size_t next_step = 0;
  std::vector<Pending> pending{};

  View view(const Job& job, const Place& place) const {
    const Cut cut = job.cut(place.count);
    View view{nullptr, cut.length(piece), job.out.dtype};
    if (place.buffer == Buffer::Scratch && job.plan.nested) {
      view.data = tiles + job.nested_scratch + place.begin * job.element;
    } else if (place.buffer == Buffer::Scratch) {
      const auto tile = std::lower_bound(job.scratch_tiles.begin(), job.scratch_tiles.end(), std::pair{place.begin, size_t{0}});
      view.data = tiles + tile->second;
    } else {
      const View& buffer = place.buffer == Buffer::In ? job.in : job.out;
      view.data = buffer.at(place.begin + cut.begin(piece));
    }
    return view;
  }
  // What a step reads there.
  const std::byte* read(const Job& job, const Place& place, size_t step) const {
    if (job.is_as_given(place, step)) return job.given + (place.begin + job.cut(place.count).begin(piece)) * job.element;
    return static_cast<const std::byte*>(view(job, place).data);
  }
};

void Executor::number_messages(Job& job) {
  std::vector<std::pair<uint32_t, uint32_t>> counts;  // by peer: sent, received
  job.ordinal.reserve(job.plan.steps.size());
  for (const Step& step : job.plan.steps) {
    const auto peer = static_cast<size_t>(std::max(step.peer, 0));
    if (peer >= counts.size()) counts.resize(peer + 1);
    auto& [sent, received] = counts[peer];
    const bool receives = step.action == Action::Recv || step.action == Action::RecvReduce;
    job.ordinal.push_back(step.action == Action::Send ? sent++ : receives ? received++ : 0);
    ROUNDEL_CHECK(job.ordinal.back() < 1u << 15);
  }
}

void Executor::find_first_writes(Job& job) {
  for (size_t s = 0; s < job.plan.steps.size(); ++s) {
    const Step& step = job.plan.steps[s];
    if (step.action != Action::Send && step.place.buffer == Buffer::Out) job.first_writes.emplace_back(step.place.begin, s);
  }
  std::sort(job.first_writes.begin(), job.first_writes.end());
}

// Returns the bytes of all tiles of one lane.
size_t Executor::lay_out_tiles(Job& job) {
  size_t bytes = 0;
  const auto add = [&](size_t count) {
    const size_t tile = job.cut(count).length(0) * job.element, at = aligned_for_tile(bytes, tile);
    bytes = at + tile;
    return at;
  };
  const auto note = [&](const Place& place) {
    if (place.buffer == Buffer::Scratch && !job.plan.nested) job.scratch_tiles.emplace_back(place.begin, place.count);
  };
  job.incoming_tiles.reserve(job.plan.steps.size());
  for (const Step& step : job.plan.steps) {
    note(step.place);
    for (const Place& place : step.from) note(place);
    job.incoming_tiles.push_back(step.action == Action::RecvReduce ? add(step.place.count) : 0);
  }
  std::sort(job.scratch_tiles.begin(), job.scratch_tiles.end());
  job.scratch_tiles.erase(std::unique(job.scratch_tiles.begin(), job.scratch_tiles.end()), job.scratch_tiles.end());
  for (auto& [begin, tile] : job.scratch_tiles) tile = add(tile);
  if (job.plan.nested) job.nested_scratch = add(job.plan.scratch);
  return aligned_for_tile(bytes, bytes);
}

void Executor::start_round(Job& job, Lane& lane) {
  failpoint::pass(failpoint::Point::ExecutorRound);
  const auto& steps = job.plan.steps;
  const int round = steps[lane.next_step].round;
  // Only pieces that could not be cut are longer than a message may be.
  const auto in_messages = [&](size_t step, size_t count, auto post) {
    const size_t most = transport::kMaxPayload / job.element;
    for (size_t at = 0, piece = lane.piece; at < count; at += most, ++piece) {
      const size_t length = std::min(most, count - at);
      lane.pending.push_back({post(job.message(step, piece), at * job.element, length * job.element), step, at, length});
    }
  };
  for (; lane.next_step < steps.size() && steps[lane.next_step].round == round; ++lane.next_step) {
    const size_t s = lane.next_step;
    const Step& step = steps[s];
    const View view = lane.view(job, step.place);
    if (view.count == 0) continue;
    auto* data = static_cast<std::byte*>(view.data);
    switch (step.action) {
      case Action::Send:
        in_messages(s, view.count, [&](const transport::Tag& tag, size_t at, size_t bytes) {
          return transport_.send(step.peer, tag, {lane.read(job, step.place, s) + at, bytes});
        });
        break;
      case Action::RecvReduce:
        data = lane.tiles + job.incoming_tiles[s];
        [[fallthrough]];
      case Action::Recv:
        in_messages(s, view.count, [&](const transport::Tag& tag, size_t at, size_t bytes) {
          return transport_.recv(step.peer, tag, {data + at, bytes});
        });
        break;
      case Action::Fold: {
        std::vector<const void*> inputs;
        for (const Place& from : step.from) inputs.push_back(lane.read(job, from, s));
        kernels::reduce(job.op, view.dtype, view.data, inputs, view.count, step.last ? job.finish : kernels::Finish{});
        break;
      }
      case Action::Copy:
        copy_bytes(view.data, lane.read(job, step.from[0], s), view.bytes());
        break;
    }
  }
}

// True when the lane has come to its end.
bool Executor::advance(Job& job, Lane& lane) {
  for (;;) {
    std::erase_if(lane.pending, [&](const Lane::Pending& pending) {
      if (!transport_.test(pending.ticket)) return false;
      const Step& step = job.plan.steps[pending.step];
      if (step.action == Action::RecvReduce) {
        const View view = lane.view(job, step.place);
        void* sum = view.at(pending.begin);
        const void* inputs[2] = {lane.read(job, step.place, pending.step) + pending.begin * job.element,
                                 lane.tiles + job.incoming_tiles[pending.step] + pending.begin * job.element};
        kernels::reduce(job.op, view.dtype, sum, inputs, pending.count, step.last ? job.finish : kernels::Finish{});
      }
      return true;
    });
    if (!lane.pending.empty()) return false;
    if (lane.next_step == job.plan.steps.size()) return true;
    start_round(job, lane);
  }
}

void Executor::run(const Plan& plan, const transport::Tag& tag, View in, View out, ReduceOp op, kernels::Finish finish,
                   Deadline deadline, const void* given) {
  ROUNDEL_CHECK(given == nullptr || !plan.nested);
  Job job{plan, tag, in, out, op, finish, size_of(out.dtype), piece_bytes_, static_cast<const std::byte*>(given)};
  number_messages(job);
  if (given != nullptr) find_first_writes(job);
  size_t pieces = 0;
  for (const Step& step : plan.steps) pieces = std::max(pieces, job.cut(step.place.count).pieces);
  std::vector<Lane> lanes(std::min(pieces, kWindow));
  const size_t lane_bytes = lay_out_tiles(job);
  if (lane_bytes * lanes.size() > tiles_bytes_) {
    tiles_.reset();
    tiles_bytes_ = 0;
    tiles_.reset(allocate_memory(lane_bytes * lanes.size()));
    tiles_bytes_ = lane_bytes * lanes.size();
  }

  size_t started = 0, running = lanes.size();
  for (Lane& lane : lanes) {
    lane.tiles = tiles_.get() + lane_bytes * started;
    lane.piece = started++;
  }
  while (running > 0) {
    bool finished = false;
    for (Lane& lane : lanes) {
      if (lane.piece >= pieces || !advance(job, lane)) continue;
      finished = true;
      lane.piece = started++;  // at or beyond the last piece the lane rests
      lane.next_step = 0;
      if (lane.piece >= pieces) --running;
    }
    if (finished || transport_.poll()) continue;
    look_around_();
    transport_.sleep(deadline, disturbed_);
  }
}

}  // namespace roundel::plan
