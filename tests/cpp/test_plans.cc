// Plans: every algorithm is proved by the checker over sizes, counts, roots and host layouts; the checker is shown to catch
// every kind of broken plan; the selector is held to sensible choices.
#include <algorithm>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "plan/check.h"
#include "plan/plan.h"

using namespace roundel;
using namespace roundel::plan;

namespace {

void check_all_right(const std::string& said, std::source_location at = std::source_location::current()) {
  if (!said.empty()) test::fail(at.file_name(), static_cast<int>(at.line()), said);
}

const Algorithm& row(const char* name, Collective collective) {
  const Algorithm* found = find_algorithm(collective, name);
  CHECK(found != nullptr);
  return *found;
}

Shape even_shape(int size, size_t count) { return {.size = size, .parts = Parts::even(count, size)}; }

// 0, 1, one element short of a part each, one each, and parts that differ.
std::vector<size_t> counts_for(int size) {
  const size_t ranks = static_cast<size_t>(size);
  return {0, 1, ranks - 1, ranks, 3 * ranks + 2};
}

std::vector<Shape> even_shapes(int size) {
  std::vector<Shape> shapes;
  for (const size_t count : counts_for(size)) shapes.push_back(even_shape(size, count));
  return shapes;
}

// Parts that nobody would call even: 0, 1, 2, 0, 1, 2, ...; and all in the middle.
std::vector<Shape> uneven_shapes(int size) {
  std::vector<size_t> ragged, lonely(static_cast<size_t>(size));
  for (int r = 0; r < size; ++r) ragged.push_back(static_cast<size_t>(r % 3));
  lonely[static_cast<size_t>(size / 2)] = 5;
  return {{.size = size, .parts = Parts::of(ragged)}, {.size = size, .parts = Parts::of(lonely)}};
}

std::vector<Shape> shapes_for(Collective collective, int size) {
  std::vector<Shape> shapes = even_shapes(size);
  if (collective == Collective::ReduceScatter || collective == Collective::AllGather)
    for (const Shape& shape : uneven_shapes(size)) shapes.push_back(shape);
  if (collective == Collective::Broadcast)
    for (const int root : {size / 2, size - 1}) shapes.push_back({.size = size, .parts = Parts::even(5, size), .root = root});
  if (collective == Collective::AllToAll) {
    shapes.clear();
    for (const size_t each : {0u, 1u, 3u}) shapes.push_back(even_shape(size, each * static_cast<size_t>(size)));
  }
  return shapes;
}

// Hosts that take `ranks[0]`, `ranks[1]`, ... consecutive ranks, again and again until all have one.
std::vector<int> blocks(int size, const std::vector<int>& ranks) {
  std::vector<int> host;
  for (int h = 0; static_cast<int>(host.size()) < size; ++h)
    for (int i = 0; i < ranks[static_cast<size_t>(h) % ranks.size()] && static_cast<int>(host.size()) < size; ++i)
      host.push_back(h);
  return host;
}

std::vector<int> interleaved(int size, int hosts) {
  std::vector<int> host;
  for (int r = 0; r < size; ++r) host.push_back(r % hosts);
  return host;
}

std::vector<std::vector<int>> layouts(int size) {
  return {
      blocks(size, {size}),            // one host
      blocks(size, {1}),               // one rank per host
      blocks(size, {(size + 1) / 2}),  // two hosts
      blocks(size, {3, 1, 2}),         // unequal, one slice
      blocks(size, {4, 2, 3}),         // unequal, more ranks than slices
      interleaved(size, 4),            // ranks of a host are not neighbours
      interleaved(size, (size + 1) / 2),
  };
}

}  // namespace

TEST(plans_of_every_algorithm_are_right_for_1_to_64_ranks) {
  for (const Algorithm& algorithm : algorithms()) {
    if (algorithm.name == std::string("hierarchical")) continue;
    for (int size = 1; size <= 64; ++size)
      for (const Shape& shape : shapes_for(algorithm.collective, size)) check_all_right(check(algorithm, shape));
  }
}

