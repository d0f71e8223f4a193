// The checker: all plans of a collective are run together on symbolic values, and the outcome is held against what was
// promised.
//
// A send and its receive happen together, once both ranks have come to their rounds: no buffering is assumed, so a plan that
// passes cannot deadlock over any transport. Within a round the order of steps does not matter, since inspect.cc has found no
// conflict.
#include "plan/check.h"

#include <algorithm>

#include "base/error.h"
#include "plan/inspect.h"
#include "plan/value.h"

namespace roundel::plan {
namespace {

// Step `index` of rank `rank`.
struct At {
  int rank;
  size_t index;
};

struct Rank {
  const Plan& plan;
  Ranges ranges;
  std::vector<Value> values;  // of every range
  std::vector<At> partner;    // of every step that communicates: the other end of its message
  size_t begin = 0, end = 0;  // steps of the round it is in
  size_t waiting = 0;         // messages of this round that are still to come

  const Step& step(size_t index) const { return plan.steps[index]; }
  Value& at(const Place& place) { return values[ranges.find(place)]; }
  bool done() const { return waiting == 0 && end == plan.steps.size(); }
};

class Checker {
 public:
  Checker(const Algorithm& algorithm, const Shape& shape, const std::vector<Plan>& plans);
  void run();
  void check_results();
  void check_costs() const;

 private:
  void match();
  void begin_round(int rank);
  void deliver(At send, At receive);
  void store(At at, const std::vector<const Value*>& terms);
  void expect(int rank, size_t begin, size_t count, size_t origin, int first_rank, int ranks);
  void expect_same_order();
  Value initial(int rank, const Place& place) const;
  std::string describe(At at) const { return plan::describe(at.rank, of(at.rank).plan, at.index); }
  Rank& of(int rank) { return ranks_[static_cast<size_t>(rank)]; }
  const Rank& of(int rank) const { return ranks_[static_cast<size_t>(rank)]; }

