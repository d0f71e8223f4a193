// transport/handshake, at every listening port (control, data and memory; TCP and unix sockets): members come in, and nobody
// else does, whatever is sent, however slowly and however often; and what members then tell each other is checked before it is
// used.
#include "transport/handshake.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <ctime>
#include <functional>
#include <memory>
#include <set>
#include <string_view>
#include <thread>

#include "base/error.h"
#include "check.h"
#include "transport/card.h"
#include "transport/shm.h"
#include "transport/stranger.h"

using namespace roundel;
using namespace roundel::transport;

namespace {

Token token_of(uint8_t fill) {
  Token token;
  token.fill(fill);
  return token;
}

Identity member(int rank, int size = 3, uint32_t epoch = 1, uint8_t token = 1) { return {token_of(token), rank, size, epoch}; }

// A job's listening port, served on a thread as a rank does.
struct Port {
  explicit Port(Role role, std::vector<int> expected = {1}, double seconds = 10)
      : role(role),
        listener(role == Role::Memory ? listen_on(unix_address(member(0), 0)) : listen_on(resolve("127.0.0.1:0"))),
        address(role == Role::Memory ? unix_address(member(0), 0) : local_address(listener.get())),
        server([this, expected, seconds] {
          admitted = accept_all(listener.get(), member(0), this->role, expected, Deadline::after(seconds));
        }) {}
  ~Port() { finish(); }
  void finish() {
    if (server.joinable()) server.join();
  }
  // The true rank 1 comes, is let in, and is the one who was let in. Seconds that it took.
  double admits_rank_1() {
    const auto start = Clock::now();
    const Fd mine = connect_to(address, member(1), 0, role, Deadline::after(5));
    finish();
    CHECK(admitted.size() == 1 && admitted.contains(1));
    const char word = 'w';
    char heard = 0;
    send_all(mine.get(), &word, 1, Deadline::after(1));
    if (admitted.contains(1)) recv_all(admitted[1].get(), &heard, 1, Deadline::after(1));
    CHECK_EQ(heard, word);
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

  Role role;
  Fd listener;
  Address address;
  std::map<int, Fd> admitted;
  std::thread server;
};

Fd stranger_at(const Address& address) {
  Fd fd(::socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  CHECK_EQ(::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address.storage), address.length), 0);
  return fd;
}

template <class T>
bool say(const Fd& fd, const T& message) {
  return ::send(fd.get(), &message, sizeof message, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof message);
}

// Whether the other end hangs up within `seconds`, having said nothing more.
bool is_hung_up(const Fd& fd, double seconds = 2) {
  pollfd entry{fd.get(), POLLIN, 0};
  char byte;
  return ::poll(&entry, 1, static_cast<int>(seconds * 1000)) == 1 && ::recv(fd.get(), &byte, 1, MSG_DONTWAIT) <= 0;
}

void on_every_port(const std::function<void(Port&)>& attack) {
  for (const Role role : {Role::Control, Role::Data, Role::Memory}) {
    Port port(role);
    attack(port);
    if (port.server.joinable()) port.admits_rank_1();  // the attack itself may have looked
  }
}

// Both ends of a true handshake of rank 1 with rank 0, as somebody on the wire sees them.
struct Recording {
  Hello hello;
  Reply reply;
  Digest proof;
};

Recording record(Role role) {
  Recording tape;
  tape.hello = make_hello(member(1), 0, role);
  fill_random(tape.reply.nonce);
  tape.reply.proof = server_proof(member(0), tape.hello, tape.reply);
  tape.proof = client_proof(member(1), tape.hello, tape.reply);
  return tape;
}

// Says `answer(hello)` to whoever connects, and gives back how that one took it.
template <class Answer>
std::string connect_to_impostor(Answer answer) {
  const Fd listener = listen_on(resolve("127.0.0.1:0"));
  const Address address = local_address(listener.get());
  std::atomic<bool> stop{false};
  std::thread impostor([&] {
    while (!stop) {
      pollfd entry{listener.get(), POLLIN, 0};
      if (::poll(&entry, 1, 20) <= 0) continue;
      const Fd fd(::accept(listener.get(), nullptr, nullptr));
      Hello hello;
      try {
        recv_all(fd.get(), &hello, sizeof hello, Deadline::after(1));
        answer(fd, hello);
        ::poll(nullptr, 0, 20);
      } catch (const Error&) {
      }
    }
  });
  std::string outcome = "trusted";
  try {
    connect_to(address, member(1), 0, Role::Data, Deadline::after(1));
  } catch (const HandshakeError&) {
    outcome = "refused";
  } catch (const Timeout&) {
    outcome = "timeout";
  }
  stop = true;
  impostor.join();
  return outcome;
}

std::string hex(std::span<const uint8_t> bytes) {
  std::string text;
  for (const uint8_t byte : bytes) text += format("%02x", byte);
  return text;
}

}  // namespace

