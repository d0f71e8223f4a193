// transport/stream over socket pairs: matching in any order and over several sockets, bounded memory, corrupt bytes refused.
#include "transport/stream.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <thread>

#include "base/error.h"
#include "check.h"
#include "transport/tcp.h"

using namespace roundel;
using namespace roundel::transport;

namespace {

struct End {
  DoorbellState state{};
  Doorbell bell{&state, Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK))};
  std::unique_ptr<StreamTransport> transport;
};

struct Pair {
  explicit Pair(size_t sockets) {
    std::vector<StreamTransport::Channels> channels[2];
    for (auto& of_rank : channels) of_rank.resize(2);
    for (size_t i = 0; i < sockets; ++i) {
      int fds[2];
      CHECK_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds), 0);
      raw = fds[0];
      for (size_t r = 0; r < 2; ++r) channels[r][1 - r].push_back(socket_channel(Fd(fds[r])));
    }
    for (int r = 0; r < 2; ++r)
      ends[r].transport =
          std::make_unique<StreamTransport>(Identity(Token{}, r, 2, 1), std::move(channels[r]), &ends[r].bell, 0.0);
  }
  StreamTransport& at(int rank) { return *ends[rank].transport; }
  void step() {
    for (auto& end : ends) end.transport->sleep(Deadline::after(0.001), [] { return false; });
  }
  bool finish(int rank, Ticket ticket) {
    for (int i = 0; i < 20'000; ++i) {
      if (at(rank).test(ticket)) return true;
      step();
    }
    return false;
  }
  bool finish_alone(int rank, Ticket ticket) {
    for (const Deadline deadline = Deadline::after(3); !deadline.passed();) {
      if (at(rank).test(ticket)) return true;
      at(rank).sleep(Deadline::after(0.001), [] { return false; });
    }
    return false;
  }
  End ends[2];
  int raw = -1;  // rank 0's end of the last socket
};

Tag tag_of(uint64_t sequence, uint64_t count) {
  Tag tag{kPointToPoint | sequence, 0, {}};
  tag.signature.kind = OpKind::PointToPoint;
  tag.signature.count = count;
  return tag;
}

}  // namespace

