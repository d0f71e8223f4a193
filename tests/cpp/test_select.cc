// The selector is held to sensible choices.
#include <string>
#include <vector>

#include "plans.h"

using namespace roundel;
using namespace roundel::test;

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
      CHECK(fast.cost(small).rounds <= other.cost(small).rounds);
      const Algorithm& lean = select(other.collective, large, DType::Float32, {0.0, 1.0}, "");
      CHECK(lean.cost(large).elements_sent <= other.cost(large).elements_sent);
    }
  }
  CHECK_EQ(selected(Collective::Broadcast, even_shape(8, 16)), "direct");
  CHECK_EQ(selected(Collective::Broadcast, even_shape(8, 1 << 20)), "tree");
  CHECK_EQ(selected(Collective::AllReduce, even_shape(8, 16)), "exchange");
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

TEST(select_weighs_rounds_messages_and_bytes) {
  constexpr LinkCost network{20e-6, 1e-9, 1e-9, 2e-6, 0.1e-9};
  struct Case {
    Collective collective;
    int size;
    size_t bytes;  // of parts.total()
    int ranks_per_host;
    const char* expected;
  };
  constexpr size_t kMB = 1 << 20;
  const Case cases[] = {
      {Collective::AllReduce, 2, 8, 1, "exchange"},  // one round instead of two
      {Collective::AllReduce, 2, 64 * kMB, 1, "direct"},
      {Collective::AllReduce, 3, 8, 1, "exchange"},
      {Collective::AllReduce, 4, 4 * kMB, 1, "direct"},
      {Collective::AllReduce, 64, 8, 1, "doubling"},
      {Collective::AllReduce, 64, 64 << 10, 1, "halving"},
      {Collective::AllReduce, 64, 64 * kMB, 1, "direct"},
      {Collective::AllReduce, 1024, 8, 1, "doubling"},
      {Collective::AllReduce, 64, 64 * kMB, 8, "hierarchical"},
      {Collective::ReduceScatter, 4, 64, 1, "direct"},
      {Collective::ReduceScatter, 64, 256, 1, "halving"},
      {Collective::ReduceScatter, 64, 64 * kMB, 8, "hierarchical"},
      {Collective::AllGather, 4, 64, 1, "direct"},
      {Collective::AllGather, 64, 256, 1, "doubling"},
      {Collective::AllGather, 48, 192, 1, "bruck"},
      {Collective::AllGather, 64, 64 * kMB, 1, "direct"},
      {Collective::AllGather, 64, 64 * kMB, 8, "hierarchical"},
      {Collective::Broadcast, 4, 64, 1, "direct"},
      {Collective::Broadcast, 64, 64, 1, "tree"},
      {Collective::Reduce, 64, 64, 1, "tree"},
      {Collective::Reduce, 64, 64 * kMB, 1, "direct"},
      {Collective::Gather, 4, 64, 1, "direct"},
      {Collective::Gather, 64, 256, 1, "tree"},
      {Collective::Gather, 64, 64 * kMB, 1, "direct"},
      {Collective::Scatter, 4, 64, 1, "direct"},
      {Collective::Scatter, 64, 256, 1, "tree"},
      {Collective::AllToAll, 4, 64, 1, "direct"},
      {Collective::AllToAll, 64, 512, 1, "bruck"},
      {Collective::AllToAll, 64, 64 * kMB, 1, "direct"},
      {Collective::AllToAllV, 64, 0, 1, "direct"},
  };
  for (const Case& each : cases) {
    Shape shape = even_shape(each.size, each.bytes / 4);
    shape.host = blocks(each.size, {each.ranks_per_host});
    LinkCost cost = network;
    if (each.ranks_per_host == 1) cost.seconds_per_leaving_byte = 0;
    const std::string chosen = select(each.collective, shape, DType::Float32, cost, "").name;
    CHECK_EQ(std::string(name_of(each.collective)) + format(" %d ranks, %zu bytes: ", each.size, each.bytes) + chosen,
             std::string(name_of(each.collective)) + format(" %d ranks, %zu bytes: ", each.size, each.bytes) + each.expected);
  }
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
    CHECK(
        std::string(error.what())
            .find("'rign'; known are: bruck, direct, doubling, exchange, halving, hierarchical, pairwise, ring, swing, tree") !=
        std::string::npos);
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
