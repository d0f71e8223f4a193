// The engine's parts by themselves, and whole engines on ranks that are threads: what the sanitizers look at.
#include <algorithm>
#include <atomic>
#include <thread>

#include "base/error.h"
#include "check.h"
#include "engine/board.h"
#include "engine/bytes.h"
#include "engine/engine.h"
#include "engine/tree.h"
#include "ranks.h"

using namespace roundel;
using engine::Board;
using engine::Buffers;
using engine::Engine;
using engine::Kind;
using engine::Readiness;
using engine::Request;
using engine::Sealed;
using engine::SharedRequest;
using engine::Ticket;
using test::kWires;
using test::run_ranks;
using test::Wires;

namespace {

// By one table, as a rank's requests are. The table outlives them, as an engine's does.
engine::Names& names() {
  static engine::Names table;
  return table;
}

SharedRequest asks_for(const std::string& name, int64_t elements = 3, uint32_t set = 0) {
  Request request;
  request.kind = Kind::AllReduce;
  request.name = name;
  request.set = set;
  request.tensors.push_back({DType::Float32, {elements}});
  return names().seal(std::move(request));
}

// Copies: the board's own are used again.
std::vector<Readiness> take_complete(Board& board) {
  std::vector<Readiness> taken;
  board.take_complete([&](const Readiness& entry) { taken.push_back(entry); });
  return taken;
}

std::vector<std::string> names_of(const std::vector<Readiness>& entries) {
  std::vector<std::string> names;
  for (const auto& entry : entries) names.push_back(entry.first.request->request.name);
  return names;
}

void ready(Board& board, const SharedRequest& request, const std::vector<int>& ranks) {
  board.ready(request, ranks, Clock::now());
}

Board board_of(int size) {
  std::vector<int> all;
  for (int r = 0; r < size; ++r) all.push_back(r);
  Board board(size, all);
  board.add_set(0, all);
  return board;
}

using Texts = std::vector<std::string>;

}  // namespace

TEST(engine_request_survives_its_encoding) {
  Request request;
  request.kind = Kind::AddSet;
  request.op = engine::kAdasum;
  request.on_device = true;
  request.root = 7;
  request.set = 3;
  request.prescale = 0.5;
  request.postscale = -2;
  request.name = "fc.weight";
  request.tensors = {{DType::Float16, {3, -1}}, {DType::Bool, {}}};
  request.ranks = {4, 2};
  const SharedRequest sealed = names().seal(request);
  const SharedRequest read = names().seal(std::string_view(sealed->encoded));
  CHECK(read->encoded == sealed->encoded);
  CHECK(read->slot == sealed->slot);
  CHECK(read->request.tensors[0].shape == std::vector<int64_t>({3, -1}));
  CHECK(read->request.ranks == request.ranks);
  for (size_t cut = 0; cut < sealed->encoded.size(); ++cut)
    CHECK_THROWS(names().seal(std::string_view(sealed->encoded).substr(0, cut)), CorruptFrame);
}

TEST(engine_names_find_what_was_agreed_on) {
  engine::Names table;
  const auto request = [](int64_t elements) {
    Request made;
    made.kind = Kind::AllReduce;
    made.name = "a";
    made.tensors.push_back({DType::Float32, {elements}});
    return made;
  };
  const SharedRequest once = table.seal(request(3));
  CHECK(table.seal(request(3)) != once);  // not agreed on yet
  CHECK(table.seal(request(3))->slot == once->slot);
  CHECK(table.last_agreed(Kind::AllReduce, 0, "a") == nullptr);
  table.give_number(once, 7);
  CHECK(table.seal(request(3)) == once && once->number == 7);
  CHECK(table.last_agreed(Kind::AllReduce, 0, "a") == once);
  const SharedRequest other = table.seal(request(4));
  CHECK(table.last_agreed(Kind::AllReduce, 0, "a") == once);
  table.give_number(other, 8);
  CHECK(table.last_agreed(Kind::AllReduce, 0, "a") == other);
  CHECK(table.seal(request(3)) == once);
  CHECK(table.last_agreed(Kind::AllReduce, 0, "a") == once);
  CHECK(table.last_agreed(Kind::AllReduce, 1, "a") == nullptr);
  CHECK(table.last_agreed(Kind::Broadcast, 0, "a") == nullptr);
}

TEST(engine_names_forget_what_nobody_uses) {
  engine::Names table;
  std::string key;
  for (int i = 0; i < 1000; ++i) {
    Request request;
    request.name = format("allreduce.noname.%d", i);
    const SharedRequest sealed = table.seal(std::move(request));
    key = sealed->slot->key;
    CHECK(table.find(key) == sealed->slot);
  }
  CHECK(table.find(key) == nullptr);
  CHECK(table.size() < 200);
}

TEST(engine_tree_has_every_rank_once) {
  const std::vector<int> host = {0, 0, 1, 0, 1, 2, 2, 1};
  for (int r = 0; r < 8; ++r) {
    const engine::Tree tree(r, host);
    std::vector<int> below{r};
    for (size_t c = 0; c < tree.children.size(); ++c) {
      CHECK(engine::Tree(tree.children[c], host).parent == r);
      CHECK(tree.subtree[c].front() == tree.children[c]);
      below.insert(below.end(), tree.subtree[c].begin(), tree.subtree[c].end());
    }
    std::sort(below.begin(), below.end());
    CHECK(below == tree.reporting);
  }
  CHECK(engine::Tree(0, host).children == std::vector<int>({1, 2, 3, 5}));
  CHECK(engine::Tree(0, host).reporting.size() == 8);
  CHECK(engine::Tree(2, host).children == std::vector<int>({4, 7}));
}

