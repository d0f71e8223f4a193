// transport/stream over socket pairs: matching in any order and over several sockets, bounded memory, corrupt bytes refused.
#include "transport/stream.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

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