TEST(plans_of_hierarchical_are_right_for_every_host_layout) {
  const Algorithm& hierarchical = row("hierarchical", Collective::AllReduce);
  for (int size = 1; size <= 64; ++size) {
    for (Shape shape : even_shapes(size)) {
      check_all_right(check(hierarchical, shape));
      for (const std::vector<int>& host : layouts(size)) {
        shape.host = host;
        check_all_right(check(hierarchical, shape));
      }
    }
  }
}

TEST(plans_are_right_for_hundreds_of_ranks) {
  for (const int size : {100, 256}) {
    for (const Algorithm& algorithm : algorithms()) check_all_right(check(algorithm, even_shape(size, 3 * size_t(size))));
    Shape shape = even_shape(size, 1001);
    shape.host = blocks(size, {8});
    check_all_right(check(row("hierarchical", Collective::AllReduce), shape));
  }
  check_all_right(check(row("tree", Collective::AllReduce), even_shape(1000, 7)));
  check_all_right(check(row("tree", Collective::Broadcast), {.size = 1000, .parts = Parts::even(7, 1000), .root = 999}));
  check_all_right(check(row("ring", Collective::AllReduce), even_shape(1000, 40)));
  check_all_right(check(row("direct", Collective::AllReduce), even_shape(1000, 40)));
  Shape shape = even_shape(1000, 40);
  shape.host = blocks(1000, {16});
  check_all_right(check(row("hierarchical", Collective::AllReduce), shape));
}

TEST(plans_for_one_rank_only_scale) {
  for (const Algorithm& algorithm : algorithms()) {
    const Plan plan = algorithm.make(even_shape(1, 7));
    CHECK(plan.single_fold);
    if (algorithm.collective != Collective::AllReduce && algorithm.collective != Collective::ReduceScatter) continue;
    CHECK_EQ(plan.steps.size(), size_t{1});
    CHECK(plan.steps[0].action == Action::Fold && plan.steps[0].last);
  }
}

TEST(plans_spread_direct_peers) {
  for (int rank = 0; rank < 8; ++rank) {
    Shape shape = even_shape(8, 16);
    shape.rank = rank;
    CHECK_EQ(row("direct", Collective::AllReduce).make(shape).steps[0].peer, (rank + 1) % 8);
  }
}

TEST(parts_are_even_and_the_first_are_longer) {
  const Parts parts = Parts::even(11, 4);
  CHECK(parts.count(0) == 3 && parts.count(1) == 3 && parts.count(2) == 3 && parts.count(3) == 2);
  CHECK(parts.begin(3) == 9 && parts.total() == 11 && parts.size() == 4);
  CHECK_EQ(Parts().total(), size_t{0});
}

// ---- the checker can fail ----
// --------------------------------------------------------------------------------------------------------