TEST(engine_board_completes_in_order_of_the_last_rank) {
  Board board = board_of(3);
  ready(board, asks_for("a"), {0});
  ready(board, asks_for("b"), {0, 2});
  ready(board, asks_for("a"), {1});
  CHECK(take_complete(board).empty());
  ready(board, asks_for("b"), {1});
  ready(board, asks_for("a"), {2});
  const auto complete = take_complete(board);
  CHECK(names_of(complete) == Texts({"b", "a"}));
  CHECK(complete[0].last == 1 && complete[1].last == 2);
  CHECK(take_complete(board).empty());
  ready(board, asks_for("c"), {1});
  CHECK_THROWS(ready(board, asks_for("c"), std::vector<int>(1, 1)), CorruptFrame);
}

TEST(engine_board_keeps_what_ranks_asked_for_apart) {
  Board board = board_of(3);
  ready(board, asks_for("a", 3), {0});
  ready(board, asks_for("a", 4), {1});
  ready(board, asks_for("a", 3), {2});
  const auto complete = take_complete(board);
  CHECK(complete.size() == 1 && complete[0].others.size() == 1);
  CHECK(complete[0].first.ranks == std::vector<int>({0, 2}));
}

TEST(engine_board_counts_joined_ranks_as_ready) {
  Board board = board_of(3);
  ready(board, asks_for("a"), {0, 2});
  board.join(2);  // ready for a itself: it does not count twice
  CHECK(take_complete(board).empty());
  board.join(1);
  CHECK(names_of(take_complete(board)) == Texts({"a"}));
  ready(board, asks_for("b"), {0});
  CHECK(names_of(take_complete(board)) == Texts({"b"}));
  CHECK(!board.all_joined());
  board.join(0);
  CHECK(board.all_joined());
  board.forget_joined();
  ready(board, asks_for("b"), {0});
  CHECK(take_complete(board).empty());
}

TEST(engine_board_knows_process_sets) {
  Board board = board_of(4);
  board.add_set(1, {1, 3});
  ready(board, asks_for("a", 3, 1), {1});
  SharedRequest waits;
  CHECK(board.waits_for_any({0, 2}, &waits) == -1);
  CHECK(board.waits_for_any({0, 3}, &waits) == 3);
  CHECK_THROWS(ready(board, asks_for("a", 3, 1), std::vector<int>(1, 0)), CorruptFrame);
  ready(board, asks_for("a", 3, 1), {3});
  CHECK(take_complete(board).size() == 1);
  ready(board, asks_for("a", 3, 1), {3});
  board.remove_set(1);
  ready(board, asks_for("a", 3, 1), {1});  // of a set that is no more
  CHECK(take_complete(board).empty());
  CHECK(board.stalled(0).empty());
}

TEST(engine_board_hands_on_once_what_is_stale) {
  Board board = board_of(3);
  ready(board, asks_for("a"), {0});
  ready(board, asks_for("b"), {1});
  CHECK(board.take_stale(100).empty());
  CHECK(board.take_ready(1).size() == 1);
  const auto stale = board.take_stale(0);
  CHECK(stale.size() == 1 && stale[0].request->request.name == "a");
  CHECK(board.take_stale(0).empty());
  const auto stalled = board.stalled(0);
  CHECK(stalled.size() == 2 && stalled[0].ready == std::vector<int>({0}) && stalled[0].missing == std::vector<int>({1, 2}));
  ready(board, asks_for("a"), {1, 2});
  const auto complete = take_complete(board);
  CHECK(complete.size() == 1 && complete[0].first.ranks == std::vector<int>({1, 2}));
}

TEST(engine_agrees_on_ranks_that_are_threads) {
  for (const Wires wires : kWires)
    run_ranks(3, wires, [](comm::Communicator& comm) {
      const auto engine = Engine::open(comm);
      const int rank = comm.world().rank;
      const auto work = [&](int thread) {  // every rank in an order of its own
        std::vector<std::vector<float>> data;
        std::vector<std::shared_ptr<Ticket>> tickets;
        for (int i = 0; i < 40; ++i) data.emplace_back(static_cast<size_t>(i % 5 + 1), static_cast<float>(rank + 1));
        for (int i = 0; i < 40; ++i) {
          const int which = (i * (rank == 1 ? 7 : 3) + thread) % 40;
          auto& x = data[static_cast<size_t>(which)];
          const View view{x.data(), x.size(), DType::Float32};
          Request request;
          request.kind = Kind::AllReduce;
          request.name = format("t%d.%d", thread, which);
          request.tensors.push_back({DType::Float32, {static_cast<int64_t>(x.size())}});
          tickets.push_back(engine->submit(std::move(request), Buffers{{view}, {view}, {}, {}}));
        }
        for (const auto& ticket : tickets) engine->wait(*ticket);
        for (const auto& x : data) EXPECT(std::all_of(x.begin(), x.end(), [](float v) { return v == 6; }));
      };
      for (int repeat = 0; repeat < 5; ++repeat) {
        std::vector<std::thread> threads;
        for (int t = 0; t < 2; ++t) threads.emplace_back(work, t);
        for (std::thread& thread : threads) thread.join();
      }
      Request odd;
      odd.kind = Kind::Broadcast;
      odd.name = "odd";
      odd.root = rank == 2 ? 1 : 0;
      float value = 0;
      const View view{&value, 1, DType::Float32};
      odd.tensors.push_back({DType::Float32, {1}});
      const auto ticket = engine->submit(odd, Buffers{{view}, {view}, {}, {}});
      bool refused = false;
      try {
        engine->wait(*ticket);
      } catch (const Mismatch&) {
        refused = true;
      }
      EXPECT(refused);
      Request join;
      join.kind = Kind::Join;
      const auto joined = engine->submit(join, {});
      engine->wait(*joined);
      EXPECT(joined->value >= 0);
      engine->close();
    });
}
