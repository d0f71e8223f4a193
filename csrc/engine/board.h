// Who is ready for what: the table of one node of the tree over which readiness is gathered (rank 0, and the first rank of
// each host). No input or output; called by whoever drives the engine.
//
// A request is complete when every rank of its process set that reports to this node is ready for it or has joined, and at
// least one is ready.
#pragma once

#include <map>
#include <span>
#include <utility>
#include <vector>

#include "engine/slot.h"

namespace roundel::engine {

class Board {
 public:
  struct Stalled {
    SharedRequest request;
    std::vector<int> ready, missing;
    double seconds;
  };

  // `reporting`: the ranks of a job of `size` whose readiness arrives here, this node's own included.
  Board(int size, std::vector<int> reporting);
  ~Board();
  Board(Board&&) = default;

  void add_set(uint32_t set, const std::vector<int>& members);
  void remove_set(uint32_t set);

  // Those of `ranks` that are in the request's set.
  std::vector<int> members_of(const Request& request, const std::vector<int>& ranks) const;

  // How many ranks of the request's set report here.
  size_t members(const Request& request) const;

  void ready(const SharedRequest& request, std::span<const int> ranks, Clock::time_point now);
  void join(int rank);
  bool all_joined() const { return joined_count_ == reporting_.size(); }
  void forget_joined();

  // Calls `use` with the Readiness of what is complete, in the order in which it became so, once of each. False when there was
  // none. `use` does not call the board's other methods that change it.
  template <class Use>
  bool take_complete(const Use& use) {
    const bool any = !complete_.empty();
    for (Slot* slot : complete_) {
      use(std::as_const(slot->readiness));
      forget(*slot);
    }
    complete_.clear();
    return any;
  }
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
  const Set& set_of(const Readiness& entry) const { return sets_.at(entry.first.request->request.set); }
  static void hand_on(Readiness& entry, std::vector<Variant>& to);
  std::vector<int> missing(const Readiness& entry, const Set& set) const;
  void check(Slot& slot, const Set& set);
  void forget(Slot& slot);

  std::vector<int> reporting_;
  std::vector<bool> joined_;
  size_t joined_count_ = 0;
  std::map<uint32_t, Set> sets_;
  Roster<&Slot::readiness> slots_;  // for which somebody is ready; the request keeps its slot
  std::vector<Slot*> complete_;
};

}  // namespace roundel::engine
