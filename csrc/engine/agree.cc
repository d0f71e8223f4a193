// How what this node knows turns into reports to its parent, or, on rank 0, into announcements, and what these do.
#include <algorithm>

#include "base/error.h"
#include "comm/split.h"
#include "engine/bytes.h"
#include "engine/engine.h"
#include "engine/message.h"

namespace roundel::engine {

void Engine::put_request(Writer& out, const std::string& request, bool learn_it) {
  if (const auto found = number_of_.find(request); found != number_of_.end()) {
    out.number(As::Number);
    return out.number(found->second);
  }
  out.number(learn_it && known_.size() < kMostNumbers ? As::ToBeNumbered : As::Itself);
  out.text(request);
}

std::string Engine::take_request(Reader& in) {
  const As as = in.number<As>();
  if (as != As::Number) {
    std::string request(in.text());
    if (as == As::ToBeNumbered) learn(request);
    return request;
  }
  const auto number = in.number<uint32_t>();
  if (number >= known_.size()) throw CorruptFrame(format("the engine heard of a request number %u that nobody gave", number));
  return known_[number];
}

// All ranks learn from the same announcements, so they give the same numbers.
void Engine::learn(const std::string& request) {
  number_of_.emplace(request, static_cast<uint32_t>(known_.size()));
  known_.push_back(request);
}

// The parent counts a rank that has joined as ready for all: what it was ready for before must get there first.
void Engine::note_joined(int rank) {
  if (tree_.parent >= 0) report(board_.take_ready(rank));
  joined_.push_back(rank);
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
    const std::vector<Board::Entry> complete = board_.take_complete();
    std::vector<Board::Variant> variants;
    for (const Board::Entry& entry : complete) variants.insert(variants.end(), entry.variants.begin(), entry.variants.end());
    report(variants);
    return !complete.empty();
  }
  const std::string message = announcement();
  if (message.empty()) return false;
  for (const int child : tree_.children) mailbox_->send(child, message);
  perform(message);
  return true;
}

void Engine::report(const std::vector<Board::Variant>& variants) {
  Writer out;
  for (const Board::Variant& variant : variants) {
    if (variant.ranks.empty()) continue;
    const bool all = variant.ranks.size() == board_.members_of(variant.request, tree_.reporting).size();
    out.number(all ? Report::ReadyAll : Report::Ready);
    put_request(out, variant.request, false);
    if (!all) out.list(variant.ranks);
  }
  if (!out.empty()) mailbox_->send(tree_.parent, out.take());
}

namespace {

// "allreduce 'x': rank 0 and 2 called allreduce of float32 (3,), sum where rank 1 called ..."
std::string difference(const Board::Entry& entry) {
  std::string text;
  for (const Board::Variant& variant : entry.variants) {
    const Request request = decode(variant.request);
    text += text.empty() ? "'" + request.name + "': " : " where ";
    std::vector<int> ranks = variant.ranks;
    std::sort(ranks.begin(), ranks.end());
    text += "rank " + join_ranks(ranks) + " called " + describe(request);
  }
  return text;
}

bool is_unnamed(const Request& request) { return request.name.find(kUnnamed) != std::string::npos; }

}  // namespace

// Rank 0: all that every rank is ready for, in the order in which it became so.
std::string Engine::announcement() {
  Writer out;
  for (const Board::Entry& entry : board_.take_complete()) {
    const std::string& encoded = entry.variants.front().request;
    const Request request = decode(encoded);
    std::string refusal;
    if (entry.variants.size() > 1) refusal = difference(entry);
    if (request.kind == Kind::Broadcast && !entry.ready[static_cast<size_t>(request.root)])
      refusal = format("'%s': its root, rank %d, has joined and has nothing to broadcast", request.name.c_str(), request.root);
    if (!refusal.empty()) {
      out.number(Announcement::Refuse);
      out.text(key_of(encoded));
      out.text(refusal);
      continue;
    }
    out.number(Announcement::Run);
    put_request(out, encoded, !is_unnamed(request) && !request.tensors.empty());
    out.number(entry.last);
  }
  if (board_.all_joined()) {
    out.number(Announcement::JoinOver);
    out.number(joined_.back());
  }
  return out.take();
}

