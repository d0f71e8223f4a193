// transport/mpi with an MPI of two ranks inside this process: short messages are taken at once, long ones when their receive is
// there.
#include "transport/mpi.h"

#include <sys/eventfd.h>

#include <algorithm>
#include <cstring>
#include <list>

#include "base/error.h"
#include "check.h"
#include "transport/stream.h"

using namespace roundel;
using namespace roundel::transport;

namespace {

// What both ranks share. Requests are numbers, 0 is done.
struct Wire {
  struct Message {
    int to, tag;
    const std::byte* data;
    size_t bytes;
    std::vector<std::byte> kept;  // of a short one
    Mpi::Request sender;          // to be ended
  };
  struct Receive {
    int to, tag;
    std::byte* data;
    size_t bytes;
    Mpi::Request request;
  };
  std::list<Message> messages;
  std::list<Receive> receives;
  std::vector<bool> done{true};
  size_t longs = 0;      // received so far
  bool stalled = false;  // those that come are not there yet
  bool deaf = false;     // and no receive can be withdrawn

  Mpi::Request make(bool is_done) {
    done.push_back(is_done);
    return done.size() - 1;
  }
  void match() {
    for (auto receive = receives.begin(); receive != receives.end();) {
      const auto message = std::find_if(messages.begin(), messages.end(), [&](const Message& m) {
        return m.to == receive->to && m.tag == receive->tag && !(stalled && m.kept.empty());
      });
      if (message == messages.end()) {
        ++receive;
        continue;
      }
      CHECK(message->bytes <= receive->bytes);
      const std::byte* from = message->kept.empty() ? message->data : message->kept.data();
      if (message->bytes > 0) std::memcpy(receive->data, from, message->bytes);
      longs += message->kept.empty();
      done[message->sender] = done[receive->request] = true;
      messages.erase(message);
      receive = receives.erase(receive);
    }
  }
};

class PairMpi final : public Mpi {
 public:
  PairMpi(int rank, std::shared_ptr<Wire> wire) : rank_(rank), wire_(std::move(wire)) {}
  const std::string& path() const override { return path_; }
  std::string version() const override { return "pair"; }
  const char* abi() const override { return "test"; }
  bool initialized() const override { return true; }
  bool finalized() const override { return false; }
  bool initialize() override { return false; }
  MpiThreads threads() const override { return MpiThreads::Multiple; }
  void finalize() override {}
  Comm world() const override { return 1; }
  Comm comm_at(uintptr_t) const override { return 1; }
  int rank(Comm) const override { return rank_; }
  int size(Comm) const override { return 2; }
  int highest_tag(Comm) const override { return 32767; }
  Request send(Comm, int peer, int tag, const void* data, size_t bytes) override {
    const auto* begin = static_cast<const std::byte*>(data);
    wire_->messages.push_back({peer, tag, begin, bytes, {begin, begin + bytes}, wire_->make(true)});
    return wire_->messages.back().sender;
  }
  Request send_when_received(Comm, int peer, int tag, const void* data, size_t bytes) override {
    wire_->messages.push_back({peer, tag, static_cast<const std::byte*>(data), bytes, {}, wire_->make(false)});
    return wire_->messages.back().sender;
  }
  Request receive(Comm, int, int tag, void* data, size_t bytes) override {
    wire_->receives.push_back({rank_, tag, static_cast<std::byte*>(data), bytes, wire_->make(false)});
    return wire_->receives.back().request;
  }
  Request duplicate(Comm, Comm* made) override {
    *made = 2;
    return 0;
  }
  Request barrier(Comm) override { return 0; }
  Request allreduce(Comm, void*, size_t, DType, ReduceOp) override { return 0; }
  bool can_reduce(DType, ReduceOp) const override { return false; }
  bool test(Request& request) override {
    wire_->match();
    if (!wire_->done[request]) return false;
    request = 0;
    return true;
  }
  void cancel(Request& request) override {
    if (wire_->deaf) return;
    wire_->receives.remove_if([&](const Wire::Receive& receive) { return receive.request == request; });
    wire_->done[request] = true;
  }

 private:
  int rank_;
  std::shared_ptr<Wire> wire_;
  std::string path_ = "libmpi.so";
};

struct Pair {
  Pair() {
    for (int r = 0; r < 2; ++r) {
      const auto job = std::make_shared<MpiJob>(std::make_shared<PairMpi>(r, wire), 0, 1);
      const Identity identity(Token{}, r, 2, 1);
      ends[r] = std::make_unique<StreamTransport>(identity, std::vector<StreamTransport::Channels>(2), &bells[r], 0.0);
      for (auto& stripe : open_mpi(identity, std::make_shared<MpiNumber>(job, 1), {1 - r}, {0, 1}))
        ends[r]->add(std::move(stripe));
    }
  }
  ~Pair() {
    for (auto& end : ends) end->abandon();
  }
  bool finish(int rank, Ticket ticket, int looks = 1000) {
    for (int i = 0; i < looks; ++i) {
      if (ends[rank]->test(ticket)) return true;
      for (auto& end : ends) end->poll();
    }
    return false;
  }
  std::shared_ptr<Wire> wire = std::make_shared<Wire>();
  DoorbellState states[2];
  Doorbell bells[2] = {{&states[0], Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK))},
                       {&states[1], Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK))}};
  std::unique_ptr<StreamTransport> ends[2];
};

Tag message(uint32_t index) { return {1, index, {}}; }

std::vector<std::byte> bytes_of(size_t size) {
  std::vector<std::byte> bytes(size);
  for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i * 7 + size);
  return bytes;
}

}  // namespace

