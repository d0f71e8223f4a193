// The checker: all plans of a collective are run together on symbolic values, and the outcome is held against what was
// promised.
//
// A send and its receive happen together, once both ranks have come to their rounds: no buffering is assumed, so a plan that
// passes cannot deadlock over any transport. Within a round the order of steps does not matter, since inspect.cc has found no
// conflict.
//
// Memory: the plans themselves, 8 bytes for each of their steps, and the segments of what every rank holds.
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
  uint32_t index;
};

struct Rank {
  const Plan& plan;
  Extents extents;
  Memory memory[3]{};         // by Buffer
  std::vector<At> partner{};  // of every step that communicates: the other end of its message
  size_t begin = 0, end = 0;  // steps of the round it is in
  size_t waiting = 0;         // messages of this round that are still to come
  size_t clock = 0;           // when this round began, if every message takes one tick once both ends are there
  size_t finish = 0;          // when its last message so far was there

  const Step& step(size_t index) const { return plan.steps[index]; }
  Memory& at(Buffer buffer) { return memory[static_cast<int>(buffer)]; }
  std::vector<Segment> read(const Place& place) { return at(place.buffer).read(place.begin, place.count); }
  bool done() const { return waiting == 0 && end == plan.steps.size(); }
};

class Checker {
 public:
  Checker(const Algorithm& algorithm, const Shape& shape, const std::vector<Plan>& plans);
  void run();
  void check_results();
  void check_costs() const;

 private:
  using Terms = std::vector<std::vector<Segment>>;

  void fill(int rank);
  void match();
  void begin_round(int rank);
  void deliver(At send, At receive);
  void store(At at, const Terms& terms);
  Segment sum(At at, const std::vector<Segment>& terms);
  void expect_sum(int rank, size_t begin, size_t count);
  void expect_moved(int rank, size_t begin, size_t count, size_t origin);
  void expect_same_order();
  std::string describe(At at) const { return plan::describe(at.rank, of(at.rank).plan, at.index); }
  Rank& of(int rank) { return ranks_[static_cast<size_t>(rank)]; }
  const Rank& of(int rank) const { return ranks_[static_cast<size_t>(rank)]; }

  const Algorithm& algorithm_;
  const Shape& shape_;
  Sums sums_;
  std::vector<size_t> rows_;  // AllToAllV: the elements that all ranks before this one send
  std::vector<Rank> ranks_;
  std::vector<int> ready_;  // ranks that may begin their next round
};

Checker::Checker(const Algorithm& algorithm, const Shape& shape, const std::vector<Plan>& plans)
    : algorithm_(algorithm), shape_(shape), rows_{0} {
  ranks_.reserve(plans.size());
  for (int r = 0; r < shape.size; ++r) {
    const Plan& plan = plans[static_cast<size_t>(r)];
    inspect(r, plan, algorithm, shape);
    Rank& rank = ranks_.emplace_back(Rank{plan, extents(r, plan, algorithm.collective, shape)});
    rows_.push_back(rows_.back() + rank.extents.in);
    for (const Buffer buffer : {Buffer::In, Buffer::Out, Buffer::Scratch}) rank.at(buffer) = Memory(rank.extents.of(buffer));
    fill(r);
    rank.partner.resize(plan.steps.size());
    ready_.push_back(r);
  }
  match();
}

// What the caller has put there, as plan.h says. Where nothing is added up, elements are known by their origin alone: their
// number in what all ranks hold together.
void Checker::fill(int r) {
  Rank& rank = of(r);
  const Parts& parts = shape_.parts;
  const Sums::Id own = sums_.contribution(reduces(algorithm_.collective) ? r : 0);
  const auto put = [&](Buffer buffer, size_t begin, size_t count, size_t origin) {
    if (count > 0) rank.at(buffer).write(begin, {{count, origin, own}});
  };
  switch (algorithm_.collective) {
    case Collective::AllReduce:
    case Collective::ReduceScatter:
    case Collective::Reduce:
      return put(Buffer::Out, 0, parts.total(), 0);
    case Collective::AllGather:
      return put(Buffer::Out, parts.begin(r), parts.count(r), parts.begin(r));
    case Collective::Broadcast:
      return put(Buffer::Out, 0, r == shape_.root ? parts.total() : 0, 0);
    case Collective::AllToAll:
    case Collective::AllToAllV:
      return put(Buffer::In, 0, rank.extents.in, rows_[static_cast<size_t>(r)]);
    case Collective::Gather:
      return put(Buffer::In, 0, rank.extents.in, parts.begin(r));
    case Collective::Scatter:
      return put(Buffer::In, 0, rank.extents.in, 0);
  }
}

