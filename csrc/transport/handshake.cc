#include "transport/handshake.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <list>
#include <optional>

#include "base/error.h"
#include "base/failpoint.h"
#include "transport/stranger.h"

namespace roundel::transport {
namespace {

constexpr size_t kMaxStrangers = 64;
constexpr size_t kAcceptsPerRound = 16;
constexpr double kConnectSeconds = 2;   // for one try
constexpr double kSilentSeconds = 0.1;  // when places are short: of one that has said nothing
constexpr double kAnswerSeconds = 1;    // and of one that has said a good hello
constexpr double kRefusedSeconds = 2;   // that a connector comes again when it is hung up on

template <class T>
std::span<const uint8_t> bytes_of(const T& value) {
  return {reinterpret_cast<const uint8_t*>(&value), sizeof value};
}

// False when the deadline has passed.
bool is_ready(int fd, short events, const Patience& patience) {
  pollfd entry{fd, events, 0};
  while (::poll(&entry, 1, patience.deadline.milliseconds_left(100)) <= 0) {
    patience.check();
    if (patience.deadline.passed()) return false;
  }
  return true;
}

// One try: a connected socket, or none with errno set when nobody listens there.
Fd try_connect(const Address& address, const Patience& patience) {
  Fd fd(::socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) throw system_error("socket", errno);
  const auto* to = reinterpret_cast<const sockaddr*>(&address.storage);
  if (::connect(fd.get(), to, address.length) != 0) {
    if (errno != EINPROGRESS) return {};
  } else if (address.storage.ss_family == AF_UNIX) {
    return fd;
  }
  const Deadline answer = Deadline::after(std::min(kConnectSeconds, patience.deadline.seconds_left()));
  if (!is_ready(fd.get(), POLLOUT, {answer, patience.look})) {
    errno = ETIMEDOUT;
    return {};
  }
  int error = 0;
  socklen_t length = sizeof error;
  ::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &length);
  if (error == 0 && is_connected_to_itself(fd.get())) error = ECONNREFUSED;
  errno = error;
  return error == 0 ? std::move(fd) : Fd{};
}

std::string text_of(const sockaddr_storage& storage, socklen_t length) {
  char host[NI_MAXHOST], port[NI_MAXSERV];
  if (::getnameinfo(reinterpret_cast<const sockaddr*>(&storage), length, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV) != 0)
    return "?";
  return storage.ss_family == AF_INET6 ? format("[%s]:%s", host, port) : format("%s:%s", host, port);
}

bool is_same_user(int unix_socket) {
  ucred peer{};
  socklen_t length = sizeof peer;
  return ::getsockopt(unix_socket, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0 && peer.uid == ::geteuid();
}

// Makes room for a round where there is none, by those who had time enough before `now`. All that came before then was read.
void evict(std::list<Stranger>& strangers, Clock::time_point now) {
  size_t gone = 0;
  for (const bool said_hello : {false, true})
    for (auto it = strangers.begin(); it != strangers.end() && gone < kAcceptsPerRound;) {
      const bool late = now - it->since > std::chrono::duration<double>(it->said_hello() ? kAnswerSeconds : kSilentSeconds);
      if (late && it->said_hello() == said_hello) {
        it = strangers.erase(it);
        ++gone;
      } else {
        ++it;
      }
    }
}

// Throws Error when the other end hangs up, which it does for many reasons, and Timeout.
void say_hello(int fd, const Hello& hello, Reply& reply, const Patience& patience) {
  send_all(fd, &hello, sizeof hello, patience);
  failpoint::pass(failpoint::Point::StartHello);
  recv_all(fd, &reply, sizeof reply, patience);
}

Fd connect_until(const Address& address, const Identity& self, int peer, const Patience& patience) {
  Fd fd = try_connect(address, patience);
  while (!fd) {
    const int error = errno;
    if (patience.deadline.passed())
      throw Timeout(
          format("rank %d: rank %d does not answer at %s: %s", self.rank, peer, address.text.c_str(), std::strerror(error)));
    patience.check();
    ::poll(nullptr, 0, patience.deadline.milliseconds_left(20));
    fd = try_connect(address, patience);
  }
  const int on = 1;
  if (address.storage.ss_family != AF_UNIX) ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  return fd;
}

}  // namespace

Identity::Identity(const Token& token, int rank, int size, uint32_t epoch) : Member{rank, size, epoch}, job() {
  const auto text = [](const char* t) { return std::span(reinterpret_cast<const uint8_t*>(t), std::strlen(t)); };
  const Digest id = hmac_sha256(token, text("roundel job"));
  std::copy_n(id.begin(), job.size(), job.begin());
  extracted = hkdf_extract(text("roundel handshake 2"), token);
}

Secret Identity::proof_key(Side side, Role role, int connector, int acceptor) const {
  struct Info {
    char purpose[6] = {'p', 'r', 'o', 'v', 'e', ' '};
    Side side;
    Role role;
    uint32_t epoch;
    int32_t connector, acceptor;
  } const info{.side = side, .role = role, .epoch = epoch, .connector = connector, .acceptor = acceptor};
  static_assert(sizeof info == 20);  // no padding
  return hkdf_expand(extracted, bytes_of(info));
}

bool is_connected_to_itself(int fd) {
  sockaddr_storage ours{}, theirs{};
  socklen_t our_length = sizeof ours, their_length = sizeof theirs;
  return ::getsockname(fd, reinterpret_cast<sockaddr*>(&ours), &our_length) == 0 &&
         ::getpeername(fd, reinterpret_cast<sockaddr*>(&theirs), &their_length) == 0 && our_length == their_length &&
         std::memcmp(&ours, &theirs, our_length) == 0;
}

Hello make_hello(const Identity& self, int peer, Role role) {
  Hello hello;
  hello.job = self.job;
  hello.role = static_cast<uint32_t>(role);
  hello.epoch = self.epoch;
  hello.from = self.rank;
  hello.to = peer;
  hello.size = static_cast<uint32_t>(self.size);
  fill_random(hello.nonce);
  return hello;
}

Digest server_proof(const Identity& self, const Hello& hello, const Reply& reply) {
  std::vector<uint8_t> said(bytes_of(hello).begin(), bytes_of(hello).end());
  said.insert(said.end(), reply.nonce.begin(), reply.nonce.end());
  return hmac_sha256(self.proof_key(Side::Server, static_cast<Role>(hello.role), hello.from, hello.to), said);
}

Digest client_proof(const Identity& self, const Hello& hello, const Reply& reply) {
  std::vector<uint8_t> said(bytes_of(hello).begin(), bytes_of(hello).end());
  said.insert(said.end(), bytes_of(reply).begin(), bytes_of(reply).end());
  return hmac_sha256(self.proof_key(Side::Client, static_cast<Role>(hello.role), hello.from, hello.to), said);
}

Stranger::Fate Stranger::advance(const Identity& self, Role role) {
  for (;;) {
    const bool in_hello = !said_hello();
    char* into = in_hello ? reinterpret_cast<char*>(&hello) + got : reinterpret_cast<char*>(&proof) + (got - sizeof hello);
    const size_t want = in_hello ? sizeof hello - got : sizeof hello + sizeof proof - got;
    const ssize_t n = ::recv(fd.get(), into, want, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return Fate::Pending;
    if (n <= 0) return Fate::Dropped;
    got += static_cast<size_t>(n);
    if (in_hello && said_hello() && !answer(self, role)) return Fate::Dropped;
    if (got == sizeof hello + sizeof proof)
      return equal_in_constant_time(proof, client_proof(self, hello, reply)) ? Fate::Admitted : Fate::Dropped;
  }
}

bool Stranger::answer(const Identity& self, Role role) {
  const Hello expected;
  if (std::memcmp(hello.magic, expected.magic, sizeof hello.magic) != 0 || hello.job != self.job ||
      hello.role != static_cast<uint32_t>(role) || hello.epoch != self.epoch || hello.to != self.rank ||
      hello.size != static_cast<uint32_t>(self.size) || hello.from < 0 || hello.from >= self.size || hello.from == self.rank)
    return false;
  fill_random(reply.nonce);
  reply.proof = server_proof(self, hello, reply);
  since = Clock::now();
  return ::send(fd.get(), &reply, sizeof reply, MSG_NOSIGNAL | MSG_DONTWAIT) == static_cast<ssize_t>(sizeof reply);
}

bool Stranger::welcome() const { return ::send(fd.get(), &kAdmitted, 1, MSG_NOSIGNAL | MSG_DONTWAIT) == 1; }

Secret Identity::group_key() const {
  static constexpr char purpose[] = "groups";
  return hkdf_expand(extracted, {reinterpret_cast<const uint8_t*>(purpose), sizeof purpose - 1});
}

Token token_of_group(const Secret& group_key, uint64_t number, int64_t color) {
  const std::string purpose =
      format("split %llu, color %lld", static_cast<unsigned long long>(number), static_cast<long long>(color));
  return hkdf_expand(group_key, {reinterpret_cast<const uint8_t*>(purpose.data()), purpose.size()});
}

Address unix_address(const Identity& identity, int rank) {
  std::string name(1, '\0');  // abstract: no file to leave behind
  name += "roundel-";
  for (const uint8_t byte : identity.job) name += format("%02x", byte);
  name += format("-%u-%d", identity.epoch, rank);
  Address address;
  auto* un = reinterpret_cast<sockaddr_un*>(&address.storage);
  un->sun_family = AF_UNIX;
  std::memcpy(un->sun_path, name.data(), name.size());
  address.length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name.size());
  address.text = "unix socket of rank " + std::to_string(rank);
  return address;
}

Address resolve(const std::string& host_and_port) {
  const size_t colon = host_and_port.rfind(':');
  if (colon == std::string::npos || colon == 0 || colon + 1 == host_and_port.size())
    throw InvalidArgument("rendezvous: expected host:port, got '" + host_and_port + "'");
  std::string host = host_and_port.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int error = ::getaddrinfo(host.c_str(), host_and_port.c_str() + colon + 1, &hints, &found);
  if (error != 0) throw Error("rendezvous address '" + host_and_port + "': " + ::gai_strerror(error));
  Address address;
  std::memcpy(&address.storage, found->ai_addr, found->ai_addrlen);
  address.length = found->ai_addrlen;
  ::freeaddrinfo(found);
  address.text = text_of(address.storage, address.length);
  return address;
}

Address local_address(int fd) {
  Address address;
  address.length = sizeof address.storage;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&address.storage), &address.length) != 0)
    throw system_error("getsockname", errno);
  address.text = text_of(address.storage, address.length);
  return address;
}