namespace {

// Good plans of all ranks, to be broken.
struct Bench {
  Bench(const char* name, Collective collective, int size, size_t count)
      : algorithm(row(name, collective)), shape(even_shape(size, count)) {
    for (int r = 0; r < size; ++r) {
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
  no_in.caught("this collective has no In");

  Bench boast = ring();
  boast.algorithm.single_fold = true;
  boast.caught("single_fold is not what the row says");
  for (Plan& plan : boast.plans) plan.single_fold = true;
  boast.caught("single_fold, yet it reduces what it receives");
  Bench disagree = direct();
  disagree.plans[3].single_fold = false;
  disagree.caught("single_fold is not what the row says");

  Bench slower = ring();
  slower.algorithm.rounds = [](const Shape&) -> size_t { return 5; };
  slower.caught("6 rounds, by the formula 5");
  Bench chatty("tree", Collective::Broadcast, 2, 8);
  for (int r : {0, 1}) {
    chatty.steps(r).push_back(chatty.steps(r)[0]);
    chatty.steps(r)[1].round = 1;
  }
  chatty.caught("2 rounds, by the formula 1");
  chatty.algorithm.rounds = [](const Shape&) -> size_t { return 2; };
  chatty.caught("16 elements sent by the busiest rank, by the formula 8");
}

// Everybody sends everything to everybody and adds up, beginning with its own: right sums, yet other bits on every rank.
TEST(checker_catches_sums_in_different_order) {
  Bench bench("tree", Collective::AllReduce, 3, 1);
  bench.algorithm.rounds = [](const Shape&) -> size_t { return 1; };
  bench.algorithm.elements_sent = [](const Shape&) -> size_t { return 2; };
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

// ---- the selector ----

namespace {

constexpr LinkCost kLink{.seconds_per_round = 20e-6, .seconds_per_byte = 1e-9};  // a 10 Gbit/s network

std::string selected(Collective collective, const Shape& shape, DType dtype = DType::Float32, const std::string& forced = "") {
  return select(collective, shape, dtype, kLink, forced).name;
}

}  // namespace

TEST(select_takes_few_rounds_for_small_and_few_bytes_for_large) {
  for (const int size : {2, 3, 8, 64}) {
    const Shape small = even_shape(size, 2), large = even_shape(size, 1 << 24);
    for (const Algorithm& other : algorithms()) {
      const Algorithm& fast = select(other.collective, small, DType::Float32, {1.0, 0.0}, "");
      CHECK(fast.rounds(small) <= other.rounds(small));
      const Algorithm& lean = select(other.collective, large, DType::Float32, {0.0, 1.0}, "");
      CHECK(lean.elements_sent(large) <= other.elements_sent(large));
    }
  }
  CHECK_EQ(selected(Collective::Broadcast, even_shape(8, 16)), "direct");
  CHECK_EQ(selected(Collective::Broadcast, even_shape(8, 1 << 20)), "tree");
  CHECK_EQ(selected(Collective::AllReduce, even_shape(8, 16)), "direct");
  CHECK_EQ(selected(Collective::AllReduce, even_shape(8, 1 << 20)), "direct");
}

TEST(select_counts_float32_where_a_16_bit_sum_would_round_often) {
  // 64 elements over 63 ranks: one part is of two, which its owner sends 62 times in direct, while a ring sends it once.
  const Shape shape = even_shape(63, 64);
  const LinkCost bytes_only{.seconds_per_round = 0, .seconds_per_byte = 1e-9};
  CHECK_EQ(std::string(select(Collective::AllReduce, shape, DType::Float32, bytes_only, "").name), "ring");
  CHECK_EQ(std::string(select(Collective::AllReduce, shape, DType::BFloat16, bytes_only, "").name), "direct");
}

TEST(select_goes_through_hosts_where_their_ranks_share_a_link) {
  Shape shape = even_shape(8, 1 << 20);
  shape.host = {0, 1, 0, 1, 0, 1, 0, 1};
  const LinkCost shared{.seconds_per_round = 20e-6, .seconds_per_byte = 0.2e-9, .seconds_per_leaving_byte = 1e-9};
  CHECK_EQ(std::string(select(Collective::AllReduce, shape, DType::Float32, shared, "").name), "hierarchical");
  shape.host = {0, 0, 0, 0, 0, 0, 0, 0};  // nothing leaves: no reason for more rounds
  CHECK_EQ(std::string(select(Collective::AllReduce, shape, DType::Float32, shared, "").name), "direct");
}

TEST(select_is_forced_by_name_where_there_is_such_an_algorithm) {
  const Shape shape = even_shape(8, 16);
  for (const Algorithm& algorithm : algorithms())
    CHECK_EQ(selected(algorithm.collective, shape, DType::Float32, algorithm.name), algorithm.name);
  CHECK_EQ(selected(Collective::AllToAll, shape, DType::Float32, "tree"), "direct");
  try {
    selected(Collective::AllReduce, shape, DType::Float32, "rign");
    CHECK(!"an unknown name is refused");
  } catch (const InvalidArgument& error) {
    CHECK(std::string(error.what()).find("'rign'; known are: direct, hierarchical, ring, tree") != std::string::npos);
  }
}

TEST(select_is_the_same_on_every_rank) {
  for (const size_t count : {0u, 1u, 7u, 1000u, 1u << 20}) {
    Shape shape = even_shape(7, count);
    shape.host = {0, 0, 1, 0, 1, 2, 2};
    for (int c = 0; c < kCollectives; ++c) {
      const Collective collective = static_cast<Collective>(c);
      shape.rank = 0;
      const std::string zero = selected(collective, shape, DType::Float16);
      for (shape.rank = 1; shape.rank < 7; ++shape.rank) CHECK_EQ(selected(collective, shape, DType::Float16), zero);
    }
  }
}
