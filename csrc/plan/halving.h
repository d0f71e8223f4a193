// Recursive halving and doubling on a power of two of seats: the exchange of halving.cc and of swing.cc.
//
// Where there are more ranks than the power of two below, the first are paired: the even ones sit out, and the odd ones add
// their partner's data to theirs at the start and hand the result back at the end. Thakur et al. 2005, section 4.4.
#pragma once

#include "plan/builder.h"
#include "plan/direct.h"

namespace roundel::plan {

struct Folding {
  explicit Folding(int size);
  bool sits_out(int rank) const { return rank < 2 * extra && rank % 2 == 0; }
  bool has_partner(int rank) const { return rank < 2 * extra; }
  int partner(int rank) const { return rank ^ 1; }
  // Those who take part, in order: 0 ... power - 1.
  int player(int rank) const { return rank < 2 * extra ? rank / 2 : rank - extra; }
  int rank_of(int player) const { return player < extra ? 2 * player + 1 : player + extra; }
  // The first rank whose data the player speaks for; player `power` is one past the end.
  int first_of(int player) const { return player < extra ? 2 * player : player + extra; }

  int power, extra, levels;
};

// Where a player sits, and with whom it exchanges at levels 0, 1, ...: the half of its block of power >> level seats in which
// it does not sit for the half in which it does.
struct Seat {
  int seat = 0;
  std::vector<int> peers{};  // ranks
};

// `cut` has a part for every seat. At the end the part of its seat is summed at each.
void halve(Builder& plan, const Seat& seat, const Parts& cut);
// The way back: at the end everyone has all parts.
void redouble(Builder& plan, const Seat& seat, const Parts& cut);

// What they cost at a seat.
Cost cost_of_halving(int seat, int levels, const Parts& cut);
Cost cost_of_redoubling(int seat, int levels, const Parts& cut);

// All-reduce of the whole: fold in, halve, redouble, fold out; and its cost.
Plan allreduce_by_halving(const Shape& shape, Seat (*seat_of)(const Folding& fold, int player));
Cost cost_of_allreduce_by_halving(const Shape& shape, Seat (*seat_of)(const Folding& fold, int player));

}  // namespace roundel::plan
