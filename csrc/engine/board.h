// Who is ready for what: the table of one node of the tree over which readiness is gathered (rank 0, and the first rank of
// each host). No input or output; called by whoever drives the engine.
//
// An entry is complete when every rank of its process set that reports to this node is ready for it or has joined, and at least
// one is ready.
#pragma once

#include <deque>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/clock.h"
#include "engine/request.h"

namespace roundel::engine {

class Board {
 public:
  // What some ranks asked for alike.
  struct Variant {
    SharedRequest request;
    std::vector<int> ranks;  // that were not handed on yet
  };
  struct Entry {
    std::vector<Variant> variants;
    std::vector<bool> ready;  // by rank of the job
    size_t covered = 0;       // of the members that report here: ready or joined
    int last = -1;            // the rank that became ready last
    Clock::time_point since;
    bool queued = false;
  };
  struct Stalled {
    SharedRequest request;
    std::vector<int> ready, missing;
    double seconds;
  };

  // `reporting`: the ranks of a job of `size` whose readiness arrives here, this node's own included.
  Board(int size, std::vector<int> reporting);

  void add_set(uint32_t set, const std::vector<int>& members);
  void remove_set(uint32_t set);

  // Those of `ranks` that are in the request's set.
  std::vector<int> members_of(const Request& request, const std::vector<int>& ranks) const;

  // How many ranks of the request's set report here.
  size_t members(const Request& request) const;

  void ready(const SharedRequest& request, const std::vector<int>& ranks);
  void join(int rank);
  bool all_joined() const { return joined_count_ == reporting_.size(); }
  void forget_joined();

  // In the order in which they became complete; each is handed out once.
  std::vector<Entry> take_complete();
  // Ranks that were not handed on yet, of what waits for longer than `seconds`, or of what `rank` is ready for. They count as
  // handed on now.
  std::vector<Variant> take_stale(double seconds);
  std::vector<Variant> take_ready(int rank);
  std::vector<Stalled> stalled(double seconds) const;
  std::vector<int> waited_for() const;  // ranks, each once
  SharedRequest any() const;            // that waits here, or null
  // A rank among `ranks` for which an entry waits, or -1; and for which request.
  int waits_for_any(const std::vector<int>& ranks, SharedRequest* request) const;

 private:
  struct Set {
    std::vector<bool> members;  // that report here, by rank of the job
    size_t count = 0;
  };
  const Set& set_of(const Entry& entry) const { return sets_.at(entry.variants.front().request->request.set); }
  static void hand_on(Entry& entry, std::vector<Variant>& to);
  std::vector<int> missing(const Entry& entry, const Set& set) const;
  void check(Entry& entry, const Set& set);

  std::vector<int> reporting_;
  std::vector<bool> joined_;
  size_t joined_count_ = 0;
  std::map<uint32_t, Set> sets_;
  std::unordered_map<std::string_view, Entry> entries_;  // by key, which the first variant holds
  std::deque<std::string_view> complete_;                // keys
};

}  // namespace roundel::engine