// The k-th send from a to b meets the k-th receive of b from a.
void Checker::match() {
  struct Messages {
    std::vector<uint32_t> sends, receives;  // steps, by peer and then in order
    size_t taken = 0;                       // sends to ranks that have been seen to
  };
  std::vector<Messages> all(ranks_.size());
  for (int r = 0; r < shape_.size; ++r) {
    Messages& messages = all[static_cast<size_t>(r)];
    const std::vector<Step>& steps = of(r).plan.steps;
    for (uint32_t i = 0; i < steps.size(); ++i)
      if (communicates(steps[i])) (steps[i].action == Action::Send ? messages.sends : messages.receives).push_back(i);
    const auto by_peer = [&](uint32_t a, uint32_t b) { return steps[a].peer < steps[b].peer; };
    std::stable_sort(messages.sends.begin(), messages.sends.end(), by_peer);
    std::stable_sort(messages.receives.begin(), messages.receives.end(), by_peer);
  }
  // Receivers in ascending order, so that every sender's list is gone through once.
  const auto next_to = [&](int from, int to) -> const uint32_t* {
    const Messages& messages = all[static_cast<size_t>(from)];
    if (messages.taken == messages.sends.size()) return nullptr;
    const uint32_t& send = messages.sends[messages.taken];
    return of(from).step(send).peer == to ? &send : nullptr;
  };
  for (int r = 0; r < shape_.size; ++r) {
    for (const uint32_t i : all[static_cast<size_t>(r)].receives) {
      const Step& step = of(r).step(i);
      const uint32_t* send = next_to(step.peer, r);
      if (send == nullptr) throw Fault{describe({r, i}) + ": no such message is sent"};
      ++all[static_cast<size_t>(step.peer)].taken;
      if (of(step.peer).step(*send).place.count != step.place.count)
        throw Fault{describe({r, i}) + " meets " + describe({step.peer, *send}) + ": different lengths"};
      of(r).partner[i] = {step.peer, *send};
      of(step.peer).partner[*send] = {r, i};
    }
    for (int from = 0; from < shape_.size; ++from)
      if (const uint32_t* send = next_to(from, r)) throw Fault{describe({from, *send}) + ": nobody receives this message"};
  }
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
        throw Fault{"deadlock: " + describe({r, static_cast<uint32_t>(i)}) + " waits for " + describe(partner)};
    }
  }
}

void Checker::begin_round(int r) {
  Rank& rank = of(r);
  if (rank.end == rank.plan.steps.size()) return;
  rank.begin = rank.end;
  rank.clock = rank.finish;
  while (rank.end < rank.plan.steps.size() && rank.step(rank.end).round == rank.step(rank.begin).round) ++rank.end;
  for (size_t i = rank.begin; i < rank.end; ++i)
    if (communicates(rank.step(i))) ++rank.waiting;
  if (rank.waiting == 0) ready_.push_back(r);

  for (size_t i = rank.begin; i < rank.end; ++i) {
    const Step& step = rank.step(i);
    const At at{r, static_cast<uint32_t>(i)};
    if (!communicates(step)) {
      Terms terms;
      for (const Place& place : step.from) terms.push_back(rank.read(place));
      store(at, terms);
      continue;
    }
    const At partner = rank.partner[i];
    if (partner.index >= of(partner.rank).end) continue;  // not there yet
    if (step.action == Action::Send) deliver(at, partner);
    if (step.action != Action::Send) deliver(partner, at);
  }
}

