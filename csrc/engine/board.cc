#include "engine/board.h"

#include <algorithm>

#include "base/error.h"

namespace roundel::engine {

Board::Board(int size, std::vector<int> reporting) : reporting_(std::move(reporting)), joined_(static_cast<size_t>(size)) {}

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
  const auto of_set = [&](const Entry& entry) { return entry.variants.front().request->request.set == set; };
  std::erase_if(complete_, [&](std::string_view key) { return of_set(entries_.at(key)); });
  std::erase_if(entries_, [&](const auto& entry) { return of_set(entry.second); });
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

void Board::check(Entry& entry, const Set& set) {
  if (entry.queued || entry.covered < set.count) return;
  entry.queued = true;
  complete_.push_back(entry.variants.front().request->key);
}

// A request for a set that was removed meanwhile is nobody's any more: its caller has learnt that from the removal.
void Board::ready(const SharedRequest& request, const std::vector<int>& ranks) {
  const auto of_set = sets_.find(request->request.set);
  if (of_set == sets_.end()) return;
  const Set& set = of_set->second;
  const auto [found, is_new] = entries_.try_emplace(request->key);
  Entry& entry = found->second;
  if (is_new) {
    entry.ready.assign(joined_.size(), false);
    entry.since = Clock::now();
    for (size_t r = 0; r < joined_.size() && joined_count_ > 0; ++r) entry.covered += joined_[r] && set.members[r];
  }
  auto variant = std::find_if(entry.variants.begin(), entry.variants.end(),
                              [&](const Variant& v) { return v.request == request || v.request->encoded == request->encoded; });
  if (variant == entry.variants.end()) variant = entry.variants.insert(variant, {request, {}});
  for (const int rank : ranks) {
    const auto r = static_cast<size_t>(rank);
    if (r >= entry.ready.size() || !set.members[r] || entry.ready[r])
      throw CorruptFrame(format("the engine heard twice, or wrongly, that rank %d is ready", rank));
    entry.ready[r] = true;
    entry.covered += !joined_[r];
    entry.last = rank;
    variant->ranks.push_back(rank);
  }
  check(entry, set);
}

void Board::join(int rank) {
  const auto r = static_cast<size_t>(rank);
  if (joined_[r]) return;
  joined_[r] = true;
  ++joined_count_;
  for (auto& [key, entry] : entries_) {
    const Set& set = set_of(entry);
    entry.covered += set.members[r] && !entry.ready[r];
    check(entry, set);
  }
}

void Board::forget_joined() {
  joined_.assign(joined_.size(), false);
  joined_count_ = 0;
}

std::vector<Board::Entry> Board::take_complete() {
  std::vector<Entry> taken;
  for (const std::string_view key : complete_) {
    const auto entry = entries_.find(key);
    auto node = entries_.extract(entry);  // with its key, which lies in what is moved
    taken.push_back(std::move(node.mapped()));
  }
  complete_.clear();
  return taken;
}

void Board::hand_on(Entry& entry, std::vector<Variant>& to) {
  for (Variant& variant : entry.variants)
    if (!variant.ranks.empty()) to.push_back({variant.request, std::exchange(variant.ranks, {})});
}

std::vector<Board::Variant> Board::take_stale(double seconds) {
  std::vector<Variant> taken;
  const auto before = Clock::now() - std::chrono::duration<double>(seconds);
  for (auto& [key, entry] : entries_)
    if (entry.since < before) hand_on(entry, taken);
  return taken;
}

std::vector<Board::Variant> Board::take_ready(int rank) {
  std::vector<Variant> taken;
  for (auto& [key, entry] : entries_)
    if (entry.ready[static_cast<size_t>(rank)]) hand_on(entry, taken);
  return taken;
}

std::vector<int> Board::missing(const Entry& entry, const Set& set) const {
  std::vector<int> ranks;
  for (size_t r = 0; r < joined_.size(); ++r)
    if (set.members[r] && !entry.ready[r] && !joined_[r]) ranks.push_back(static_cast<int>(r));
  return ranks;
}

std::vector<Board::Stalled> Board::stalled(double seconds) const {
  std::vector<Stalled> found;
  for (const auto& [key, entry] : entries_) {
    const double waited = std::chrono::duration<double>(Clock::now() - entry.since).count();
    if (waited < seconds) continue;
    Stalled& stall = found.emplace_back(Stalled{entry.variants.front().request, {}, {}, waited});
    for (size_t r = 0; r < entry.ready.size(); ++r)
      if (entry.ready[r]) stall.ready.push_back(static_cast<int>(r));
    stall.missing = missing(entry, set_of(entry));
  }
  std::sort(found.begin(), found.end(), [](const Stalled& a, const Stalled& b) { return a.seconds > b.seconds; });
  return found;
}

std::vector<int> Board::waited_for() const {
  std::vector<bool> waited(joined_.size());
  for (const auto& [key, entry] : entries_)
    for (const int rank : missing(entry, set_of(entry))) waited[static_cast<size_t>(rank)] = true;
  std::vector<int> ranks;
  for (size_t r = 0; r < waited.size(); ++r)
    if (waited[r]) ranks.push_back(static_cast<int>(r));
  return ranks;
}

SharedRequest Board::any() const { return entries_.empty() ? nullptr : entries_.begin()->second.variants.front().request; }

int Board::waits_for_any(const std::vector<int>& ranks, SharedRequest* request) const {
  for (const auto& [key, entry] : entries_)
    for (const int rank : missing(entry, set_of(entry)))
      if (std::find(ranks.begin(), ranks.end(), rank) != ranks.end()) {
        *request = entry.variants.front().request;
        return rank;
      }
  return -1;
}

}  // namespace roundel::engine
