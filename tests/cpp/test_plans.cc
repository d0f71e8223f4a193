// Plans: every algorithm is proved by the checker over sizes, counts, parts, roots and host layouts.
#include <string>
#include <vector>

#include "plans.h"

using namespace roundel;
using namespace roundel::test;

namespace {

// 0, 1, one element short of a part each, one each, and parts that differ.
std::vector<size_t> counts_for(int size) {
  const size_t ranks = static_cast<size_t>(size);
  return {0, 1, ranks - 1, ranks, 3 * ranks + 2};
}

// Parts that nobody would call even: 0, 1, 2, 0, 1, 2, ...; all in the middle; all but the first.
std::vector<Parts> uneven_parts(int size) {
  std::vector<size_t> ragged, lonely(static_cast<size_t>(size)), headless(static_cast<size_t>(size), 2);
  for (int r = 0; r < size; ++r) ragged.push_back(static_cast<size_t>(r % 3));
  lonely[static_cast<size_t>(size / 2)] = 5;
  headless[0] = 0;
  return {Parts::of(ragged), Parts::of(lonely), Parts::of(headless)};
}

std::vector<Shape> matrices(int size) {
  return {
      matrix_shape(size, [](int, int) { return 0; }),
      matrix_shape(size, [](int, int) { return 2; }),
      matrix_shape(size, [](int a, int b) { return a + 2 * b; }),
      matrix_shape(size, [](int a, int b) { return (a * 7 + b * 3) % 4; }),              // with holes
      matrix_shape(size, [size](int a, int b) { return b == (a + 1) % size ? 3 : 0; }),  // one peer each
      matrix_shape(size, [](int a, int b) { return a == 0 && b > 0 ? b : 0; }),          // only rank 0 sends
  };
}

std::vector<Shape> shapes_for(Collective collective, int size) {
  if (collective == Collective::AllToAllV) return matrices(size);
  std::vector<Shape> shapes;
  if (collective == Collective::AllToAll) {
    for (const size_t each : {0u, 1u, 3u}) shapes.push_back(even_shape(size, each * static_cast<size_t>(size)));
    return shapes;
  }
  for (const size_t count : counts_for(size)) shapes.push_back(even_shape(size, count));
  if (has_own_parts(collective))
    for (const Parts& parts : uneven_parts(size)) shapes.push_back({.size = size, .parts = parts});
  if (has_root(collective)) {
    const size_t at_zero = shapes.size();
    for (const int root : {size / 2, size - 1}) {
      for (size_t i = 0; i < at_zero; ++i) {
        shapes.push_back(shapes[i]);
        shapes.back().root = root;
      }
    }
  }
  return shapes;
}

std::vector<std::vector<int>> layouts(int size) {
  return {
      blocks(size, {size}),            // one host
      blocks(size, {1}),               // one rank per host
      blocks(size, {(size + 1) / 2}),  // two hosts
      blocks(size, {3, 1, 2}),         // unequal, one owner
      blocks(size, {4, 2, 3}),         // unequal, more ranks than owners
      interleaved(size, 4),            // ranks of a host are not neighbours
      interleaved(size, (size + 1) / 2),
  };
}

bool is_hierarchical(const Algorithm& algorithm) { return algorithm.name == std::string("hierarchical"); }

// Steps of a plan grow with log P, not with P.
bool is_logarithmic(const Algorithm& algorithm) {
  const std::string name = algorithm.name;
  return name == "tree" || name == "doubling" || name == "halving" || name == "swing" ||
         (name == "bruck" && algorithm.collective == Collective::AllGather) ||
         (name == "hierarchical" && has_root(algorithm.collective));
}

void check_size(const Algorithm& algorithm, int size) {
  Shape shape = even_shape(size, 3 * static_cast<size_t>(size));
  if (algorithm.collective == Collective::AllToAllV)
    shape = matrix_shape(size, [](int a, int b) { return (a * 7 + b * 3) % 4; });
  if (has_root(algorithm.collective)) shape.root = size - 2;
  if (is_hierarchical(algorithm)) shape.host = blocks(size, {16, 13});
  check_all_right(check(algorithm, shape));
}

}  // namespace