TEST(hkdf_gives_the_published_answer) {  // RFC 5869, test case 1, whose input is shorter than a token
  std::vector<uint8_t> salt, info;
  for (uint8_t i = 0; i <= 0x0c; ++i) salt.push_back(i);
  for (uint8_t i = 0xf0; i <= 0xf9; ++i) info.push_back(i);
  const std::vector<uint8_t> input(22, 0x0b);
  const Secret extracted{hmac_sha256(salt, input)};
  CHECK_EQ(hex(extracted), "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5");
  CHECK_EQ(hex(hkdf_expand(extracted, info)), "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf");
  const Secret ours = token_of(0x0b);
  CHECK(hkdf_extract(salt, ours) == Secret{hmac_sha256(salt, ours)});
}

TEST(every_pair_role_direction_and_epoch_has_its_own_key) {
  std::set<std::string> keys;
  size_t made = 0;
  for (const uint32_t epoch : {1u, 2u, 258u})
    for (const Side side : {Side::Server, Side::Client})
      for (const Role role : {Role::Control, Role::Data, Role::Memory})
        for (int from = 0; from < 8; ++from)
          for (int to = 0; to < 8; ++to, ++made) keys.insert(hex(member(0, 8, epoch).proof_key(side, role, from, to)));
  keys.insert(hex(member(0, 8, 1, 2).proof_key(Side::Server, Role::Control, 0, 0)));  // another job
  CHECK_EQ(keys.size(), made + 1);
  CHECK(member(3, 8).proof_key(Side::Client, Role::Data, 2, 5) == member(6, 8).proof_key(Side::Client, Role::Data, 2, 5));
}

TEST(what_held_a_secret_is_zero_afterwards) {
  alignas(Token) unsigned char memory[sizeof(Token)];
  auto* token = new (memory) Token(token_of(7));
  token->~Token();
  for (const unsigned char byte : memory) CHECK_EQ(int{byte}, 0);
}

TEST(a_member_comes_in) {
  on_every_port([](Port&) {});
}

TEST(who_has_another_token_or_place_is_refused) {
  const auto refused = [](Port& port, const Identity& who, int peer, Role role) {
    CHECK_THROWS(connect_to(port.address, who, peer, role, Deadline::after(0.2)), HandshakeError);
  };
  on_every_port([&](Port& port) {
    refused(port, member(1, 3, 1, 2), 0, port.role);                                       // token
    refused(port, member(1, 3, 2), 0, port.role);                                          // epoch
    refused(port, member(1, 4), 0, port.role);                                             // size
    refused(port, member(1), 2, port.role);                                                // meant for another rank
    refused(port, member(0), 0, port.role);                                                // claims to be the acceptor
    refused(port, member(3), 0, port.role);                                                // no rank of this job
    refused(port, member(-1), 0, port.role);                                               //
    refused(port, member(1), 0, port.role == Role::Control ? Role::Data : Role::Control);  // role
  });
}

TEST(who_knows_the_job_but_not_the_token_is_refused) {
  on_every_port([](Port& port) {
    const Fd fd = stranger_at(port.address);
    CHECK(say(fd, make_hello(member(1), 0, port.role)));  // the job's name is no secret
    Reply reply;
    recv_all(fd.get(), &reply, sizeof reply, Deadline::after(2));
    Digest guess{};
    CHECK(say(fd, guess));
    CHECK(is_hung_up(fd));
  });
}

TEST(a_replayed_handshake_is_refused) {
  on_every_port([](Port& port) {
    const Recording tape = record(port.role);
    const Fd fd = stranger_at(port.address);
    CHECK(say(fd, tape.hello));
    Reply fresh;
    recv_all(fd.get(), &fresh, sizeof fresh, Deadline::after(2));
    CHECK(fresh.nonce != tape.reply.nonce);
    CHECK(say(fd, tape.proof));
    CHECK(is_hung_up(fd));
  });
  const Recording tape = record(Role::Data);  // and the acceptor's flight, to a connector
  CHECK_EQ(connect_to_impostor([&](const Fd& fd, const Hello&) { say(fd, tape.reply); }), "refused");
}