Address with_port(Address address, uint16_t port) {
  if (address.storage.ss_family == AF_INET6)
    reinterpret_cast<sockaddr_in6*>(&address.storage)->sin6_port = htons(port);
  else
    reinterpret_cast<sockaddr_in*>(&address.storage)->sin_port = htons(port);
  address.text = text_of(address.storage, address.length);
  return address;
}

uint16_t port_of(const Address& address) {
  return ntohs(reinterpret_cast<const sockaddr_in*>(&address.storage)->sin_port);  // at the same place in sockaddr_in6
}

Fd listen_on(const Address& address) {
  Fd fd(::socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) throw system_error("socket", errno);
  const int on = 1;
  if (address.storage.ss_family != AF_UNIX) ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address.storage), address.length) != 0)
    throw system_error("bind " + address.text, errno);
  if (::listen(fd.get(), SOMAXCONN) != 0) throw system_error("listen on " + address.text, errno);
  return fd;
}

void send_all(int fd, const void* data, size_t bytes, const Patience& patience) {
  const char* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::send(fd, p, bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) {
      p += n;
      bytes -= static_cast<size_t>(n);
    } else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      if (!is_ready(fd, POLLOUT, patience)) throw Timeout("timed out while sending");
    } else if (n == 0 || errno != EINTR) {
      throw Error("the other end closed the connection");
    }
  }
}