  const Algorithm& algorithm_;
  const Shape& shape_;
  std::vector<Rank> ranks_;
  std::vector<int> ready_;  // ranks that may begin their next round
};

Checker::Checker(const Algorithm& algorithm, const Shape& shape, const std::vector<Plan>& plans)
    : algorithm_(algorithm), shape_(shape) {
  ranks_.reserve(plans.size());
  for (int r = 0; r < shape.size; ++r) {
    const Plan& plan = plans[static_cast<size_t>(r)];
    Rank& rank = ranks_.emplace_back(Rank{plan, inspect(r, plan, algorithm, shape), {}, {}});
    rank.values.reserve(rank.ranges.size());
    for (size_t i = 0; i < rank.ranges.size(); ++i) rank.values.push_back(initial(r, rank.ranges[i]));
    rank.partner.resize(plan.steps.size());
    ready_.push_back(r);
  }
  match();
}

// What the caller has put there, as plan.h says.
Value Checker::initial(int rank, const Place& place) const {
  const Parts& parts = shape_.parts;
  bool filled = place.buffer == Buffer::Out;
  if (algorithm_.collective == Collective::AllGather)
    filled &= place.begin >= parts.begin(rank) && place.begin + place.count <= parts.begin(rank) + parts.count(rank);
  if (algorithm_.collective == Collective::Broadcast) filled &= rank == shape_.root;
  if (algorithm_.collective == Collective::AllToAll) filled = place.buffer == Buffer::In;
  return filled ? contribution(rank, place.begin) : Value{};
}

// The k-th send from a to b meets the k-th receive of b from a.
void Checker::match() {
  const size_t size = static_cast<size_t>(shape_.size);
  const auto channel = [&](int from, int to) { return static_cast<size_t>(from) * size + static_cast<size_t>(to); };
  std::vector<size_t> first(size * size + 1);  // of the sends on a channel, in the list of all sends
  for (int r = 0; r < shape_.size; ++r)
    for (const Step& step : of(r).plan.steps)
      if (step.action == Action::Send) ++first[channel(r, step.peer) + 1];
  for (size_t i = 1; i < first.size(); ++i) first[i] += first[i - 1];

  std::vector<At> sends(first.back());
  std::vector<size_t> next(first.begin(), first.end() - 1);
  for (int r = 0; r < shape_.size; ++r)
    for (size_t i = 0; i < of(r).plan.steps.size(); ++i)
      if (of(r).step(i).action == Action::Send) sends[next[channel(r, of(r).step(i).peer)]++] = {r, i};

  std::copy(first.begin(), first.end() - 1, next.begin());
  for (int r = 0; r < shape_.size; ++r) {
    for (size_t i = 0; i < of(r).plan.steps.size(); ++i) {
      const Step& step = of(r).step(i);
      if (!communicates(step) || step.action == Action::Send) continue;
      const size_t on = channel(step.peer, r);
      if (next[on] == first[on + 1]) throw Fault{describe({r, i}) + ": no such message is sent"};
      const At send = sends[next[on]++];
      if (of(send.rank).step(send.index).place.count != step.place.count)
        throw Fault{describe({r, i}) + " meets " + describe(send) + ": different lengths"};
      of(r).partner[i] = send;
      of(send.rank).partner[send.index] = {r, i};
    }
  }
  for (size_t on = 0; on + 1 < first.size(); ++on)
    if (next[on] != first[on + 1]) throw Fault{describe(sends[next[on]]) + ": nobody receives this message"};
}

void Checker::run() {
  while (!ready_.empty()) {
    const int rank = ready_.back();
    ready_.pop_back();
    begin_round(rank);
  }
  for (int r = 0; r < shape_.size; ++r) {
    if (of(r).done()) continue;
    for (size_t i = of(r).begin; i < of(r).end; ++i) {
      const At partner = of(r).partner[i];
      if (communicates(of(r).step(i)) && partner.index >= of(partner.rank).end)
        throw Fault{"deadlock: " + describe({r, i}) + " waits for " + describe(partner)};
    }
  }
}

void Checker::begin_round(int r) {
  Rank& rank = of(r);
  if (rank.end == rank.plan.steps.size()) return;
  rank.begin = rank.end;
  while (rank.end < rank.plan.steps.size() && rank.step(rank.end).round == rank.step(rank.begin).round) ++rank.end;
  for (size_t i = rank.begin; i < rank.end; ++i)
    if (communicates(rank.step(i))) ++rank.waiting;
  if (rank.waiting == 0) ready_.push_back(r);

  for (size_t i = rank.begin; i < rank.end; ++i) {
    const Step& step = rank.step(i);
    if (!communicates(step)) {
      std::vector<const Value*> terms;
      for (const Place& place : step.from) terms.push_back(&rank.at(place));
      store({r, i}, terms);
      continue;
    }
    const At partner = rank.partner[i];
    if (partner.index >= of(partner.rank).end) continue;  // not there yet
    if (step.action == Action::Send) deliver({r, i}, partner);
    if (step.action != Action::Send) deliver(partner, {r, i});
  }
}

void Checker::deliver(At send, At receive) {
  const Value& message = of(send.rank).at(of(send.rank).step(send.index).place);
  if (!message.written()) throw Fault{describe(send) + ": sends what nobody has written"};
  const Step& step = of(receive.rank).step(receive.index);
  if (step.action == Action::RecvReduce) store(receive, {&of(receive.rank).at(step.place), &message});
  if (step.action == Action::Recv) store(receive, {&message});
  for (const int r : {send.rank, receive.rank})
    if (--of(r).waiting == 0) ready_.push_back(r);
}

// Puts the sum of `terms` where the step writes.
void Checker::store(At at, const std::vector<const Value*>& terms) {
  const Step& step = of(at.rank).step(at.index);
  const bool adds = step.action == Action::RecvReduce || step.action == Action::Fold;
  const auto fault = [&](const char* what) { throw Fault{describe(at) + ": " + what}; };
  for (const Value* term : terms) {
    if (!term->written()) fault("uses what nobody has written");
    if (term->origin != terms[0]->origin) fault("adds up contributions to different elements");
    if (adds && term->scaled) fault("adds to a sum that was complete");
  }
  if (step.action == Action::Fold && of(at.rank).plan.single_fold) {
    if (terms.size() != static_cast<size_t>(shape_.size)) fault("single_fold, yet not one term of every rank");
    for (size_t i = 0; i < terms.size(); ++i)
      if (!terms[i]->holds(static_cast<int>(i), static_cast<int>(i) + 1)) fault("single_fold, yet not in rank order");
  }
  Value value = sum(terms);
  const bool complete = value.holds(0, shape_.size);
  if (adds && step.last && !complete) fault("`last`, yet not every contribution is in exactly once");
  if (adds && !step.last && complete) fault("every contribution is in, yet not `last`");
  value.scaled |= step.last;
  of(at.rank).at(step.place) = std::move(value);
}

// Every rank must hold what the collective promises.
void Checker::check_results() {
  const Parts& parts = shape_.parts;
  for (int r = 0; r < shape_.size; ++r) {
    switch (algorithm_.collective) {
      case Collective::AllReduce:
        expect(r, 0, parts.total(), 0, 0, shape_.size);
        break;
      case Collective::ReduceScatter:
        expect(r, parts.begin(r), parts.count(r), parts.begin(r), 0, shape_.size);
        break;
      case Collective::AllGather:
        for (int q = 0; q < shape_.size; ++q) expect(r, parts.begin(q), parts.count(q), parts.begin(q), q, 1);
        break;
      case Collective::Broadcast:
        expect(r, 0, parts.total(), 0, shape_.root, 1);
        break;
      case Collective::AllToAll:
        for (int q = 0; q < shape_.size; ++q) expect(r, parts.begin(q), parts.count(q), parts.begin(r), q, 1);
        break;
    }
  }
  if (algorithm_.collective == Collective::AllReduce) expect_same_order();
}

// Out[begin, begin + count) holds, once each, the contributions of `ranks` ranks from `first_rank` on to elements origin,
// origin + 1, ...
void Checker::expect(int r, size_t begin, size_t count, size_t origin, int first_rank, int ranks) {
  if (count == 0) return;
  const Rank& rank = of(r);
  for (size_t i = rank.ranges.first(Buffer::Out, begin); i < rank.ranges.size(); ++i) {
    const Place& range = rank.ranges[i];
    if (range.buffer != Buffer::Out || range.begin >= begin + count) break;
    const Value& value = rank.values[i];
    const size_t from = std::max(range.begin, begin);
    const bool right =
        value.holds(first_rank, first_rank + ranks) && value.origin + (from - range.begin) == origin + (from - begin);
    if (!right) throw Fault{format("rank %d: the result is wrong from element %zu on", r, from)};
    if (reduces(algorithm_.collective) && !value.scaled) throw Fault{format("rank %d: element %zu was never `last`", r, from)};
  }
}

// Additions do not associate: sums have the same bits on every rank only if they were added up in the same order.
void Checker::expect_same_order() {
  const Rank& zero = of(0);
  for (int r = 1; r < shape_.size; ++r) {
    const Rank& rank = of(r);
    size_t i = rank.ranges.first(Buffer::Out, 0), j = zero.ranges.first(Buffer::Out, 0);
    for (size_t element = 0; element < shape_.parts.total();) {
      if (rank.values[i].order != zero.values[j].order)
        throw Fault{format("rank %d: element %zu is added up in another order than on rank 0", r, element)};
      const size_t end = rank.ranges[i].begin + rank.ranges[i].count, end_of_zero = zero.ranges[j].begin + zero.ranges[j].count;
      element = std::min(end, end_of_zero);
      if (element == end) ++i;
      if (element == end_of_zero) ++j;
    }
  }
}

// The busiest ranks' rounds and elements are those of the row.
void Checker::check_costs() const {
  size_t most_rounds = 0, most_sent = 0;
  for (const Rank& rank : ranks_) {
    size_t rounds = 0, sent = 0;
    int counted = -1;
    for (const Step& step : rank.plan.steps) {
      if (step.action == Action::Send) sent += step.place.count;
      if (!communicates(step) || step.round == counted) continue;
      counted = step.round;
      ++rounds;
    }
    most_rounds = std::max(most_rounds, rounds);
    most_sent = std::max(most_sent, sent);
  }
  const size_t rounds = algorithm_.rounds(shape_), sent = algorithm_.elements_sent(shape_);
  if (most_rounds != rounds) throw Fault{format("%zu rounds, by the formula %zu", most_rounds, rounds)};
  if (most_sent != sent) throw Fault{format("%zu elements sent by the busiest rank, by the formula %zu", most_sent, sent)};
}

}  // namespace

std::string check(const Algorithm& algorithm, const Shape& shape, const std::vector<Plan>& plans) {
  ROUNDEL_CHECK(plans.size() == static_cast<size_t>(shape.size) && shape.parts.size() == shape.size);
  try {
    Checker checker(algorithm, shape, plans);
    checker.run();
    checker.check_results();
    checker.check_costs();
  } catch (const Fault& fault) {
    return format("%s %s, %d ranks, %zu elements: %s", algorithm.name, name_of(algorithm.collective), shape.size,
                  shape.parts.total(), fault.what.c_str());
  }
  return "";
}

std::string check(const Algorithm& algorithm, const Shape& shape) {
  std::vector<Plan> plans;
  Shape mine = shape;
  for (mine.rank = 0; mine.rank < shape.size; ++mine.rank) plans.push_back(algorithm.make(mine));
  return check(algorithm, shape, plans);
}

}  // namespace roundel::plan
