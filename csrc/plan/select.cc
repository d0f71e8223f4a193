// Which algorithm to run, unless the user forces one by name: the cheapest by a linear model, rounds * latency + bytes * (time
// per byte) of Hockney, "The communication challenge for MPP", 1994, and a time for every message as in Culler et al., "LogP:
// towards a realistic model of parallel computation", PPoPP 1993.
#include <algorithm>
#include <set>
#include <vector>

#include "base/error.h"
#include "plan/plan.h"

namespace roundel::plan {
namespace {

// Elements that the ranks of the busiest host send to other hosts, counted in the plans themselves. Of many hosts these are
// looked at: the first, the root's, the last, one in the middle and the largest. Roots of trees and folded ranks are there.
size_t elements_leaving(const Algorithm& row, const Shape& shape) {
  std::vector<std::vector<int>> ranks;
  for (int r = 0; r < shape.size; ++r) {
    const auto host = static_cast<size_t>(shape.host[static_cast<size_t>(r)]);
    if (host >= ranks.size()) ranks.resize(host + 1);
    ranks[host].push_back(r);
  }
  const auto by_size = [](const std::vector<int>& a, const std::vector<int>& b) { return a.size() < b.size(); };
  const auto largest = static_cast<size_t>(std::max_element(ranks.begin(), ranks.end(), by_size) - ranks.begin());
  const auto root = static_cast<size_t>(shape.host[static_cast<size_t>(shape.root)]);
  size_t most = 0;
  for (const size_t host : std::set<size_t>{0, root, ranks.size() - 1, ranks.size() / 2, largest}) {
    size_t leaving = 0;
    for (const int rank : ranks[host]) {
      Shape of_rank = shape;
      of_rank.rank = rank;
      for (const Step& step : row.make(of_rank).steps)
        if (step.action == Action::Send && static_cast<size_t>(shape.host[static_cast<size_t>(step.peer)]) != host)
          leaving += step.place.count;
    }
    most = std::max(most, leaving);
  }
  return most;
}

bool share_hosts(const Shape& shape) {
  return !shape.host.empty() && *std::max_element(shape.host.begin(), shape.host.end()) > 0;
}

// 16-bit sums that are not rounded once travel as float32.
double wire_bytes(const Algorithm& row, DType dtype) {
  return static_cast<double>(size_of(dtype) * (is_half(dtype) && !row.single_fold ? 2 : 1));
}

// All but what leaves hosts. A nested plan is run in one piece: what it moves comes from memory, where pieces would be in
// cache.
double seconds(const Algorithm& row, const Shape& shape, DType dtype, const LinkCost& cost) {
  const Cost plan = row.cost(shape);
  return static_cast<double>(plan.rounds) * cost.seconds_per_round +
         static_cast<double>(plan.messages) * cost.seconds_per_message +
         static_cast<double>(plan.elements_sent) * wire_bytes(row, dtype) * cost.seconds_per_byte +
         static_cast<double>(plan.elements_added + (row.nested ? plan.elements_sent : 0)) * wire_bytes(row, dtype) *
             cost.seconds_per_added_byte;
}

// Throws if no collective has an algorithm of this name.
void require_known(const std::string& name) {
  std::set<std::string> known;
  for (const Algorithm& row : algorithms()) known.insert(row.name);
  if (known.contains(name)) return;
  std::string names;
  for (const std::string& each : known) names += (names.empty() ? "" : ", ") + each;
  throw InvalidArgument(format("there is no algorithm '%s'; known are: %s", name.c_str(), names.c_str()));
}

}  // namespace

const Algorithm& select(Collective collective, const Shape& shape, DType dtype, const LinkCost& cost,
                        const std::string& forced) {
  if (!forced.empty()) {
    require_known(forced);
    if (const Algorithm* row = find_algorithm(collective, forced)) return *row;
  }
  struct Candidate {
    const Algorithm* row;
    double seconds;
  };
  std::vector<Candidate> candidates;
  for (const Algorithm& row : algorithms())
    if (row.collective == collective) candidates.push_back({&row, seconds(row, shape, dtype, cost)});
  // Cheapest first, so that what leaves hosts, which takes plans to find out, is asked of those only that may still win.
  std::stable_sort(candidates.begin(), candidates.end(), [](const auto& a, const auto& b) { return a.seconds < b.seconds; });
  const bool leaves = cost.seconds_per_leaving_byte > 0 && collective != Collective::AllToAllV && share_hosts(shape);
  const Algorithm* best = nullptr;
  double best_seconds = 0;
  for (auto [row, seconds] : candidates) {
    if (best != nullptr && seconds > best_seconds) break;
    if (leaves)
      seconds += static_cast<double>(elements_leaving(*row, shape)) * wire_bytes(*row, dtype) * cost.seconds_per_leaving_byte;
    if (best != nullptr && (seconds > best_seconds || (seconds == best_seconds && row > best))) continue;
    best = row;
    best_seconds = seconds;
  }
  ROUNDEL_CHECK(best != nullptr);
  return *best;
}

}  // namespace roundel::plan
