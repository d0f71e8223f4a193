// The checker can fail: good plans are broken on purpose, one way at a time, and it must say what is wrong.
#include <algorithm>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include "plan/check.h"
#include "plans.h"

using namespace roundel;
using namespace roundel::test;

namespace {

// Good plans of all ranks, to be broken.
struct Bench {
  Bench(const char* name, Collective collective, int size, size_t count) : Bench(name, collective, even_shape(size, count)) {}
  Bench(const char* name, Collective collective, const Shape& shape) : algorithm(row(name, collective)), shape(shape) {
    for (int r = 0; r < shape.size; ++r) {
      Shape mine = shape;
      mine.rank = r;
      plans.push_back(algorithm.make(mine));
    }
    check_all_right(said());
  }

  std::string said() const { return check(algorithm, shape, plans); }

  // The checker must complain in these words.
  void caught(const char* words, std::source_location at = std::source_location::current()) const {
    if (said().find(words) == std::string::npos)
      test::fail(at.file_name(), static_cast<int>(at.line()), "expected '" + std::string(words) + "', got '" + said() + "'");
  }

  std::vector<Step>& steps(int rank) { return plans[static_cast<size_t>(rank)].steps; }

  // The rank's n-th step that does this.
  Step& step(int rank, Action action, int n = 0) { return steps(rank)[index(rank, action, n)]; }
  void drop(int rank, Action action, int n = 0) {
    steps(rank).erase(steps(rank).begin() + static_cast<std::ptrdiff_t>(index(rank, action, n)));
  }

  // Every step gets a round of its own, in the order given by `first` within a round.
  void one_by_one(Action first) {
    for (Plan& plan : plans) {
      std::stable_sort(plan.steps.begin(), plan.steps.end(), [&](const Step& a, const Step& b) {
        return std::pair(a.round, a.action != first) < std::pair(b.round, b.action != first);
      });
      for (size_t i = 0; i < plan.steps.size(); ++i) plan.steps[i].round = static_cast<int>(i);
    }
  }

  Algorithm algorithm;
  Shape shape;
  std::vector<Plan> plans;

 private:
  size_t index(int rank, Action action, int n) {
    for (size_t i = 0; i < steps(rank).size(); ++i)
      if (steps(rank)[i].action == action && n-- == 0) return i;
    ROUNDEL_CHECK(!"the plan has such a step");
  }
};

Bench ring() { return {"ring", Collective::AllReduce, 4, 8}; }
Bench direct() { return {"direct", Collective::AllReduce, 4, 8}; }
Bench gather() { return {"direct", Collective::AllGather, 4, 8}; }

}  // namespace

TEST(checker_catches_lost_and_spare_messages) {
  for (const auto& make : {ring, direct, gather}) {
    Bench lost = make();
    lost.drop(1, Action::Send);
    lost.caught("no such message is sent");
  }
  Bench unheard = gather();
  unheard.drop(1, Action::Recv);
  unheard.caught("nobody receives this message");
  Bench misaddressed = gather();
  misaddressed.step(1, Action::Send).peer = 1;
  misaddressed.caught("no such peer");
  Bench shorter = ring();
  shorter.step(1, Action::Send).place.count = 1;
  shorter.caught("neither equal nor disjoint");
  Bench cut = gather();
  for (Step& step : cut.steps(1))
    if (step.action == Action::Send) step.place.count = 1;
  cut.caught("different lengths");
}

TEST(checker_catches_wrong_sums) {
  Bench elsewhere = ring();
  elsewhere.step(2, Action::Send).place = elsewhere.step(2, Action::Send, 2).place;
  elsewhere.caught("adds up contributions to different elements");
  Bench doubled = direct();
  doubled.step(2, Action::Fold).from[0] = doubled.step(2, Action::Fold).from[1];
  doubled.caught("not in rank order");
  Bench missing = direct();
  missing.step(2, Action::Fold).from.pop_back();
  missing.caught("not one term of every rank");
  Bench swapped = direct();
  std::swap(swapped.step(3, Action::Fold).from[1], swapped.step(3, Action::Fold).from[2]);
  swapped.caught("not in rank order");

  Bench twice("tree", Collective::AllReduce, 4, 8);  // ranks 1 and 2 both reduce into 0; 1 does so twice
  twice.steps(1).insert(twice.steps(1).begin(), twice.step(1, Action::Send));
  twice.steps(0).insert(twice.steps(0).begin(), twice.step(0, Action::RecvReduce));
  for (const int rank : {0, 1})
    for (size_t i = 1; i < twice.steps(rank).size(); ++i) ++twice.steps(rank)[i].round;
  twice.caught("not every contribution is in exactly once");

  Bench half("hierarchical", Collective::AllReduce, 4, 8);
  for (int r = 0; r < 4; ++r) half.step(r, Action::Fold).from.pop_back();
  half.caught("not every contribution is in exactly once");
}