TEST(messages_match_by_tag_over_any_number_of_sockets) {
  for (const size_t sockets : {1, 2, 4}) {
    Pair pair(sockets);
    std::vector<std::vector<std::byte>> sent, got;
    std::vector<Ticket> sends, receives;
    for (size_t i = 0; i < 8; ++i) {
      sent.emplace_back(i * 50'000, static_cast<std::byte>(i));
      got.emplace_back(i * 50'000);
    }
    for (size_t i = 0; i < 8; ++i) sends.push_back(pair.at(0).send(1, tag_of(i, sent[i].size()), sent[i]));
    for (size_t i = 8; i-- > 0;) receives.push_back(pair.at(1).recv(0, tag_of(i, got[i].size()), got[i]));
    for (const Ticket& ticket : receives) CHECK(pair.finish(1, ticket));
    for (const Ticket& ticket : sends) CHECK(pair.finish(0, ticket));
    CHECK(sent == got);
  }
}

TEST(what_nobody_asked_for_is_kept_up_to_the_credit_and_blocks_nothing) {
  Pair pair(2);
  const std::vector<std::byte> megabyte(1 << 20, std::byte{7});
  std::vector<std::byte> got(1 << 20);
  std::vector<Ticket> sends;
  for (uint64_t i = 0; i < 100; ++i) sends.push_back(pair.at(0).send(1, tag_of(i, megabyte.size()), megabyte));
  for (int i = 0; i < 500; ++i) pair.step();
  CHECK(pair.at(1).kept_bytes(0) > 0);
  CHECK(pair.at(1).kept_bytes(0) <= credit_bytes(2));

  Tag collective{1, 0, {}};  // comes through all the same
  const Ticket send = pair.at(0).send(1, collective, megabyte), receive = pair.at(1).recv(0, collective, got);
  CHECK(pair.finish(1, receive));
  CHECK(pair.finish(0, send));
  for (uint64_t i = 0; i < 100; ++i) {
    CHECK(pair.finish(1, pair.at(1).recv(0, tag_of(i, got.size()), got)));
    CHECK(pair.finish(0, sends[i]));
  }
  CHECK_EQ(pair.at(1).kept_bytes(0), size_t{0});
}

TEST(one_way_messages_that_are_received_never_use_up_the_credit) {
  for (const auto& [count, bytes] : {std::pair{10'000, 1'000}, {1'000, 100'000}, {20, 3'000'000}}) {
    Pair pair(1);
    const std::vector<std::byte> sent(static_cast<size_t>(bytes), std::byte{5});
    std::vector<std::byte> got(sent.size());
    for (uint64_t i = 0; i < static_cast<uint64_t>(count); ++i) {
      const Ticket send = pair.at(0).send(1, tag_of(i, got.size()), sent);
      // The receiver looks at its connection only while it receives, the sender while its message is on its way.
      const Ticket receive = pair.at(1).recv(0, tag_of(i, got.size()), got);
      bool arrived = false, written = pair.at(0).test(send);
      for (int step = 0; step < 10'000 && !(arrived && written); ++step) {
        if (!written) pair.at(0).poll(), written = pair.at(0).test(send);
        if (!arrived) pair.at(1).poll(), arrived = pair.at(1).test(receive);
      }
      CHECK(arrived && written);
      if (!arrived || !written) break;
    }
  }
}

TEST(a_sender_of_small_messages_never_waits_for_a_receiver_that_is_elsewhere) {
  Pair pair(1);
  const std::vector<std::byte> sent(100'000, std::byte{5});
  std::vector<std::byte> got(sent.size());
  for (uint64_t i = 0; i < 500; ++i) {
    const Ticket send = pair.at(0).send(1, tag_of(i, got.size()), sent);
    CHECK(pair.at(0).test(send));  // all of it is in the socket before the receiver looks at it
    const Ticket receive = pair.at(1).recv(0, tag_of(i, got.size()), got);
    CHECK(pair.finish_alone(1, receive));
  }
}

TEST(news_of_credit_for_a_rank_that_has_left_is_no_error) {
  Pair pair(1);
  const std::vector<std::byte> sent(100'000, std::byte{5});
  std::vector<std::byte> got(sent.size());
  constexpr uint64_t kMessages = 60;  // more than a quarter of the credit
  std::vector<Ticket> receives;
  for (uint64_t i = 0; i < kMessages; ++i) {
    const Ticket send = pair.at(0).send(1, tag_of(i, got.size()), sent);
    while (!pair.at(0).test(send)) {
      pair.at(0).poll();
      pair.ends[1].transport->sleep(Deadline::after(0.001), [] { return false; });
    }
  }
  std::thread leaving([&] { pair.ends[0].transport.reset(); });
  for (uint64_t i = 0; i < kMessages; ++i) {
    if (i == kMessages / 2) ::poll(nullptr, 0, 50);
    CHECK(pair.finish_alone(1, pair.at(1).recv(0, tag_of(i, got.size()), got)));
    CHECK(got == sent);
  }
  leaving.join();
}

TEST(a_peer_that_closes_one_of_several_sockets_may_go_on_with_the_others) {
  Pair pair(2);
  ::shutdown(pair.raw, SHUT_WR);
  std::vector<std::byte> sent(100, std::byte{1}), got(100);
  for (uint64_t i = 0; i < 13; ++i) {
    const Ticket receive = pair.at(1).recv(0, tag_of(i, got.size()), got);
    const Deadline later = Deadline::after(0.1);
    while (!later.passed()) pair.ends[1].transport->sleep(later, [] { return false; });
    CHECK(pair.finish(0, pair.at(0).send(1, tag_of(i, sent.size()), sent)));
    CHECK(pair.finish_alone(1, receive));
  }
  CHECK_THROWS(pair.finish_alone(1, pair.at(1).recv(0, tag_of(13, got.size()), got)), PeerLost);
}

TEST(a_header_with_a_flipped_bit_is_refused) {
  for (const size_t byte : {0u, 4u, 6u, 8u, 12u, 16u, 24u, 28u, 40u, 48u, 56u, 60u}) {
    Pair pair(1);
    FrameHeader header = make_header(1, 0, tag_of(0, 8), 0);
    seal(header, {}, false);
    reinterpret_cast<std::byte*>(&header)[byte] ^= std::byte{4};
    (void)pair.at(1).recv(0, tag_of(0, 8), {});
    CHECK_EQ(::write(pair.raw, &header, sizeof header), static_cast<ssize_t>(sizeof header));
    CHECK_THROWS(pair.at(1).poll(), CorruptFrame);
  }
}

TEST(a_frame_of_another_epoch_is_dropped) {
  Pair pair(1);
  std::vector<std::byte> old(100, std::byte{9}), sent(100, std::byte{1}), got(100);
  FrameHeader header = make_header(7, 0, tag_of(0, 100), old.size());
  seal(header, old, false);
  const Ticket receive = pair.at(1).recv(0, tag_of(0, 100), got);
  CHECK_EQ(::write(pair.raw, &header, sizeof header), static_cast<ssize_t>(sizeof header));
  CHECK_EQ(::write(pair.raw, old.data(), old.size()), static_cast<ssize_t>(old.size()));
  for (int i = 0; i < 5; ++i) pair.step();
  CHECK(!pair.at(1).test(receive));
  CHECK(pair.finish(0, pair.at(0).send(1, tag_of(0, 100), sent)));
  CHECK(pair.finish(1, receive));
  CHECK(got == sent);
}

TEST(a_message_that_comes_twice_is_refused) {
  Pair pair(1);
  std::vector<std::byte> payload(100), got(100);
  FrameHeader header = make_header(1, 0, tag_of(1, 100), payload.size());
  seal(header, payload, false);
  for (int i = 0; i < 2; ++i) {
    CHECK_EQ(::write(pair.raw, &header, sizeof header), static_cast<ssize_t>(sizeof header));
    CHECK_EQ(::write(pair.raw, payload.data(), payload.size()), static_cast<ssize_t>(payload.size()));
  }
  (void)pair.at(1).recv(0, tag_of(0, 100), got);  // somebody waits for another one
  CHECK_THROWS(pair.at(1).poll(), CorruptFrame);
}

TEST(a_message_of_a_collective_that_is_over_is_a_mismatch) {
  Pair pair(1);
  std::vector<std::byte> payload(100), got(100);
  pair.at(1).retire({5, 0, {}});
  (void)pair.at(0).send(1, {5, 0, {}}, payload);
  (void)pair.at(1).recv(0, {6, 0, {}}, got);
  CHECK_THROWS(pair.at(1).poll(), Mismatch);
}

TEST(ranks_that_call_different_things_both_learn_of_it) {
  Pair pair(1);
  std::vector<std::byte> sent(100), got(100);
  Tag tags[2] = {{1, 0, {}}, {1, 0, {}}};
  tags[0].signature.kind = OpKind::AllReduce;
  tags[1].signature.kind = OpKind::Barrier;
  for (int r = 0; r < 2; ++r) (void)pair.at(r).send(1 - r, tags[r], sent);
  for (int r = 0; r < 2; ++r) CHECK_THROWS((pair.at(r).recv(1 - r, tags[r], got), pair.at(r).poll()), Mismatch);
}

TEST(a_difference_that_was_not_seen_is_told_by_what_comes_next) {
  Pair pair(1);
  std::vector<std::byte> sent(100), got(100);
  for (int r = 0; r < 2; ++r) {  // an operation in which neither hears from the other
    Tag first{1, 0, {}};
    first.signature.root = static_cast<uint16_t>(r);
    pair.at(r).retire(first);
  }
  const Tag second{2, 0, {}};
  const Ticket early = pair.at(0).send(1, second, sent);
  CHECK(pair.finish(0, early));
  CHECK(pair.finish(1, pair.at(1).recv(0, second, got)));
  CHECK_THROWS(pair.at(1).retire(second), Diverged);
}

TEST(a_payload_with_a_wrong_checksum_is_refused) {
  Pair pair(1);
  std::vector<std::byte> payload(1000, std::byte{1}), got(1000);
  FrameHeader header = make_header(1, 0, tag_of(0, 1000), payload.size());
  seal(header, payload, true);
  payload[500] ^= std::byte{16};
  (void)pair.at(1).recv(0, tag_of(0, 1000), got);
  CHECK_EQ(::write(pair.raw, &header, sizeof header), static_cast<ssize_t>(sizeof header));
  CHECK_EQ(::write(pair.raw, payload.data(), payload.size()), static_cast<ssize_t>(payload.size()));
  CHECK_THROWS(pair.at(1).poll(), CorruptFrame);
}

TEST(a_stream_that_ends_within_a_frame_is_a_lost_peer) {
  Pair pair(1);
  std::vector<std::byte> got(1000);
  FrameHeader header = make_header(1, 0, tag_of(0, 1000), got.size());
  seal(header, got, false);
  (void)pair.at(1).recv(0, tag_of(0, 1000), got);
  CHECK_EQ(::write(pair.raw, &header, sizeof header), static_cast<ssize_t>(sizeof header));
  pair.ends[0].transport.reset();
  CHECK_THROWS((pair.at(1).poll(), pair.at(1).poll()), PeerLost);
}