void recv_all(int fd, void* data, size_t bytes, const Patience& patience) {
  char* p = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::recv(fd, p, bytes, MSG_DONTWAIT);
    if (n > 0) {
      p += n;
      bytes -= static_cast<size_t>(n);
    } else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      if (!is_ready(fd, POLLIN, patience)) throw Timeout("timed out while receiving");
    } else if (n == 0 || errno != EINTR) {
      throw Error("the other end closed the connection");
    }
  }
}

bool has_ended(int fd) {
  char next;
  ssize_t n;
  do n = ::recv(fd, &next, 1, MSG_PEEK | MSG_DONTWAIT);
  while (n < 0 && errno == EINTR);
  return n == 0 || (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK);
}

void prove_to(int fd, const Address& address, const Identity& self, int peer, Role role, const Patience& patience) {
  const Hello hello = make_hello(self, peer, role);
  Reply reply;
  char word = 0;
  try {
    say_hello(fd, hello, reply, patience);
    if (!equal_in_constant_time(reply.proof, server_proof(self, hello, reply)))
      throw HandshakeError(
          format("rank %d: whoever answers at %s does not know the job token", self.rank, address.text.c_str()));
    const Digest proof = client_proof(self, hello, reply);
    send_all(fd, proof.data(), proof.size(), patience);
    recv_all(fd, &word, 1, patience);
  } catch (const Timeout&) {
    throw Timeout(format("rank %d: rank %d at %s did not answer the handshake in time", self.rank, peer, address.text.c_str()));
  }
  if (word != kAdmitted) throw Error("the other end says something else");
}

