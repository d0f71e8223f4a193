#include "engine/board.h"

#include <algorithm>
#include <iterator>

#include "base/error.h"

namespace roundel::engine {

Board::Board(int size, std::vector<int> reporting) : reporting_(std::move(reporting)), joined_(static_cast<size_t>(size)) {}

// A slot that something goes on in keeps itself.
Board::~Board() {
  while (!slots_.empty()) forget(**slots_.begin());
}

void Board::add_set(uint32_t set, const std::vector<int>& members) {
  Set& added = sets_[set];
  added.members.assign(joined_.size(), false);
  for (const int rank : reporting_)
    if (std::find(members.begin(), members.end(), rank) != members.end()) {
      added.members[static_cast<size_t>(rank)] = true;
      ++added.count;
    }
}

void Board::remove_set(uint32_t set) {
  sets_.erase(set);
  const auto of_set = [&](const Slot* slot) { return slot->readiness.first.request->request.set == set; };
  std::erase_if(complete_, of_set);
  std::vector<Slot*> orphans;
  std::copy_if(slots_.begin(), slots_.end(), std::back_inserter(orphans), of_set);
  for (Slot* orphan : orphans) forget(*orphan);
}

std::vector<int> Board::members_of(const Request& request, const std::vector<int>& ranks) const {
  std::vector<int> found;
  const auto set = sets_.find(request.set);
  for (const int rank : ranks)
    if (set != sets_.end() && set->second.members[static_cast<size_t>(rank)]) found.push_back(rank);
  return found;
}

size_t Board::members(const Request& request) const {
  const auto set = sets_.find(request.set);
  return set != sets_.end() ? set->second.count : 0;
}

void Board::check(Slot& slot, const Set& set) {
  Readiness& entry = slot.readiness;
  if (entry.complete || entry.covered < set.count) return;
  entry.complete = true;
  complete_.push_back(&slot);
}

// What it has held is kept for the next time, but for the request.
void Board::forget(Slot& slot) {
  slots_.remove(slot);
  const SharedRequest last_use = std::move(slot.readiness.first.request);
  slot.readiness.first.ranks.clear();
  slot.readiness.others.clear();
}

// A request for a set that was removed meanwhile is nobody's any more: its caller has learnt that from the removal.
void Board::ready(const SharedRequest& request, std::span<const int> ranks, Clock::time_point now) {
  const auto of_set = sets_.find(request->request.set);
  if (of_set == sets_.end()) return;
  const Set& set = of_set->second;
  Slot& slot = *request->slot;
  Readiness& entry = slot.readiness;
  if (entry.first.request == nullptr) {
    entry.first.request = request;
    entry.ready.assign(joined_.size(), false);
    entry.covered = 0;
    entry.complete = false;
    entry.since = now;
    for (size_t r = 0; r < joined_.size() && joined_count_ > 0; ++r) entry.covered += joined_[r] && set.members[r];
    slots_.add(slot);
  }
  const auto is_same = [&](const Variant& v) { return v.request == request || v.request->encoded == request->encoded; };
  Variant* variant = &entry.first;
  if (!is_same(entry.first)) {
    const auto other = std::find_if(entry.others.begin(), entry.others.end(), is_same);
    variant = other != entry.others.end() ? &*other : &entry.others.emplace_back(Variant{request, {}});
  }
  for (const int rank : ranks) {
    const auto r = static_cast<size_t>(rank);
    if (r >= entry.ready.size() || !set.members[r] || entry.ready[r])
      throw CorruptFrame(format("the engine heard twice, or wrongly, that rank %d is ready", rank));
    entry.ready[r] = true;
    entry.covered += !joined_[r];
    entry.last = rank;
    variant->ranks.push_back(rank);
  }
  check(slot, set);
}

void Board::join(int rank) {
  const auto r = static_cast<size_t>(rank);
  if (joined_[r]) return;
  joined_[r] = true;
  ++joined_count_;
  for (Slot* slot : slots_) {
    const Set& set = set_of(slot->readiness);
    slot->readiness.covered += set.members[r] && !slot->readiness.ready[r];
    check(*slot, set);
  }
}

void Board::forget_joined() {
  joined_.assign(joined_.size(), false);
  joined_count_ = 0;
}

void Board::hand_on(Readiness& entry, std::vector<Variant>& to) {
  const auto take = [&](Variant& variant) {
    if (!variant.ranks.empty()) to.push_back({variant.request, std::exchange(variant.ranks, {})});
  };
  take(entry.first);
  for (Variant& variant : entry.others) take(variant);
}

std::vector<Variant> Board::take_stale(double seconds) {
  std::vector<Variant> taken;
  const auto before = Clock::now() - std::chrono::duration<double>(seconds);
  for (Slot* slot : slots_)
    if (slot->readiness.since < before) hand_on(slot->readiness, taken);
  return taken;
}

std::vector<Variant> Board::take_ready(int rank) {
  std::vector<Variant> taken;
  for (Slot* slot : slots_)
    if (slot->readiness.ready[static_cast<size_t>(rank)]) hand_on(slot->readiness, taken);
  return taken;
}

std::vector<int> Board::missing(const Readiness& entry, const Set& set) const {
  std::vector<int> ranks;
  for (size_t r = 0; r < joined_.size(); ++r)
    if (set.members[r] && !entry.ready[r] && !joined_[r]) ranks.push_back(static_cast<int>(r));
  return ranks;
}

std::vector<Board::Stalled> Board::stalled(double seconds) const {
  std::vector<Stalled> found;
  const auto now = Clock::now();
  for (const Slot* slot : slots_) {
    const Readiness& entry = slot->readiness;
    const double waited = std::chrono::duration<double>(now - entry.since).count();
    if (waited < seconds) continue;
    Stalled& stall = found.emplace_back(Stalled{entry.first.request, {}, {}, waited});
    for (size_t r = 0; r < entry.ready.size(); ++r)
      if (entry.ready[r]) stall.ready.push_back(static_cast<int>(r));
    stall.missing = missing(entry, set_of(entry));
  }
  std::sort(found.begin(), found.end(), [](const Stalled& a, const Stalled& b) { return a.seconds > b.seconds; });
  return found;
}

std::vector<int> Board::waited_for() const {
  std::vector<bool> waited(joined_.size());
  for (const Slot* slot : slots_)
    for (const int rank : missing(slot->readiness, set_of(slot->readiness))) waited[static_cast<size_t>(rank)] = true;
  std::vector<int> ranks;
  for (size_t r = 0; r < waited.size(); ++r)
    if (waited[r]) ranks.push_back(static_cast<int>(r));
  return ranks;
}

SharedRequest Board::any() const { return slots_.empty() ? nullptr : (*slots_.begin())->readiness.first.request; }

int Board::waits_for_any(const std::vector<int>& ranks, SharedRequest* request) const {
  for (const Slot* slot : slots_)
    for (const int rank : missing(slot->readiness, set_of(slot->readiness)))
      if (std::find(ranks.begin(), ranks.end(), rank) != ranks.end()) {
        *request = slot->readiness.first.request;
        return rank;
      }
  return -1;
}

}  // namespace roundel::engine
