#include "plan/executor.h"

#include <algorithm>
#include <map>

#include "base/copy.h"
#include "base/error.h"
#include "base/failpoint.h"

namespace roundel::plan {
namespace {

constexpr size_t kPieceBytes = 256u << 10;  // several in flight fit a 1 MB L2; below 64 KB the 64-byte frames begin to show
constexpr size_t kWindow = 4;               // pieces under way: one sending, one receiving, one reducing, one waiting
constexpr size_t kMaxPieces = 1u << 16;     // per range: the low half of a message's index

// A range is cut into pieces by its own length alone, so both ends of a message cut it alike. Nested plans are not cut.
struct Cut {
  Cut(size_t count, size_t element, bool nested) : count(count) {
    const size_t bytes = count * element;
    size_t piece = nested ? std::max(bytes, element) : std::max(kPieceBytes, (bytes + kMaxPieces - 1) / kMaxPieces);
    piece_elements = (piece + element - 1) / element;
    pieces = (count + piece_elements - 1) / piece_elements;
  }
  size_t begin(size_t piece) const { return piece * piece_elements; }
  size_t length(size_t piece) const { return piece < pieces ? std::min(piece_elements, count - begin(piece)) : 0; }
  size_t count, piece_elements, pieces;
};

}  // namespace

// One run: the buffers and, for every step, how many messages between the same two ranks come before it.
struct Executor::Job {
  const Plan& plan;
  transport::Tag tag;
  View in, out, scratch;
  ReduceOp op;
  kernels::Finish finish;
  std::vector<uint32_t> ordinal;  // by step

  View view(const Place& place, size_t piece) const {
    const View& buffer = place.buffer == Buffer::In ? in : place.buffer == Buffer::Out ? out : scratch;
    const Cut cut(place.count, size_of(out.dtype), plan.nested);
    return {buffer.at(place.begin + cut.begin(piece)), cut.length(piece), buffer.dtype};
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
  };
  size_t piece = 0;
  size_t next_step = 0;
  std::vector<Pending> pending;
  std::map<size_t, std::unique_ptr<std::byte[]>> incoming;  // RecvReduce under way, by step
};

void Executor::start_round(Job& job, Lane& lane) {
  failpoint::pass(failpoint::Point::ExecutorRound);
  const auto& steps = job.plan.steps;
  const int round = steps[lane.next_step].round;
  for (; lane.next_step < steps.size() && steps[lane.next_step].round == round; ++lane.next_step) {
    const size_t s = lane.next_step;
    const Step& step = steps[s];
    const View view = job.view(step.place, lane.piece);
    if (view.count == 0) continue;
    switch (step.action) {
      case Action::Send:
        lane.pending.push_back(
            {transport_.send(step.peer, job.message(s, lane.piece), {static_cast<const std::byte*>(view.data), view.bytes()}),
             s});
        break;
      case Action::Recv:
        lane.pending.push_back(
            {transport_.recv(step.peer, job.message(s, lane.piece), {static_cast<std::byte*>(view.data), view.bytes()}), s});
        break;
      case Action::RecvReduce: {
        auto& buffer = lane.incoming[s];
        buffer.reset(new std::byte[view.bytes()]);
        lane.pending.push_back({transport_.recv(step.peer, job.message(s, lane.piece), {buffer.get(), view.bytes()}), s});
        break;
      }
      case Action::Fold: {
        std::vector<const void*> inputs;
        for (const Place& from : step.from) inputs.push_back(job.view(from, lane.piece).data);
        kernels::reduce(job.op, view.dtype, view.data, inputs, view.count, step.last ? job.finish : kernels::Finish{});
        break;
      }
      case Action::Copy:
        copy_bytes(view.data, job.view(step.from[0], lane.piece).data, view.bytes());
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
        const View view = job.view(step.place, lane.piece);
        auto& buffer = lane.incoming[pending.step];
        const void* inputs[2] = {view.data, buffer.get()};
        kernels::reduce(job.op, view.dtype, view.data, inputs, view.count, step.last ? job.finish : kernels::Finish{});
        buffer.reset();
      }
      return true;
    });
    if (!lane.pending.empty()) return false;
    if (lane.next_step == job.plan.steps.size()) return true;
    start_round(job, lane);
  }
}

void Executor::run(const Plan& plan, const transport::Tag& tag, View in, View out, ReduceOp op, kernels::Finish finish,
                   Deadline deadline) {
  Job job{plan, tag, in, out, {}, op, finish, {}};
  job.scratch = {scratch(plan.scratch * size_of(out.dtype)), plan.scratch, out.dtype};
  std::map<int, uint32_t> sent, received;
  size_t pieces = 0;
  for (const Step& step : plan.steps) {
    const bool receives = step.action == Action::Recv || step.action == Action::RecvReduce;
    job.ordinal.push_back(step.action == Action::Send ? sent[step.peer]++ : receives ? received[step.peer]++ : 0);
    ROUNDEL_CHECK(job.ordinal.back() < 1u << 15);
    pieces = std::max(pieces, Cut(step.place.count, size_of(out.dtype), plan.nested).pieces);
  }

  std::vector<Lane> lanes;
  size_t started = 0;
  while (started < pieces || !lanes.empty()) {
    while (started < pieces && lanes.size() < kWindow) lanes.push_back({started++, 0, {}, {}});
    const size_t finished = std::erase_if(lanes, [&](Lane& lane) { return advance(job, lane); });
    if (finished > 0 || lanes.empty() || transport_.poll()) continue;
    look_around_();
    transport_.sleep(deadline);
  }
}

std::byte* Executor::scratch(size_t bytes) {
  if (bytes > scratch_bytes_) {
    scratch_.reset();
    scratch_.reset(new std::byte[bytes]);
    scratch_bytes_ = bytes;
  }
  return scratch_.get();
}

}  // namespace roundel::plan