TEST(a_reflected_handshake_is_refused) {
  on_every_port([](Port& port) {
    {  // the acceptor's own words as the connector's proof
      const Fd fd = stranger_at(port.address);
      CHECK(say(fd, make_hello(member(1), 0, port.role)));
      Reply reply;
      recv_all(fd.get(), &reply, sizeof reply, Deadline::after(2));
      CHECK(say(fd, reply.proof));
      CHECK(is_hung_up(fd));
    }
    // the listener connected to itself: what it would say as a connector comes back to it
    CHECK_THROWS(connect_to(port.address, member(0), 1, port.role, Deadline::after(0.2)), HandshakeError);
  });
  // a connector's own words as the acceptor's proof
  CHECK_EQ(connect_to_impostor([](const Fd& fd, const Hello& hello) { ::send(fd.get(), &hello, sizeof(Reply), MSG_NOSIGNAL); }),
           "refused");
}

TEST(an_acceptor_without_the_token_is_not_trusted) {
  const auto with_token = [](uint8_t fill) {
    return [fill](const Fd& fd, const Hello& hello) {
      Reply reply;
      fill_random(reply.nonce);
      reply.proof = server_proof(member(0, 3, 1, fill), hello, reply);
      say(fd, reply);
      Digest proof;
      recv_all(fd.get(), &proof, sizeof proof, Deadline::after(1));
      say(fd, kAdmitted);
    };
  };
  CHECK_EQ(connect_to_impostor(with_token(2)), "refused");
  CHECK_EQ(connect_to_impostor(with_token(1)), "trusted");
  CHECK_EQ(connect_to_impostor([](const Fd&, const Hello&) {}), "refused");  // hangs up
  CHECK_EQ(connect_to_impostor([](const Fd&, const Hello&) { ::poll(nullptr, 0, 1500); }), "timeout");
}