void Checker::deliver(At send, At receive) {
  std::vector<Segment> message = of(send.rank).read(of(send.rank).step(send.index).place);
  for (const Segment& segment : message)
    if (segment.sum == Sums::kNothing) throw Fault{describe(send) + ": sends what nobody has written"};
  const Step& step = of(receive.rank).step(receive.index);
  if (step.action == Action::RecvReduce) store(receive, {of(receive.rank).read(step.place), std::move(message)});
  if (step.action == Action::Recv) store(receive, {std::move(message)});
  const size_t there = std::max(of(send.rank).clock, of(receive.rank).clock) + 1;
  for (const int r : {send.rank, receive.rank}) {
    of(r).finish = std::max(of(r).finish, there);
    if (--of(r).waiting == 0) ready_.push_back(r);
  }
}

// Puts the sum of `terms` where the step writes, stretch by stretch of which every term is one segment.
void Checker::store(At at, const Terms& terms) {
  const Place& place = of(at.rank).step(at.index).place;
  std::vector<Segment> result, stretch(terms.size());
  std::vector<std::pair<size_t, size_t>> next(terms.size());  // of every term: segment, elements of it that are done
  for (size_t done = 0; done < place.count; done += stretch[0].count) {
    size_t count = place.count - done;
    for (size_t t = 0; t < terms.size(); ++t) {
      const Segment& segment = terms[t][next[t].first];
      stretch[t] = {segment.count - next[t].second, segment.origin + next[t].second, segment.sum};
      count = std::min(count, stretch[t].count);
    }
    for (size_t t = 0; t < terms.size(); ++t) {
      stretch[t].count = count;
      next[t].second += count;
      if (next[t].second == terms[t][next[t].first].count) next[t] = {next[t].first + 1, 0};
    }
    result.push_back(sum(at, stretch));
  }
  of(at.rank).at(place.buffer).write(place.begin, result);
}

Segment Checker::sum(At at, const std::vector<Segment>& terms) {
  const Step& step = of(at.rank).step(at.index);
  const auto fault = [&](const char* what) { throw Fault{describe(at) + ": " + what}; };
  for (const Segment& term : terms) {
    if (term.sum == Sums::kNothing) fault("uses what nobody has written");
    if (term.origin != terms[0].origin) fault("adds up contributions to different elements");
    if (adds(step) && sums_.is_scaled(term.sum)) fault("adds to a sum that was complete");
  }
  if (step.action == Action::Fold && of(at.rank).plan.single_fold) {
    if (terms.size() != static_cast<size_t>(shape_.size)) fault("single_fold, yet not one term of every rank");
    for (size_t i = 0; i < terms.size(); ++i)
      if (!sums_.holds(terms[i].sum, static_cast<int>(i), static_cast<int>(i) + 1)) fault("single_fold, yet not in rank order");
  }
  Segment total = terms[0];
  for (size_t i = 1; i < terms.size(); ++i) total.sum = sums_.add(total.sum, terms[i].sum);
  if (!adds(step)) return total;
  const bool complete = sums_.holds(total.sum, 0, shape_.size);
  if (step.last && !complete) fault("`last`, yet not every contribution is in exactly once");
  if (!step.last && complete) fault("every contribution is in, yet not `last`");
  if (step.last) total.sum = sums_.scaled(total.sum);
  return total;
}

