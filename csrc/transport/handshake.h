// The mutual handshake. Every connection, loopback and unix sockets too, runs it before anything else is parsed.
//
//   connector                                  acceptor
//   hello: magic, role, epoch, ranks, nonce -> checks magic, job, epoch, role, ranks
//                                           <- nonce, HMAC(server key, hello + nonce)
//   checks it; HMAC(client key, all above)  -> checks it
//   comes in                                <- 'A': admitted
//
// Keys derive (HKDF) from the 32-byte job token, one for each pair, role, epoch and direction, so nothing can be reflected or
// moved to another connection; nonces are fresh, so nothing can be replayed. An acceptor reads at most 112 bytes, for at most 5
// seconds, from at most 64 strangers at a time; more wait in the kernel's queue. When all places are taken, who has been silent
// for 100 ms makes room, or who has not gone on within a second of a good hello. Who is hung up on without being told why comes
// again: a member that was taken for a stranger loses time only.
#pragma once

#include <sys/socket.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/fd.h"
#include "base/sha256.h"
#include "transport/patience.h"

namespace roundel::transport {

using Token = Secret;

enum class Role : uint8_t { Control = 1, Data = 2, Memory = 3 };

// Who we are in a job. What outlives the start keeps this part only.
struct Member {
  int rank;
  int size;
  uint32_t epoch;
};

enum class Side : uint8_t { Server = 1, Client = 2 };

// A member with what it needs to prove itself. The token itself is not stored.
struct Identity : Member {
  Identity(const Token& token, int rank, int size, uint32_t epoch);
  // With which one side of one connection proves itself.
  Secret proof_key(Side side, Role role, int connector, int acceptor) const;

  std::array<uint8_t, 16> job;  // names the job without revealing the token
  // From which the tokens of groups derive: the one secret that a world keeps.
  Secret group_key() const;
  Secret extracted;  // HKDF's
};

// Of the group `color` that the `number`-th split makes: known to all ranks of the job and to nobody else.
Token token_of_group(const Secret& group_key, uint64_t number, int64_t color);

struct Address {
  sockaddr_storage storage{};
  socklen_t length = 0;
  std::string text;  // "10.0.0.1:4000"
};

// An abstract unix address, seen only inside this network namespace and gone with the last descriptor.
Address unix_address(const Identity& identity, int rank);
// Resolves "host:port". Throws Error.
Address resolve(const std::string& host_and_port);
Address local_address(int fd);
// The same interface with another port (0: any).
Address with_port(Address address, uint16_t port);
uint16_t port_of(const Address& address);

// Bound and listening, non-blocking, close-on-exec.
Fd listen_on(const Address& address);

// Connects and authenticates as a connector, trying again until the deadline while nobody listens there yet, and for two
// seconds when the other end hangs up: strangers may have crowded this one out. Throws Timeout, or HandshakeError when the
// other end refuses or cannot prove that it knows the token.
Fd connect_to(const Address& address, const Identity& self, int peer, Role role, const Patience& patience);

// Accepts and authenticates until every rank of `expected` is there or the deadline passes; returns who came.
// Strangers, other jobs and other epochs are dropped without an answer; so are other users at a unix socket.
// When this process or host ran out of descriptors, `obstacle` says so at the end: "; accept: Too many open files".
std::map<int, Fd> accept_all(int listen_fd, const Identity& self, Role role, const std::vector<int>& expected,
                             const Patience& patience, std::string* obstacle = nullptr);
// The same with `each` connections from every rank, which `admit` gets one by one as they come. Returns the obstacle.
std::string accept_each(int listen_fd, const Identity& self, Role role, const std::vector<int>& expected, size_t each,
                        const Patience& patience, const std::function<void(int rank, Fd connection)>& admit);

// Whole-buffer transfers with a deadline on a connection that is set up already; throw Timeout, or PeerGone's text as Error.
void send_all(int fd, const void* data, size_t bytes, const Patience& patience);
void recv_all(int fd, void* data, size_t bytes, const Patience& patience);
// Whether the other end has closed, or its process has ended, and nothing is left to read.
bool has_ended(int fd);

}  // namespace roundel::transport