TEST(mpi_messages_of_all_lengths_match_in_any_order) {
  for (const bool receives_come_first : {true, false}) {
    Pair pair;
    const size_t sizes[] = {0, 1, 3920, 3927, 3928, 3929, 4000, 7928, 7929, 11'928, 11'929, 100'000, 1'000'000};
    std::vector<std::vector<std::byte>> sent, got;
    std::vector<Ticket> sends, receives;
    const auto send = [&] {
      for (const size_t size : sizes) {
        sent.push_back(bytes_of(size));
        sends.push_back(pair.ends[0]->send(1, message(static_cast<uint32_t>(sends.size())), sent.back()));
      }
      for (int i = 0; i < 20; ++i) pair.ends[1]->poll();
    };
    if (!receives_come_first) send();
    for (size_t i = std::size(sizes); i-- > 0;) {
      got.emplace_back(sizes[i]);
      receives.push_back(pair.ends[1]->recv(0, message(static_cast<uint32_t>(i)), got.back()));
    }
    if (receives_come_first) send();
    for (const Ticket ticket : receives) CHECK(pair.finish(1, ticket));
    for (const Ticket ticket : sends) CHECK(pair.finish(0, ticket));
    for (size_t i = 0; i < std::size(sizes); ++i) CHECK(got[std::size(sizes) - 1 - i] == sent[i]);
  }
}

TEST(mpi_a_long_message_that_comes_early_stays_where_it_is_and_blocks_nothing) {
  Pair pair;
  const auto first = bytes_of(100'000), second = bytes_of(200'000), third = bytes_of(10);
  std::vector<std::byte> into[3] = {std::vector<std::byte>(100'000), std::vector<std::byte>(200'000),
                                    std::vector<std::byte>(10)};
  const Ticket sent = pair.ends[0]->send(1, message(0), first);
  pair.ends[0]->send(1, message(1), second);
  pair.ends[0]->send(1, message(2), third);
  CHECK(pair.finish(1, pair.ends[1]->recv(0, message(2), into[2])));
  CHECK(pair.finish(1, pair.ends[1]->recv(0, message(1), into[1])));
  CHECK(!pair.finish(0, sent, 100));
  CHECK_EQ(pair.wire->longs, 1u);
  CHECK_EQ(pair.ends[1]->kept_bytes(0), 0u);
  CHECK(pair.finish(1, pair.ends[1]->recv(0, message(0), into[0])));
  CHECK(pair.finish(0, sent));
  CHECK(into[0] == first && into[1] == second && into[2] == third);
}

TEST(mpi_however_many_long_messages_come_early_what_is_waited_for_comes_through) {
  Pair pair;
  constexpr uint32_t kCount = 40;
  const auto sent = bytes_of(50'000);
  std::vector<Ticket> sends;
  for (uint32_t i = 0; i < kCount; ++i) sends.push_back(pair.ends[0]->send(1, message(i), sent));
  for (uint32_t i = kCount; i-- > 0;) {
    std::vector<std::byte> into(sent.size());
    CHECK(pair.finish(1, pair.ends[1]->recv(0, message(i), into)));
    CHECK(into == sent);
  }
  for (const Ticket ticket : sends) CHECK(pair.finish(0, ticket));
}

TEST(mpi_who_sends_to_a_peer_within_its_credit_waits_for_no_receive) {
  Pair pair;
  const auto sent = bytes_of(100'000);
  std::vector<std::byte> into(sent.size());
  const Tag tag{kPointToPoint | 1, 0, {}};
  const Ticket ticket = pair.ends[0]->send(1, tag, sent);
  for (int i = 0; i < 100; ++i) pair.ends[1]->poll();
  CHECK(pair.finish(0, ticket));
  CHECK(pair.finish(1, pair.ends[1]->recv(0, tag, into)));
  CHECK(into == sent);
}

TEST(mpi_a_long_message_to_a_peer_may_be_asked_for_while_it_comes) {
  Pair pair;
  const auto sent = bytes_of(100'000);
  std::vector<std::byte> into(sent.size());
  const Tag tag{kPointToPoint | 1, 0, {}};
  pair.wire->stalled = true;
  const Ticket ticket = pair.ends[0]->send(1, tag, sent);
  for (int i = 0; i < 100; ++i) pair.ends[1]->poll();
  const Ticket received = pair.ends[1]->recv(0, tag, into);
  CHECK(!pair.ends[1]->test(received));
  pair.wire->stalled = false;
  CHECK(pair.finish(1, received));
  CHECK(pair.finish(0, ticket));
  CHECK(into == sent);
}

// What is then freed are the arrays of early messages.
TEST(mpi_what_comes_after_the_end_hurts_nobody) {
  Pair pair;
  const auto sent = bytes_of(100'000);
  pair.wire->stalled = true;
  pair.ends[0]->send(1, Tag{kPointToPoint | 1, 0, {}}, sent);
  for (int i = 0; i < 100; ++i) pair.ends[1]->poll();
  CHECK(!pair.wire->receives.empty());
  const std::list<Wire::Receive> under_way = pair.wire->receives;
  pair.wire->deaf = true;
  pair.ends[1]->abandon();
  std::vector<std::string> others(8, std::string(sent.size(), 'x'));
  for (const Wire::Receive& receive : under_way)
    if (receive.to == 1) std::memset(receive.data, 'y', receive.bytes);
  for (const std::string& other : others) CHECK(other.find('y') == std::string::npos);
}

TEST(mpi_a_long_message_of_a_collective_that_is_over_is_a_mismatch) {
  Pair pair;
  const auto sent = bytes_of(100'000);
  pair.ends[0]->send(1, message(0), sent);
  for (int i = 0; i < 100; ++i) pair.ends[1]->poll();
  CHECK_THROWS(pair.ends[1]->retire({1, 0, {}}), Mismatch);
}
