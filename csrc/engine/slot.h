// One name (of a kind and a process set) and what goes on under it: at most one request of this rank, and who is ready for it.
//
// A request finds its slot once, by its name, and keeps it: all that happens to it afterwards needs no search.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "engine/request.h"
#include "engine/ticket.h"

namespace roundel::engine {

// This rank's request under way; none without a ticket.
struct Pending {
  SharedRequest request;
  Buffers buffers;
  std::shared_ptr<Ticket> ticket;
  Clock::time_point since;
  size_t place = 0;  // in the roster of those under way
};

// What some ranks asked for alike.
struct Variant {
  SharedRequest request;
  std::vector<int> ranks;  // that were not handed on yet
};

// Who is ready; the board's (board.h).
struct Readiness {
  Variant first;                // without a request: nobody is ready
  std::vector<Variant> others;  // where ranks asked for something else
  std::vector<bool> ready;      // by rank of the job
  size_t covered = 0;           // of the members that report here: ready or joined
  int last = -1;                // the rank that became ready last
  Clock::time_point since;
  bool complete = false;
  size_t place = 0;  // in the board's roster
};

// Members are in the order in which a request looks at them: a thousand slots are too much for the nearest caches.
struct Slot {
  explicit Slot(std::string_view key) : key(key) {}
  SharedRequest agreed;   // the numbered request of this name that was asked for last, if any; guarded by the engine's mutex
  Pending pending;        // guarded likewise
  Readiness readiness;    // of whoever drives the engine
  const std::string key;  // as in the encoded request
};

// Slots in which something goes on, in no order. `part` is the member that says what (&Slot::pending, &Slot::readiness) and
// knows the slot's place here, so that it comes and goes without a search.
template <auto part>
class Roster {
 public:
  void add(Slot& slot) {
    (slot.*part).place = slots_.size();
    slots_.push_back(&slot);
  }
  void remove(Slot& slot) {
    Slot* last = slots_.back();
    (last->*part).place = (slot.*part).place;
    slots_[(slot.*part).place] = last;
    slots_.pop_back();
  }
  bool empty() const { return slots_.empty(); }
  auto begin() const { return slots_.begin(); }
  auto end() const { return slots_.end(); }

 private:
  std::vector<Slot*> slots_;
};

}  // namespace roundel::engine