// Every rank must hold what the collective promises.
void Checker::check_results() {
  const Parts& parts = shape_.parts;
  for (int r = 0; r < shape_.size; ++r) {
    size_t placed = 0;  // elements of Out before those from rank q
    switch (algorithm_.collective) {
      case Collective::AllReduce:
        expect_sum(r, 0, parts.total());
        break;
      case Collective::ReduceScatter:
        expect_sum(r, parts.begin(r), parts.count(r));
        break;
      case Collective::Reduce:
        if (r == shape_.root) expect_sum(r, 0, parts.total());
        break;
      case Collective::AllGather:
      case Collective::Broadcast:
        expect_moved(r, 0, parts.total(), 0);
        break;
      case Collective::Gather:
        if (r == shape_.root) expect_moved(r, 0, parts.total(), 0);
        break;
      case Collective::Scatter:
        expect_moved(r, 0, parts.count(r), parts.begin(r));
        break;
      case Collective::AllToAll:
        for (int q = 0; q < shape_.size; ++q)
          expect_moved(r, parts.begin(q), parts.count(q), rows_[static_cast<size_t>(q)] + parts.begin(r));
        break;
      case Collective::AllToAllV:
        for (int q = 0; q < shape_.size; ++q) {
          expect_moved(r, placed, shape_.sent(q, r), rows_[static_cast<size_t>(q)]);
          placed += shape_.sent(q, r);
          rows_[static_cast<size_t>(q)] += shape_.sent(q, r);  // the next receiver's begin there
        }
        break;
    }
  }
  if (algorithm_.collective == Collective::AllReduce) expect_same_order();
}

// Out[begin, begin + count) holds the contributions of all ranks to these elements, once each.
void Checker::expect_sum(int r, size_t begin, size_t count) {
  for (const Segment& segment : of(r).read({Buffer::Out, begin, count})) {
    const bool right = sums_.holds(segment.sum, 0, shape_.size) && segment.origin == begin;
    if (!right) throw Fault{format("rank %d: the result is wrong from element %zu on", r, begin)};
    if (!sums_.is_scaled(segment.sum)) throw Fault{format("rank %d: element %zu was never `last`", r, begin)};
    begin += segment.count;
  }
}

// Out[begin, begin + count) holds elements origin, origin + 1, ... of what all ranks held together.
void Checker::expect_moved(int r, size_t begin, size_t count, size_t origin) {
  for (const Segment& segment : of(r).read({Buffer::Out, begin, count})) {
    if (segment.sum == Sums::kNothing || segment.origin != origin)
      throw Fault{format("rank %d: the result is wrong from element %zu on", r, begin)};
    begin += segment.count;
    origin += segment.count;
  }
}

// Additions do not associate: sums have the same bits on every rank only if they were added up in the same order.
void Checker::expect_same_order() {
  const Place whole{Buffer::Out, 0, shape_.parts.total()};
  const std::vector<Segment> zero = of(0).read(whole);
  for (int r = 1; r < shape_.size; ++r) {
    const std::vector<Segment> mine = of(r).read(whole);
    size_t i = 0, j = 0, end = 0, end_of_zero = 0;  // of mine[i - 1], of zero[j - 1]
    for (size_t element = 0; element < whole.count; element = std::min(end, end_of_zero)) {
      if (element == end) end += mine[i++].count;
      if (element == end_of_zero) end_of_zero += zero[j++].count;
      if (mine[i - 1].sum != zero[j - 1].sum)
        throw Fault{format("rank %d: element %zu is added up in another order than on rank 0", r, element)};
    }
  }
}

// What the plans cost is what the row says.
void Checker::check_costs() const {
  Cost most;
  for (const Rank& rank : ranks_) {
    Cost cost;
    cost.rounds = rank.finish;
    for (const Step& step : rank.plan.steps) {
      if (step.action == Action::Send) cost.elements_sent += step.place.count;
      if (step.action == Action::RecvReduce) cost.elements_added += step.place.count;
      if (step.action == Action::Fold) cost.elements_added += (step.from.size() - 1) * step.place.count;
      if (communicates(step)) ++cost.messages;
    }
    most.take_max(cost);
  }
  const Cost said = algorithm_.cost(shape_);
  const auto hold = [](const char* what, size_t found, size_t formula) {
    if (found != formula) throw Fault{format("%zu %s, by the formula %zu", found, what, formula)};
  };
  hold("rounds", most.rounds, said.rounds);
  hold("elements sent by the busiest rank", most.elements_sent, said.elements_sent);
  hold("messages of the busiest rank", most.messages, said.messages);
  hold("elements added up by the busiest rank", most.elements_added, said.elements_added);
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