TEST(checker_catches_wrong_results) {
  Bench untouched = gather();  // nobody sends rank 1's part to rank 0
  for (size_t i = 0; i < untouched.steps(1).size(); ++i)
    if (untouched.steps(1)[i].peer == 0 && untouched.steps(1)[i].action == Action::Send)
      untouched.steps(1).erase(untouched.steps(1).begin() + static_cast<std::ptrdiff_t>(i));
  std::erase_if(untouched.steps(0), [](const Step& step) { return step.peer == 1 && step.action == Action::Recv; });
  untouched.caught("the result is wrong from element 2 on");

  Bench crossed = gather();
  std::swap(crossed.step(0, Action::Recv, 0).place, crossed.step(0, Action::Recv, 1).place);
  crossed.caught("the result is wrong");
  Bench shifted("direct", Collective::AllToAll, 4, 8);
  std::swap(shifted.step(2, Action::Send, 0).place, shifted.step(2, Action::Send, 1).place);
  shifted.caught("the result is wrong");
  Bench empty("tree", Collective::Broadcast, 4, 8);
  std::swap(empty.steps(3)[0].action, empty.step(2, Action::Send).action);
  empty.caught("sends what nobody has written");
  Bench garbage = direct();
  garbage.plans[1].scratch += 2;
  garbage.step(1, Action::Fold).from[0] = {Buffer::Scratch, garbage.plans[1].scratch - 2, 2};
  garbage.caught("uses what nobody has written");
}

TEST(checker_catches_wrong_last) {
  for (const auto& make : {ring, direct}) {
    Bench forgotten = make();
    for (Step& step : forgotten.steps(1)) step.last = false;
    forgotten.caught("every contribution is in, yet not `last`");
  }
  Bench early = ring();
  early.step(1, Action::RecvReduce).last = true;
  early.caught("`last`, yet not every contribution");
  Bench moved = ring();
  moved.step(1, Action::Recv).last = true;
  moved.caught("`last` on a step that adds nothing");
  Bench again("direct", Collective::AllReduce, 1, 8);
  again.steps(0).push_back(again.steps(0)[0]);
  again.steps(0)[1].round = 1;
  again.caught("adds to a sum that was complete");
  Bench never("direct", Collective::AllReduce, 1, 8);
  never.steps(0).clear();
  never.caught("was never `last`");
}

TEST(checker_catches_overlaps_and_conflicts) {
  Bench overlap = gather();
  overlap.step(1, Action::Recv).place.begin += 1;
  overlap.caught("neither equal nor disjoint");
  for (const auto& make : {ring, direct}) {
    Bench rushed = make();  // all rounds at once
    for (Step& step : rushed.steps(2)) step.round = 0;
    rushed.caught("another step of the round uses the same range");
  }
  Bench shared = gather();  // two messages into one place
  shared.step(0, Action::Recv, 0).place = shared.step(0, Action::Recv, 1).place;
  shared.caught("another step of the round uses the same range");
  Bench backwards = ring();
  std::swap(backwards.steps(1).front().round, backwards.steps(1).back().round);
  backwards.caught("rounds must ascend");
  Bench beyond = direct();
  beyond.plans[1].scratch -= 1;
  beyond.caught("outside the buffer");
  Bench nothing = gather();
  nothing.step(1, Action::Send).place.count = 0;
  nothing.caught("an empty range");
}

TEST(checker_catches_malformed_steps) {
  Bench from = gather();
  from.step(1, Action::Send).from = {from.step(1, Action::Send).place};
  from.caught("`from` is for Fold and Copy");
  Bench none = direct();
  none.step(1, Action::Fold).from.clear();
  none.caught("nothing to fold");
  Bench uneven = direct();
  uneven.step(1, Action::Fold).from[0].count = 1;
  uneven.caught("places of different length");
  Bench copies("direct", Collective::AllToAll, 4, 8);
  copies.step(1, Action::Copy).from.push_back(copies.step(1, Action::Copy).from[0]);
  copies.caught("a copy is from one place");
  Bench sums = gather();
  sums.step(1, Action::Recv).action = Action::RecvReduce;
  sums.caught("this collective reduces nothing");
}