Fd connect_to(const Address& address, const Identity& self, int peer, Role role, const Patience& patience) {
  std::optional<Deadline> refused;  // until when to try again, once hung up on
  for (int attempt = 1;; ++attempt) {
    try {
      const Patience rest{refused.value_or(patience.deadline), patience.look};
      Fd fd = connect_until(address, self, peer, rest);
      prove_to(fd.get(), address, self, peer, role, rest);
      return fd;
    } catch (const Error& error) {
      patience.check();  // what ended the wait may have been its word
      const bool too_late = error.kind() == ErrorKind::Timeout && refused;
      if (error.kind() != ErrorKind::Generic && !too_late) throw;  // not hung up on
    }
    if (!refused) refused = Deadline::after(std::min(kRefusedSeconds, patience.deadline.seconds_left()));
    const int pause = std::min(20 * attempt, 200);
    if (refused->seconds_left() * 1000 <= pause)
      throw HandshakeError(
          format("rank %d: rank %d at %s refused the connection: it belongs to another job, has another token, "
                 "number of ranks or epoch, or two processes claim rank %d",
                 self.rank, peer, address.text.c_str(), self.rank));
    ::poll(nullptr, 0, pause);
  }
}

std::map<int, Fd> accept_all(int listen_fd, const Identity& self, Role role, const std::vector<int>& expected,
                             const Patience& patience, std::string* obstacle) {
  std::map<int, Fd> one_each;
  const std::string why =
      accept_each(listen_fd, self, role, expected, 1, patience, [&](int rank, Fd fd) { one_each[rank] = std::move(fd); });
  if (obstacle != nullptr) *obstacle = why;
  return one_each;
}

std::string accept_each(int listen_fd, const Identity& self, Role role, const std::vector<int>& expected, size_t each,
                        const Patience& patience, const std::function<void(int rank, Fd connection)>& admit) {
  std::map<int, size_t> owed;  // connections still to come, by rank
  for (const int rank : expected) owed[rank] = each;
  std::list<Stranger> strangers;
  int shortage = 0;  // errno of the last accept() that failed for want of descriptors or memory
  while (!owed.empty() && !patience.deadline.passed()) {
    // The listener only where there is room: who waits behind it would wake us all the time.
    const bool has_room = strangers.size() < kMaxStrangers && shortage == 0;
    std::vector<pollfd> entries{{has_room ? listen_fd : -1, POLLIN, 0}};
    for (const Stranger& stranger : strangers) entries.push_back({stranger.fd.get(), POLLIN, 0});
    patience.check();
    ::poll(entries.data(), entries.size(), patience.deadline.milliseconds_left(has_room ? 100 : 10));
    const Clock::time_point now = Clock::now();
    for (auto it = strangers.begin(); it != strangers.end();) {
      auto fate = it->advance(self, role);
      if (fate == Stranger::Fate::Pending && it->deadline.passed()) fate = Stranger::Fate::Dropped;
      if (fate == Stranger::Fate::Admitted && owed.contains(it->hello.from) && it->welcome()) {
        if (--owed[it->hello.from] == 0) owed.erase(it->hello.from);
        admit(it->hello.from, std::move(it->fd));
      }
      it = fate == Stranger::Fate::Pending ? std::next(it) : strangers.erase(it);
    }
    if (strangers.size() >= kMaxStrangers || shortage != 0) evict(strangers, now);
    shortage = 0;
    for (size_t room = std::min(kAcceptsPerRound, kMaxStrangers - strangers.size()); room > 0; --room) {
      Fd fd(::accept4(listen_fd, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
      if (!fd) {
        if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) shortage = errno;
        break;
      }
      if (role == Role::Memory && !is_same_user(fd.get())) continue;
      const int on = 1;
      if (role != Role::Memory) ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
      strangers.emplace_back();
      strangers.back().fd = std::move(fd);
    }
  }
  return shortage != 0 ? format("; accept: %s", std::strerror(shortage)) : "";
}

}  // namespace roundel::transport
