// The words that plan files are written in: steps, and a Builder that puts them into rounds.
#pragma once

#include <utility>
#include <vector>

#include "plan/plan.h"

namespace roundel::plan {

inline Step send(int peer, Place place) { return {.action = Action::Send, .peer = peer, .place = place}; }
inline Step recv(int peer, Place place) { return {.action = Action::Recv, .peer = peer, .place = place}; }
inline Step copy(Place place, Place from) { return {.action = Action::Copy, .place = place, .from = {from}}; }

// `last`: with this step every contribution to `place` is in.
inline Step recv_reduce(int peer, Place place, bool last) {
  return {.action = Action::RecvReduce, .peer = peer, .last = last, .place = place};
}
inline Step fold(Place place, std::vector<Place> from, bool last) {
  return {.action = Action::Fold, .last = last, .place = place, .from = std::move(from)};
}

// Steps of zero elements are left out. Both ends of a message see the same count, so both leave it out and there are no empty
// messages; a round that loses all its steps is no round.
class Builder {
 public:
  void begin_round() {
    if (!plan_.steps.empty() && plan_.steps.back().round == round_) ++round_;
  }

  void add(Step step) {
    if (step.place.count == 0) return;
    step.round = round_;
    plan_.steps.push_back(std::move(step));
  }

  // One round of these steps.
  template <class... Steps>
  void exchange(Steps... steps) {
    begin_round();
    (add(std::move(steps)), ...);
  }

  // Fresh scratch space, disjoint from what was handed out before.
  Place scratch(size_t count) { return {Buffer::Scratch, std::exchange(plan_.scratch, plan_.scratch + count), count}; }

  // `single_fold`, `nested`: see Plan.
  Plan take(bool single_fold, bool nested = false) {
    plan_.single_fold = single_fold;
    plan_.nested = nested;
    return std::move(plan_);
  }

 private:
  Plan plan_;
  int round_ = 0;
};

inline Place in(size_t begin, size_t count) { return {Buffer::In, begin, count}; }
inline Place out(size_t begin, size_t count) { return {Buffer::Out, begin, count}; }
inline Place whole(const Shape& shape) { return {Buffer::Out, 0, shape.parts.total()}; }

// A reduction of one rank: nothing moves, but there is one step that scales, so that averaging has one place.
inline Plan alone(const Shape& shape) {
  Builder plan;
  plan.exchange(fold(whole(shape), {whole(shape)}, true));
  return plan.take(true);
}

}  // namespace roundel::plan