void Engine::perform(const std::string& message) {
  std::vector<Work> works;
  uint32_t set = 0;
  const auto run_collected = [&] {
    if (!works.empty()) run(set, works);
    works.clear();
  };
  Reader in(message);
  while (!in.done()) switch (in.number<Announcement>()) {
      case Announcement::Run: {
        Work work;
        const std::string encoded = take_request(in);
        in.number<int>();
        work.key = key_of(encoded);
        work.request = decode(encoded);
        const bool changes_sets = work.request.kind == Kind::AddSet || work.request.kind == Kind::RemoveSet;
        if (work.request.set != set || changes_sets) run_collected();
        set = work.request.set;
        if (work.request.kind == Kind::AddSet)
          add_set(work);
        else if (work.request.kind == Kind::RemoveSet)
          remove_set(work);
        else
          works.push_back(std::move(work));
        break;
      }
      case Announcement::Refuse: {
        run_collected();
        const std::string key(in.text());
        finish(key, std::make_exception_ptr(Mismatch(std::string(in.text()))));
        break;
      }
      case Announcement::JoinOver: {
        run_collected();
        board_.forget_joined();
        joined_.clear();
        finish(std::string(key_of(join_request_)), nullptr, in.number<int>());
        break;
      }
      default:
        throw CorruptFrame("the engine heard an announcement that makes no sense");
    }
  run_collected();
}

void Engine::run(uint32_t set, std::vector<Work>& works) {
  const auto comm = comms_.find(set);
  if (comm == comms_.end()) return;  // not in the set
  {
    const std::lock_guard lock(mutex_);
    for (Work& work : works) {
      const auto mine = pending_.find(work.key);
      if (mine == pending_.end()) {
        catch_up(work.request);
        continue;
      }
      work.buffers = &mine->second.buffers;  // stays where it is until finish()
      work.ticket = mine->second.ticket.get();
    }
  }
  Executor(*comm->second, fusion_bytes_, [this](Work& work) { finish(work.key, nullptr); }).run(works);
}

// What others called while this rank had joined counts here too: the next unnamed request must get the same name everywhere.
void Engine::catch_up(const Request& request) {
  const size_t at = request.name.find(kUnnamed);
  if (at == std::string::npos) return;
  const uint64_t number = std::strtoull(request.name.c_str() + at + std::char_traits<char>::length(kUnnamed), nullptr, 10);
  uint64_t& next = unnamed_[{request.kind, request.set}];
  next = std::max(next, number + 1);
}

void Engine::finish(const std::string& key, const std::exception_ptr& error, int64_t value) {
  std::shared_ptr<Ticket> ticket;
  {
    const std::lock_guard lock(mutex_);
    const auto found = pending_.find(key);
    if (found == pending_.end()) return;
    ticket = std::move(found->second.ticket);
    if (key == key_of(join_request_)) joining_ = false;
    pending_.erase(found);
    --under_way_;
  }
  if (value >= 0) ticket->value = value;
  ticket->complete(error);
}

// A set of ranks that there is already keeps its number.
void Engine::add_set(const Work& work) {
  std::vector<int> members = work.request.ranks;
  std::sort(members.begin(), members.end());
  members.erase(std::unique(members.begin(), members.end()), members.end());
  for (const auto& [set, ranks] : sets())
    if (ranks == members) return finish(work.key, nullptr, set);
  const bool inside = std::find(members.begin(), members.end(), rank_) != members.end();
  const auto made = comm::split(*comm_, inside ? 0 : -1, 0);
  const uint32_t set = next_set_++;
  if (inside) comms_[set] = made;
  board_.add_set(set, members);
  {
    const std::lock_guard lock(mutex_);
    sets_[set] = members;
  }
  finish(work.key, nullptr, set);
}

// Requests for the set that are still waiting end with an error.
void Engine::remove_set(const Work& work) {
  const auto set = static_cast<uint32_t>(work.request.root);
  std::vector<std::string> orphans;
  {
    const std::lock_guard lock(mutex_);
    sets_.erase(set);
    for (const auto& [key, pending] : pending_)
      if (Reader(key).number<uint32_t>() == set) orphans.push_back(key);
  }
  for (const std::string& key : orphans)
    finish(key, std::make_exception_ptr(Error(format("rank %d: process set %u was removed", rank_, set))));
  board_.remove_set(set);
  if (const auto comm = comms_.find(set); comm != comms_.end()) {
    comm->second->leave(0);
    comms_.erase(comm);
  }
  finish(work.key, nullptr);
}

}  // namespace roundel::engine