TEST(plans_of_every_algorithm_are_right_for_1_to_64_ranks) {
  for (const Algorithm& algorithm : algorithms()) {
    for (int size = 1; size <= 64; ++size)
      for (const Shape& shape : shapes_for(algorithm.collective, size)) check_all_right(check(algorithm, shape));
  }
}

TEST(plans_of_hierarchical_are_right_for_every_host_layout) {
  for (const Algorithm& algorithm : algorithms()) {
    if (!is_hierarchical(algorithm)) continue;
    for (int size = 1; size <= 64; ++size) {
      for (const std::vector<int>& host : layouts(size)) {
        for (Shape shape : shapes_for(algorithm.collective, size)) {
          shape.host = host;
          check_all_right(check(algorithm, shape));
        }
      }
    }
  }
}

TEST(plans_of_few_steps_are_right_for_thousands_of_ranks) {
  for (const Algorithm& algorithm : algorithms()) {
    if (!is_logarithmic(algorithm)) continue;
    for (const int size : {100, 1000, 1024, 2047, 3000, 4096}) check_size(algorithm, size);
  }
}

// Where everyone talks to everyone, the plans of all ranks have P^2 steps.
TEST(plans_of_many_steps_are_right_for_hundreds_of_ranks) {
  for (const Algorithm& algorithm : algorithms()) {
    if (is_logarithmic(algorithm)) continue;
    for (const int size : {100, 256}) check_size(algorithm, size);
  }
}

TEST(soak_plans_of_many_steps_are_right_for_a_thousand_ranks) {
  for (const Algorithm& algorithm : algorithms()) {
    if (is_logarithmic(algorithm)) continue;
    for (const int size : {1000, 1024}) check_size(algorithm, size);
  }
}

TEST(plans_for_one_rank_only_scale) {
  for (const Algorithm& algorithm : algorithms()) {
    Shape shape = even_shape(1, 7);
    shape.sends = {7};
    const Plan plan = algorithm.make(shape);
    CHECK(plan.single_fold);
    if (algorithm.collective != Collective::AllReduce && algorithm.collective != Collective::ReduceScatter &&
        algorithm.collective != Collective::Reduce)
      continue;
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

// The communicator knows no more of the matrix than what its own rank sends and receives.
TEST(plans_of_alltoallv_look_at_their_own_row_and_column_only) {
  const Shape whole = matrix_shape(5, [](int a, int b) { return a + 2 * b; });
  for (const char* name : {"direct", "pairwise"}) {
    const Algorithm& algorithm = row(name, Collective::AllToAllV);
    for (int rank = 0; rank < 5; ++rank) {
      Shape known = matrix_shape(5, [&](int a, int b) { return a == rank || b == rank ? a + 2 * b : 0; }), all = whole;
      known.rank = all.rank = rank;
      const Plan a = algorithm.make(known), b = algorithm.make(all);
      CHECK_EQ(a.steps.size(), b.steps.size());
      for (size_t i = 0; i < a.steps.size(); ++i) {
        CHECK_EQ(a.steps[i].peer, b.steps[i].peer);
        CHECK_EQ(a.steps[i].place.begin, b.steps[i].place.begin);
        CHECK_EQ(a.steps[i].place.count, b.steps[i].place.count);
      }
    }
  }
}

TEST(parts_are_even_and_the_first_are_longer) {
  const Parts parts = Parts::even(11, 4);
  CHECK(parts.count(0) == 3 && parts.count(1) == 3 && parts.count(2) == 3 && parts.count(3) == 2);
  CHECK(parts.begin(3) == 9 && parts.total() == 11 && parts.size() == 4);
  CHECK(parts.run(1, 4).begin == 3 && parts.run(1, 4).count == 8);
  CHECK_EQ(Parts().total(), size_t{0});
}
