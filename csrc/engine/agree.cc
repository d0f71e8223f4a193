// How what this node knows turns into reports to its parent, or, on rank 0, into announcements, and what these do.
#include <algorithm>
#include <iterator>

#include "base/error.h"
#include "comm/split.h"
#include "engine/bytes.h"
#include "engine/engine.h"
#include "engine/message.h"
#include "engine/timeline.h"

namespace roundel::engine {

void Engine::put_request(Writer& out, const SharedRequest& request, bool learn_it) {
  if (request->number != Sealed::kNoNumber) {
    out.number(As::Number);
    return out.number(request->number);
  }
  out.number(learn_it && by_number_.size() < kMostNumbers ? As::ToBeNumbered : As::Itself);
  out.text(request->encoded);
}

SharedRequest Engine::take_request(Reader& in) {
  const As as = in.number<As>();
  if (as != As::Number) {
    const std::lock_guard lock(mutex_);
    const SharedRequest request = names_.seal(in.text());
    if (as == As::ToBeNumbered) {  // all ranks learn from the same announcements, so they give the same numbers
      names_.give_number(request, static_cast<uint32_t>(by_number_.size()));
      by_number_.push_back(request);
    }
    return request;
  }
  const auto number = in.number<uint32_t>();
  if (number >= by_number_.size())
    throw CorruptFrame(format("the engine heard of a request number %u that nobody gave", number));
  return by_number_[number];
}

// The parent counts a rank that has joined as ready for all: what it was ready for before must get there first.
void Engine::note_joined(int rank) {
  if (tree_.parent >= 0) report(board_.take_ready(rank));
  joined_.push_back(rank);
  last_progress_ = Clock::now();
  board_.join(rank);
  if (tree_.parent < 0) return;
  Writer out;
  out.number(Report::Joined);
  out.number(rank);
  mailbox_->send(tree_.parent, out.take());
}

// Hands on what has become complete here. False when there was nothing.
bool Engine::advance() {
  if (tree_.parent >= 0) {
    Writer out;
    const bool any = board_.take_complete([&](const Readiness& entry) {
      report(entry.first, out);
      for (const Variant& other : entry.others) report(other, out);
    });
    if (!out.empty()) mailbox_->send(tree_.parent, out.take());
    return any;
  }
  const std::string message = announcement();
  if (message.empty()) return false;
  announce(message);
  return true;
}

// Down the tree, then here. It is flushed first: a collective in shared memory does not look at what waits to be sent, and
// would wait for ranks that have not heard of it. Nobody waits like this for its parent, which may be in a collective.
void Engine::announce(const std::string& message) {
  for (const int child : tree_.children) mailbox_->send(child, message);
  flush(tree_.children, timeout_);
  perform(message);
}

void Engine::report(std::span<const Variant> variants) {
  Writer out;
  for (const Variant& variant : variants) report(variant, out);
  if (!out.empty()) mailbox_->send(tree_.parent, out.take());
}

void Engine::report(const Variant& variant, Writer& out) {
  if (variant.ranks.empty()) return;
  const bool all = variant.ranks.size() == board_.members(variant.request->request);
  out.number(all ? Report::ReadyAll : Report::Ready);
  put_request(out, variant.request, false);
  if (!all) out.list(variant.ranks);
}

namespace {

// "allreduce 'x': rank 0 and 2 called allreduce of float32 (3,), sum where rank 1 called ..."
std::string difference(const Readiness& entry) {
  std::string text;
  const auto add = [&](const Variant& variant) {
    const Request& request = variant.request->request;
    text += text.empty() ? "'" + request.name + "': " : " where ";
    std::vector<int> ranks = variant.ranks;
    std::sort(ranks.begin(), ranks.end());
    text += "rank " + join_ranks(ranks) + " called " + describe(request);
  };
  add(entry.first);
  std::for_each(entry.others.begin(), entry.others.end(), add);
  return text;
}

// Neutral elements of these are changed by a factor.
bool scales_what_joined_ranks_give(const Request& request) {
  const bool reduces = request.kind == Kind::AllReduce || request.kind == Kind::ReduceScatter;
  const bool sums = request.op == static_cast<uint8_t>(ReduceOp::Sum) || request.op == static_cast<uint8_t>(ReduceOp::Average);
  return reduces && !sums && request.op != kAdasum && request.prescale != 1;
}

bool is_unnamed(const Request& request) { return request.name.find(kUnnamed) != std::string::npos; }

}  // namespace

// Rank 0: all that every rank is ready for, in the order in which it became so.
std::string Engine::announcement() {
  Writer out;
  board_.take_complete([&](const Readiness& entry) {
    const SharedRequest& sealed = entry.first.request;
    const Request& request = sealed->request;
    std::string refusal;
    if (!entry.others.empty()) refusal = difference(entry);
    if (request.kind == Kind::Broadcast && !entry.ready[static_cast<size_t>(request.root)])
      refusal = format("'%s': its root, rank %d, has joined and has nothing to broadcast", request.name.c_str(), request.root);
    if (scales_what_joined_ranks_give(request))
      for (const int rank : joined_)
        if (!entry.ready[static_cast<size_t>(rank)] && !board_.members_of(request, {rank}).empty())
          refusal = format("'%s': rank %d has joined, and %s with a prescale has no neutral element for it",
                           request.name.c_str(), rank, name_of(static_cast<ReduceOp>(request.op)));
    if (!refusal.empty()) {
      out.number(Announcement::Refuse);
      out.text(sealed->slot->key);
      return out.text(refusal);
    }
    out.number(Announcement::Run);
    put_request(out, sealed, !is_unnamed(request) && !request.tensors.empty());
    out.number(entry.last);
  });
  if (board_.all_joined()) {
    out.number(Announcement::JoinOver);
    out.number(joined_.back());
  }
  return out.take();
}

void Engine::perform(const std::string& message) {
  std::vector<Work> works;
  works.reserve(message.size() / kShortestRun);
  uint32_t set = 0;
  const auto run_collected = [&] {
    if (!works.empty()) run(set, works);
    works.clear();
  };
  const auto now = last_progress_ = Clock::now();
  if (Timeline::instance().marks_cycles()) Timeline::instance().instant("batch");
  Reader in(message);
  while (!in.done()) switch (in.number<Announcement>()) {
      case Announcement::Run: {
        Work work;
        work.sealed = take_request(in);
        work.last = in.number<int>();
        work.agreed = now;
        const Request& request = work.request();
        const bool changes_sets = request.kind == Kind::AddSet || request.kind == Kind::RemoveSet;
        if (request.set != set || changes_sets) run_collected();
        if (changes_sets) {
          const std::lock_guard lock(mutex_);
          catch_up(request.kind, request.set, request.name);
        }
        set = request.set;
        if (request.kind == Kind::AddSet)
          add_set(work);
        else if (request.kind == Kind::RemoveSet)
          remove_set(work);
        else
          works.push_back(std::move(work));
        break;
      }
      case Announcement::Refuse: {
        run_collected();
        const std::string_view key = in.text();
        refuse(key, std::string(in.text()));
        break;
      }
      case Announcement::JoinOver: {
        run_collected();
        board_.forget_joined();
        joined_.clear();
        finish(*join_->slot, nullptr, in.number<int>());
        break;
      }
      default:
        throw CorruptFrame("the engine heard an announcement that makes no sense");
    }
  run_collected();
}

void Engine::run(uint32_t set, std::vector<Work>& works) {
  const auto executor = executors_.find(set);
  if (executor == executors_.end()) return;  // not in the set
  {
    const std::lock_guard lock(mutex_);
    for (Work& work : works) {
      Pending& mine = work.sealed->slot->pending;
      if (mine.ticket == nullptr) {
        catch_up(work.request().kind, set, work.request().name);
        continue;
      }
      work.buffers = &mine.buffers;  // until finish()
      work.ticket = mine.ticket.get();
      work.submitted = mine.since;
    }
  }
  for (const Work& work : works) {
    if (work.ticket == nullptr) continue;
    stats_.agreed(static_cast<int>(work.request().kind), work.last, work.agreed - work.submitted);
    if (!Timeline::instance().on()) continue;
    Details details;
    details.waited_for = {&work.last, 1};
    Timeline::instance().span(work.request().name, "negotiate", work.submitted, work.agreed, details);
  }
  executor->second.run(works);
}

void Engine::refuse(std::string_view key, const std::string& why) {
  Reader in(key);
  const auto set = in.number<uint32_t>();
  const auto kind = in.number<Kind>();
  std::shared_ptr<Slot> slot;
  {
    const std::lock_guard lock(mutex_);
    slot = names_.find(key);
    const bool is_mine = slot != nullptr && slot->pending.ticket != nullptr;
    if (!is_mine && executors_.contains(set)) catch_up(kind, set, std::string(in.text()));
    if (!is_mine) return;
  }
  finish(*slot, std::make_exception_ptr(Mismatch(why)));
}

// What others called while this rank had joined counts here too: the next unnamed request must get the same name everywhere.
void Engine::catch_up(Kind kind, uint32_t set, const std::string& name) {
  const size_t at = name.find(kUnnamed);
  if (at == std::string::npos) return;
  const uint64_t number = std::strtoull(name.c_str() + at + std::char_traits<char>::length(kUnnamed), nullptr, 10);
  uint64_t& next = unnamed_[{kind, set}];
  next = std::max(next, number + 1);
}

void Engine::finish(Slot& slot, const std::exception_ptr& error, int64_t value) {
  std::shared_ptr<Ticket> ticket;
  {
    const std::lock_guard lock(mutex_);
    if (slot.pending.ticket == nullptr) return;
    if (slot.pending.request->request.kind == Kind::Join) joining_ = false;
    ticket = take_pending(slot);
    --under_way_;
  }
  if (value >= 0) ticket->value = value;
  sleepers_.complete(*ticket, error);
}

// Requests that were carried out together.
void Engine::finish_all(std::span<Work* const> works) {
  {
    const std::lock_guard lock(mutex_);
    for (const Work* work : works)
      if (work->ticket != nullptr) finished_.push_back(take_pending(*work->sealed->slot));
  }
  under_way_ -= static_cast<int>(finished_.size());
  for (const auto& ticket : finished_) sleepers_.complete(*ticket, nullptr);
  finished_.clear();
}

// With mutex_ held.
std::shared_ptr<Ticket> Engine::take_pending(Slot& slot) {
  pending_.remove(slot);
  const SharedRequest last_use = std::move(slot.pending.request);
  return std::move(slot.pending.ticket);
}

void Engine::open_set(uint32_t set, std::shared_ptr<comm::Communicator> comm) {
  executors_.try_emplace(set, std::move(comm), fusion_bytes_, stats_,
                         [this](std::span<Work* const> works) { finish_all(works); });
}

// A set of ranks that there is already keeps its number.
void Engine::add_set(const Work& work) {
  std::vector<int> members = work.request().ranks;
  std::sort(members.begin(), members.end());
  members.erase(std::unique(members.begin(), members.end()), members.end());
  for (const auto& [set, ranks] : sets())
    if (ranks == members) return finish(*work.sealed->slot, nullptr, set);
  const bool inside = std::find(members.begin(), members.end(), rank_) != members.end();
  const auto made = comm::split(*comm_, inside ? 0 : -1, 0);
  const uint32_t set = next_set_++;
  if (inside) open_set(set, made);
  board_.add_set(set, members);
  {
    const std::lock_guard lock(mutex_);
    sets_[set] = members;
  }
  finish(*work.sealed->slot, nullptr, set);
}

// Requests for the set that are still waiting end with an error.
void Engine::remove_set(const Work& work) {
  const auto set = static_cast<uint32_t>(work.request().root);
  std::vector<SharedRequest> orphans;
  {
    const std::lock_guard lock(mutex_);
    sets_.erase(set);
    for (const Slot* slot : pending_)
      if (slot->pending.request->request.set == set) orphans.push_back(slot->pending.request);
  }
  for (const SharedRequest& orphan : orphans)
    finish(*orphan->slot, std::make_exception_ptr(Error(format("rank %d: process set %u was removed", rank_, set))));
  board_.remove_set(set);
  if (const auto executor = executors_.find(set); executor != executors_.end()) {
    executor->second.comm().leave(0);
    executors_.erase(executor);
  }
  finish(*work.sealed->slot, nullptr);
}

}  // namespace roundel::engine
