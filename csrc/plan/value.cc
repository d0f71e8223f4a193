// Sums of multisets of ranks, and the segments of memory that hold them.
#include "plan/value.h"

#include <algorithm>

namespace roundel::plan {

// Of ~0 the low half is kept, which no Id and no rank is.
Sums::Id Sums::intern(uint64_t first, uint64_t second, Node node) {
  const auto [found, fresh] = known_.try_emplace(first << 32 | (second & 0xffffffffu), static_cast<Id>(nodes_.size()));
  if (fresh) nodes_.push_back(std::move(node));
  return found->second;
}

Sums::Id Sums::add(Id a, Id b) {
  if (a > b) std::swap(a, b);
  if (const auto found = known_.find(uint64_t{a} << 32 | b); found != known_.end()) return found->second;

  std::vector<std::pair<int, int>> changes;  // at this rank the number of contributions changes by so many
  for (const Id term : {a, b}) {
    for (const Run& run : nodes_[term].runs) {
      changes.emplace_back(run.begin, run.times);
      changes.emplace_back(run.end, -run.times);
    }
  }
  std::sort(changes.begin(), changes.end());
  Node total;
  int begin = 0, times = 0;
  for (size_t i = 0; i < changes.size();) {
    const int rank = changes[i].first, before = times;
    for (; i < changes.size() && changes[i].first == rank; ++i) times += changes[i].second;
    if (times == before) continue;
    if (before > 0) total.runs.push_back({begin, rank, before});
    begin = rank;
  }
  return intern(a, b, std::move(total));
}

std::vector<Segment> Memory::read(size_t begin, size_t count) const {
  std::vector<Segment> segments;
  if (count == 0) return segments;
  const size_t end = begin + count;
  auto at = std::prev(segments_.upper_bound(begin));
  for (; begin < end; ++at) {
    const Segment& segment = at->second;
    const size_t skipped = begin - at->first, taken = std::min(segment.count - skipped, end - begin);
    segments.push_back({taken, segment.origin + skipped, segment.sum});
    begin += taken;
  }
  return segments;
}

// Makes `begin` the first element of a segment.
void Memory::cut_at(size_t begin) {
  const auto after = segments_.upper_bound(begin);
  if (after == segments_.begin()) return;
  const auto at = std::prev(after);
  const size_t kept = begin - at->first;
  if (kept == 0 || kept >= at->second.count) return;
  segments_.emplace_hint(after, begin, Segment{at->second.count - kept, at->second.origin + kept, at->second.sum});
  at->second.count = kept;
}

void Memory::write(size_t begin, const std::vector<Segment>& segments) {
  size_t end = begin;
  for (const Segment& segment : segments) end += segment.count;
  cut_at(begin);
  cut_at(end);
  auto after = segments_.erase(segments_.lower_bound(begin), segments_.lower_bound(end));
  const auto reads_on = [](const Segment& a, const Segment& b) { return a.sum == b.sum && a.origin + a.count == b.origin; };
  for (const Segment& segment : segments) {
    if (after != segments_.begin()) {
      Segment& previous = std::prev(after)->second;
      if (reads_on(previous, segment)) {
        previous.count += segment.count;
        begin += segment.count;
        continue;
      }
    }
    segments_.emplace_hint(after, begin, segment);
    begin += segment.count;
  }
  if (after == segments_.end() || after == segments_.begin()) return;
  const auto previous = std::prev(after);
  if (!reads_on(previous->second, after->second)) return;
  previous->second.count += after->second.count;
  segments_.erase(after);
}

}  // namespace roundel::plan