TEST(checker_catches_deadlock) {
  Bench receive_first = ring();
  receive_first.one_by_one(Action::RecvReduce);
  receive_first.caught("deadlock");
  Bench send_first = ring();  // only a transport that buffers would get through
  send_first.one_by_one(Action::Send);
  send_first.caught("deadlock");
}

TEST(checker_catches_broken_promises) {
  Bench written("direct", Collective::AllToAll, 4, 8);
  written.step(0, Action::Copy).place.buffer = Buffer::In;
  written.caught("In is never written");
  Bench no_in = ring();
  no_in.step(0, Action::Send).place.buffer = Buffer::In;
  no_in.caught("there is no In on this rank");
  Bench no_out("direct", Collective::Gather, 4, 8);
  no_out.step(1, Action::Send).place.buffer = Buffer::Out;
  no_out.caught("there is no Out on this rank");
  Bench unrooted("direct", Collective::Scatter, 4, 8);
  unrooted.step(1, Action::Recv) = unrooted.step(0, Action::Send);
  unrooted.steps(1)[0].peer = 0;
  unrooted.caught("there is no In on this rank");
  Bench beyond("direct", Collective::Scatter, 4, 8);  // a place in Out as if all were there
  beyond.step(1, Action::Recv).place = beyond.shape.parts[1];
  beyond.caught("outside the buffer");
  Bench own_in("tree", Collective::Gather, 4, 8);
  own_in.step(2, Action::Recv).place = {Buffer::In, 0, 2};
  own_in.caught("In is never written");
  Bench plain("halving", Collective::AllReduce, 4, 8);
  plain.plans[1].nested = false;
  plain.caught("nested is not what the row says");
  plain.algorithm.nested = false;
  for (Plan& plan : plain.plans) plan.nested = false;
  plain.caught("neither equal nor disjoint");

  Bench boast = ring();
  boast.algorithm.single_fold = true;
  boast.caught("single_fold is not what the row says");
  for (Plan& plan : boast.plans) plan.single_fold = true;
  boast.caught("single_fold, yet it reduces what it receives");
  Bench disagree = direct();
  disagree.plans[3].single_fold = false;
  disagree.caught("single_fold is not what the row says");

  Bench slower = ring();
  slower.algorithm.cost = [](const Shape&) -> Cost { return {5, 12, 12, 6}; };
  slower.caught("6 rounds, by the formula 5");
  Bench chatty("tree", Collective::Broadcast, 2, 8);
  for (int r : {0, 1}) {
    chatty.steps(r).push_back(chatty.steps(r)[0]);
    chatty.steps(r)[1].round = 1;
  }
  chatty.caught("2 rounds, by the formula 1");
  chatty.algorithm.cost = [](const Shape&) -> Cost { return {2, 8, 1, 0}; };
  chatty.caught("16 elements sent by the busiest rank, by the formula 8");
  chatty.algorithm.cost = [](const Shape&) -> Cost { return {2, 16, 1, 0}; };
  chatty.caught("2 messages of the busiest rank, by the formula 1");
  slower.algorithm.cost = [](const Shape&) -> Cost { return {6, 12, 12, 7}; };
  slower.caught("6 elements added up by the busiest rank, by the formula 7");
}

// Everybody sends everything to everybody and adds up, beginning with its own: right sums, yet other bits on every rank.
TEST(checker_catches_sums_in_different_order) {
  Bench bench("tree", Collective::AllReduce, 3, 1);
  bench.algorithm.cost = [](const Shape&) -> Cost { return {1, 2, 4, 2}; };
  const Place out{Buffer::Out, 0, 1}, first{Buffer::Scratch, 0, 1}, second{Buffer::Scratch, 1, 1};
  for (int r = 0; r < 3; ++r) {
    const int next = (r + 1) % 3, after = (r + 2) % 3;
    Plan& plan = bench.plans[static_cast<size_t>(r)];
    plan.scratch = 2;
    plan.steps = {{.action = Action::Send, .peer = next, .place = out},
                  {.action = Action::Send, .peer = after, .place = out},
                  {.action = Action::Recv, .peer = next, .place = first},
                  {.action = Action::Recv, .peer = after, .place = second},
                  {.action = Action::Fold, .round = 1, .last = true, .place = out, .from = {out, first, second}}};
  }
  bench.caught("rank 1: element 0 is added up in another order than on rank 0");
  bench.steps(1)[4].from = {second, out, first};
  bench.steps(2)[4].from = {first, second, out};
  check_all_right(bench.said());
}