TEST(garbage_is_dropped_without_an_answer) {
  on_every_port([](Port& port) {
    for (const std::string_view text :
         {"GET / HTTP/1.1\r\nHost: roundel\r\nUser-Agent: a browser that is lost, and talks more than a hello has "
          "bytes\r\n\r\n",
          "\x16\x03\x01\x02\x01\x01\x01\x01\xfc\x03\x03 and whatever else a TLS client says, at length, "
          "so that it is longer than a hello"}) {
      const Fd fd = stranger_at(port.address);
      ::send(fd.get(), text.data(), text.size(), MSG_NOSIGNAL);
      CHECK(is_hung_up(fd));
    }
    const Fd much = stranger_at(port.address);
    std::vector<uint8_t> noise(1 << 20);
    fill_random(noise);
    ::send(much.get(), noise.data(), noise.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    CHECK(is_hung_up(much));
  });
}

TEST(only_the_bytes_of_a_handshake_are_read) {
  int pair[2];
  CHECK_EQ(::socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
  const Fd theirs(pair[0]);
  Stranger stranger;
  stranger.fd = Fd(pair[1]);
  std::vector<uint8_t> words(4096);
  const Hello hello = make_hello(member(1), 0, Role::Data);
  std::memcpy(words.data(), &hello, sizeof hello);
  ::send(theirs.get(), words.data(), words.size(), 0);
  CHECK(stranger.advance(member(0), Role::Data) == Stranger::Fate::Dropped);
  CHECK_EQ(stranger.got, sizeof(Hello) + sizeof(Digest));
  ssize_t left = ::recv(stranger.fd.get(), words.data(), words.size(), MSG_DONTWAIT);
  CHECK_EQ(left, static_cast<ssize_t>(4096 - sizeof(Hello) - sizeof(Digest)));
}

TEST(silent_half_open_and_slow_strangers_delay_nobody) {
  on_every_port([](Port& port) {
    const Fd silent = stranger_at(port.address);
    const Fd half = stranger_at(port.address);
    ::shutdown(half.get(), SHUT_WR);
    CHECK(is_hung_up(half));
    const Fd slow = stranger_at(port.address);
    const Hello hello = make_hello(member(1), 0, port.role);
    ::send(slow.get(), &hello, 1, MSG_NOSIGNAL);
    CHECK(port.admits_rank_1() < 1);
  });
}

TEST(a_byte_per_second_ends_after_five_seconds) {
  Port port(Role::Control, {1}, 8);
  const auto start = Clock::now();
  const Fd slow = stranger_at(port.address);
  const Hello hello = make_hello(member(1), 0, Role::Control);
  double seconds = 0;
  for (size_t i = 0; seconds < 7; ++i) {
    ::send(slow.get(), reinterpret_cast<const char*>(&hello) + i, 1, MSG_NOSIGNAL);
    const bool ended = is_hung_up(slow, 1);
    seconds = std::chrono::duration<double>(Clock::now() - start).count();
    if (ended) break;
  }
  CHECK(seconds > 4.5 && seconds < 6.5);
  port.admits_rank_1();
}

TEST(more_strangers_than_places_do_not_keep_a_member_out) {
  on_every_port([](Port& port) {
    std::vector<Fd> crowd;
    for (int i = 0; i < 100; ++i) crowd.push_back(stranger_at(port.address));
    CHECK(is_hung_up(crowd.front()));  // the first had to make room
    CHECK(port.admits_rank_1() < 1);
  });
}

TEST(strangers_who_know_the_jobs_name_do_not_crowd_out_a_member_for_long) {
  Port port(Role::Data);
  std::vector<Fd> crowd;
  for (int i = 0; i < 80; ++i) {
    crowd.push_back(stranger_at(port.address));
    say(crowd.back(), make_hello(member(2), 0, Role::Data));
  }
  CHECK(port.admits_rank_1() < 3);  // they have a second each
}

TEST(a_hundred_members_that_come_at_once_are_all_admitted) {
  constexpr int kMembers = 100;
  for (const Role role : {Role::Control, Role::Memory}) {
    const Fd listener = role == Role::Memory ? listen_on(unix_address(member(0, 101), 0)) : listen_on(resolve("127.0.0.1:0"));
    const Address address = role == Role::Memory ? unix_address(member(0, 101), 0) : local_address(listener.get());
    std::vector<int> ranks;
    std::vector<Fd> garbage, sockets(kMembers);
    std::atomic<int> failed{0};
    std::vector<std::thread> members;
    for (int i = 0; i < 40; ++i) {
      garbage.push_back(stranger_at(address));
      if (i % 2 == 0) say(garbage.back(), make_hello(member(1, 101), 0, role));  // and then nothing
    }
    for (int rank = 1; rank <= kMembers; ++rank) {
      ranks.push_back(rank);
      members.emplace_back([&, rank] {
        try {
          sockets[static_cast<size_t>(rank - 1)] = connect_to(address, member(rank, 101), 0, role, Deadline::after(20));
        } catch (const Error&) {
          ++failed;
        }
      });
    }
    std::map<int, Fd> admitted = accept_all(listener.get(), member(0, 101), role, ranks, Deadline::after(20));
    for (std::thread& thread : members) thread.join();
    CHECK_EQ(failed.load(), 0);
    CHECK_EQ(admitted.size(), size_t{kMembers});
    for (auto& [rank, fd] : admitted) {  // whoever believes to be in is
      char heard = 0;
      CHECK(say(fd, static_cast<char>(rank)));
      recv_all(sockets[static_cast<size_t>(rank - 1)].get(), &heard, 1, Deadline::after(1));
      CHECK_EQ(heard, static_cast<char>(rank));
    }
  }
}

TEST(a_connection_that_met_itself_is_none) {
  // The kernel does this when it happens to choose the port that it connects to; here it is told to.
  const Fd probe = listen_on(resolve("127.0.0.1:0"));
  const Address address = local_address(probe.get());
  Fd self(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const int on = 1;
  ::setsockopt(self.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  const Address free_port = with_port(address, 0);
  CHECK_EQ(::bind(self.get(), reinterpret_cast<const sockaddr*>(&free_port.storage), free_port.length), 0);
  const Address own = local_address(self.get());
  CHECK(!is_connected_to_itself(probe.get()));
  CHECK_EQ(::connect(self.get(), reinterpret_cast<const sockaddr*>(&own.storage), own.length), 0);
  CHECK(is_connected_to_itself(self.get()));
}

TEST(without_descriptors_an_acceptor_waits_and_says_why) {
  const Fd listener = listen_on(resolve("127.0.0.1:0"));
  const Fd waiting = stranger_at(local_address(listener.get()));
  rlimit limit{};
  CHECK_EQ(::getrlimit(RLIMIT_NOFILE, &limit), 0);
  const rlimit low{3, limit.rlim_max};
  CHECK_EQ(::setrlimit(RLIMIT_NOFILE, &low), 0);
  std::string obstacle;
  const std::clock_t before = std::clock();
  const auto admitted = accept_all(listener.get(), member(0), Role::Data, {1}, Deadline::after(0.3), &obstacle);
  CHECK(std::clock() - before < CLOCKS_PER_SEC / 10);
  CHECK_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
  CHECK_EQ(obstacle, "; accept: Too many open files");
}

TEST(members_are_let_in_while_garbage_rains) {
  for (const Role role : {Role::Control, Role::Memory}) {
    Port port(role, {1, 2});
    std::atomic<bool> stop{false};
    std::atomic<int> sent{0};
    std::thread rain([&] {
      std::vector<uint8_t> noise(200);
      while (!stop) {
        Fd fd(::socket(port.address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
        if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&port.address.storage), port.address.length) != 0 &&
            errno != EINPROGRESS)
          continue;
        fill_random(noise);
        ::send(fd.get(), noise.data(), noise.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
        ++sent;
      }
    });
    while (sent < 200) std::this_thread::yield();
    const Fd first = connect_to(port.address, member(1), 0, role, Deadline::after(5));
    const Fd second = connect_to(port.address, member(2), 0, role, Deadline::after(5));
    port.finish();
    stop = true;
    rain.join();
    CHECK_EQ(port.admitted.size(), 2u);
  }
}

TEST(a_rank_that_is_there_already_is_not_replaced) {
  Port port(Role::Control, {1, 2});
  const Fd first = connect_to(port.address, member(1), 0, Role::Control, Deadline::after(2));
  CHECK_THROWS(connect_to(port.address, member(1), 0, Role::Control, Deadline::after(0.2)), HandshakeError);
  const Fd other = connect_to(port.address, member(2), 0, Role::Control, Deadline::after(2));
  port.finish();
  CHECK_EQ(port.admitted.size(), 2u);
  CHECK(say(first, 'w'));
  char heard = 0;
  recv_all(port.admitted[1].get(), &heard, 1, Deadline::after(1));
  CHECK_EQ(heard, 'w');
}

// -- after the handshake

namespace {

// What SharedMemory makes of a peer (a member!) that hands over `memory` and `extra` descriptors.
std::string refuses_memory(int memory, int extra = 1) {
  std::string said;
  std::thread victim([&] {
    try {
      SharedMemory shared(member(0, 2), {0, 1});
      shared.meet(member(0, 2), Deadline::after(3));
      said = "accepted";
    } catch (const Error& error) {
      said = error.what();
    }
  });
  {
    const Fd fd = connect_to(unix_address(member(0, 2), 0), member(1, 2), 0, Role::Memory, Deadline::after(3));
    std::vector<int> fds{memory};
    for (int i = 0; i < extra; ++i) fds.push_back(memory);
    char byte = 'm';
    iovec payload{&byte, 1};
    alignas(cmsghdr) char control[CMSG_SPACE(8 * sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &payload;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
    cmsghdr* rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(rights), fds.data(), fds.size() * sizeof(int));
    CHECK_EQ(::sendmsg(fd.get(), &message, MSG_NOSIGNAL), 1);
    victim.join();
  }
  return said;
}

Fd memory_of(size_t bytes, int seals) {
  Fd fd(::memfd_create("peer", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  CHECK_EQ(::ftruncate(fd.get(), static_cast<off_t>(bytes)), 0);
  if (seals != 0) CHECK_EQ(::fcntl(fd.get(), F_ADD_SEALS, seals), 0);
  return fd;
}

int open_descriptors() {
  int count = 0;
  for (int fd = 0; fd < 256; ++fd) count += ::fcntl(fd, F_GETFD) >= 0;
  return count;
}

bool contains(const std::string& text, const char* what) { return text.find(what) != std::string::npos; }

}  // namespace

TEST(a_peers_memory_must_be_sealed_large_enough_and_laid_out_alike) {
  constexpr size_t kEnough = 64u << 20;
  const int before = open_descriptors();
  CHECK(contains(refuses_memory(memory_of(kEnough, 0).get()), "not sealed"));
  CHECK(contains(refuses_memory(memory_of(kEnough, F_SEAL_GROW).get()), "not sealed"));
  CHECK(contains(refuses_memory(memory_of(4096, F_SEAL_SHRINK | F_SEAL_GROW).get()), "too small"));
  CHECK(contains(refuses_memory(memory_of(kEnough, F_SEAL_SHRINK | F_SEAL_GROW).get()), "another layout"));
  const Fd no_memory(::open("/dev/null", O_RDWR | O_CLOEXEC));
  CHECK(contains(refuses_memory(no_memory.get()), "not sealed"));
  const Fd sealed = memory_of(kEnough, F_SEAL_SHRINK | F_SEAL_GROW);
  CHECK(contains(refuses_memory(sealed.get(), 0), "something else"));  // one descriptor, and three
  CHECK(contains(refuses_memory(sealed.get(), 2), "something else"));
  CHECK_EQ(open_descriptors(), before + 2);
}

TEST(a_card_with_lies_is_refused) {
  Card good;
  good.address_length = sizeof(sockaddr_in);
  reinterpret_cast<sockaddr_in*>(&good.address)->sin_family = AF_INET;
  std::strcpy(good.settings, "all alike");
  CHECK_EQ(refusal(good, good), "");
  CHECK_EQ(read_cards({good, good}).at(1).host, 0);
  for (const uint32_t length : {0u, 15u, 17u, 28u, 128u, 129u, ~0u}) {
    Card card = good;
    card.address_length = length;
    CHECK(contains(refusal(card, good), "address"));
    CHECK_THROWS(read_cards({good, card}), Error);
  }
  Card card = good;
  card.address.ss_family = AF_UNIX;
  CHECK_THROWS(read_cards({card}), Error);
  card = good;
  std::memset(card.settings, 'x', sizeof card.settings);  // no zero at the end
  CHECK_EQ(card.settings_text().size(), sizeof card.settings);
  CHECK(contains(refusal(card, good), "where rank 0 has 'all alike'"));
}

TEST(a_verdict_that_nobody_knows_is_no_acceptance) {
  const Member self{0, 3, 1};
  Verdict verdict;
  verdict.raise_unless_accepted(self);
  std::memset(verdict.text, 'y', sizeof verdict.text);
  for (const uint32_t outcome : {1u, 2u, 3u, 4u, 0xffffffffu}) {
    verdict.outcome = static_cast<Verdict::Outcome>(outcome);
    CHECK_THROWS(verdict.raise_unless_accepted(self), Error);
  }
  verdict.outcome = Verdict::Lost;
  verdict.lost = 2;
  CHECK_THROWS(verdict.raise_unless_accepted(self), PeerLost);
  for (const int nobody : {-1, 3}) {
    verdict.lost = nobody;
    try {
      verdict.raise_unless_accepted(self);
      CHECK(false);
    } catch (const Error& error) {
      CHECK(error.kind() == ErrorKind::Generic);
    }
  }
}

TEST(without_descriptors_the_memory_of_peers_is_missed_and_the_text_says_why) {
  rlimit limit{};
  CHECK_EQ(::getrlimit(RLIMIT_NOFILE, &limit), 0);
  const Fd next(::dup(0));  // descriptors below this number are in use
  std::string said;
  for (rlim_t more = 1; more < 12; ++more) {  // enough for what is made first, and not for the peer
    std::thread peer([] {
      try {
        connect_to(unix_address(member(0, 2), 0), member(1, 2), 0, Role::Memory, Deadline::after(0.3));
      } catch (const Error&) {
      }
    });
    const rlimit low{static_cast<rlim_t>(next.get()) + more, limit.rlim_max};
    CHECK_EQ(::setrlimit(RLIMIT_NOFILE, &low), 0);
    try {
      SharedMemory memory(member(0, 2), {0, 1});
      memory.meet(member(0, 2), Deadline::after(0.2));
    } catch (const Error& error) {
      said += error.what() + std::string("\n");
    }
    CHECK_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
    peer.join();
  }
  CHECK(contains(said, "no shared memory from rank 1 in time; accept: Too many open files"));
}
