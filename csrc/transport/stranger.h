// The handshake's messages and its two sides, one connection each. Internal to transport/handshake and its tests.
#pragma once

#include "transport/handshake.h"

namespace roundel::transport {

inline constexpr double kStrangerSeconds = 5;
inline constexpr char kAdmitted = 'A';  // the acceptor's last word

struct Hello {
  char magic[8] = {'R', 'O', 'U', 'N', 'D', 'E', 'L', '3'};
  std::array<uint8_t, 16> job{};
  uint32_t role = 0;
  uint32_t epoch = 0;
  int32_t from = 0;
  int32_t to = 0;
  uint32_t size = 0;
  uint32_t reserved = 0;
  std::array<uint8_t, 32> nonce{};
};
static_assert(sizeof(Hello) == 80);

struct Reply {
  std::array<uint8_t, 32> nonce{};
  Digest proof{};
};

Hello make_hello(const Identity& self, int peer, Role role);
Digest server_proof(const Identity& self, const Hello& hello, const Reply& reply);
Digest client_proof(const Identity& self, const Hello& hello, const Reply& reply);

// The acceptor's side: a connection that has not proved anything yet.
struct Stranger {
  enum class Fate { Pending, Dropped, Admitted };

  // Reads what is there. Only the bytes that the handshake needs are ever taken from the socket.
  Fate advance(const Identity& self, Role role);
  // Tells it that it was let in. False when it has gone meanwhile.
  bool welcome() const;
  bool said_hello() const { return got >= sizeof hello; }

  Fd fd;
  Deadline deadline = Deadline::after(kStrangerSeconds);
  Clock::time_point since = Clock::now();  // accepted, or answered
  Hello hello;
  Reply reply;
  Digest proof{};
  size_t got = 0;  // bytes of hello, then of proof

 private:
  bool answer(const Identity& self, Role role);
};

// A connection to a port of this host where nobody listens may meet itself: the kernel chose that very port for this end.
bool is_connected_to_itself(int fd);

// The connector's side, on a connected socket, until it is let in. Throws HandshakeError when the other end cannot prove that
// it knows the token, Timeout, or a plain Error when it hangs up. `address`: for error texts.
void prove_to(int fd, const Address& address, const Identity& self, int peer, Role role, const Patience& patience);

}  // namespace roundel::transport