TEST(checker_catches_a_wrong_root) {
  for (const char* name : {"direct", "tree", "hierarchical"}) {
    for (const Collective collective : {Collective::Broadcast, Collective::Reduce, Collective::Gather, Collective::Scatter}) {
      if (find_algorithm(collective, name) == nullptr) continue;
      Bench bench(name, collective, 4, 8);
      bench.shape.root = 1;
      CHECK(bench.said() != "");
    }
  }
  Bench forgotten("direct", Collective::Reduce, 4, 8);  // the sums stay with their owners
  for (int r = 1; r < 4; ++r) forgotten.steps(r).pop_back();
  std::erase_if(forgotten.steps(0),
                [](const Step& step) { return step.action == Action::Recv && step.place.buffer == Buffer::Out; });
  forgotten.caught("rank 0: the result is wrong from element 2 on");
}

TEST(checker_catches_wrong_lengths_in_an_uneven_alltoall) {
  const auto sent = [](int a, int b) { return a + 2 * b + 1; };
  Bench bench("pairwise", Collective::AllToAllV, matrix_shape(4, sent));
  bench.shape = matrix_shape(4, [&](int a, int b) { return a == 2 && b == 1 ? 9 : sent(a, b); });
  bench.caught("the result is wrong");
  Bench swapped("direct", Collective::AllToAllV, matrix_shape(4, [](int, int) { return 2; }));
  std::swap(swapped.step(2, Action::Send, 0).place, swapped.step(2, Action::Send, 1).place);
  swapped.caught("the result is wrong");
}

// Steps of one round may overlap in part only where plans are nested; they must not there, either.
TEST(checker_catches_partial_conflicts_in_nested_plans) {
  Bench rushed("halving", Collective::AllReduce, 4, 8);
  for (Step& step : rushed.steps(2)) step.round = 0;
  rushed.caught("another step of the round uses the same range");
  Bench packed("bruck", Collective::AllToAll, 4, 8);
  for (Step& step : packed.steps(1)) step.round = 0;
  packed.caught("another step of the round uses the same range");
}

// Whatever single step of whatever plan is changed, it is seen.
TEST(checker_catches_every_single_change_to_every_plan) {
  constexpr int kSize = 6;
  for (const Algorithm& algorithm : algorithms()) {
    Shape shape = even_shape(kSize, 18);
    if (algorithm.collective == Collective::AllToAllV) shape = matrix_shape(kSize, [](int a, int b) { return a + b + 1; });
    if (has_own_parts(algorithm.collective)) shape.parts = Parts::of({2, 3, 1, 4, 2, 3});
    if (has_root(algorithm.collective)) shape.root = 4;
    if (algorithm.name == std::string("hierarchical")) shape.host = {0, 1, 0, 1, 0, 0};
    Bench bench(algorithm.name, algorithm.collective, shape);
    const auto seen = [&](const char* change, int rank, size_t i) {
      if (bench.said().empty())
        test::fail(__FILE__, __LINE__,
                   format("%s %s: %s of rank %d, step %zu is not seen", algorithm.name, name_of(algorithm.collective), change,
                          rank, i));
    };
    for (int rank = 0; rank < kSize; ++rank) {
      for (size_t i = 0; i < bench.steps(rank).size(); ++i) {
        const std::vector<Step> good = bench.steps(rank);
        Step& step = bench.steps(rank)[i];
        const bool adds = step.action == Action::RecvReduce || step.action == Action::Fold;
        const auto change = [&](const char* what, auto apply) {
          apply(bench.steps(rank)[i]);
          seen(what, rank, i);
          bench.steps(rank) = good;
        };
        if (step.peer >= 0) change("another peer", [](Step& s) { s.peer = (s.peer + 1) % kSize; });
        if (adds) change("`last`", [](Step& s) { s.last = !s.last; });
        change("a later begin", [](Step& s) { ++s.place.begin; });
        change("a shorter place", [](Step& s) { --s.place.count; });
        bench.steps(rank).erase(bench.steps(rank).begin() + static_cast<std::ptrdiff_t>(i));
        seen("loss", rank, i);
        bench.steps(rank) = good;
      }
    }
  }
}
