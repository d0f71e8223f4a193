// What a stranger may say to an acceptor, and an impostor to a connector. No input may be let in. The first byte chooses the
// side and, for the acceptor, whether the hello is made good, so that what follows is looked at.
#include <sys/socket.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "transport/stranger.h"

using namespace roundel;
using namespace roundel::transport;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  static const Identity rank0(Token{}, 0, 2, 1), rank1(Token{}, 1, 2, 1);
  std::vector<uint8_t> words(data + 1, data + size);
  int pair[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) != 0) std::abort();
  const Fd theirs(pair[0]);
  Fd ours(pair[1]);
  const auto say = [&](size_t from, size_t bytes) { ::send(theirs.get(), words.data() + from, bytes, MSG_NOSIGNAL); };
  if ((data[0] & 1) != 0) {
    if ((data[0] & 2) != 0 && words.size() >= sizeof(Hello)) {
      Hello hello = make_hello(rank1, 0, Role::Data);
      std::memcpy(hello.nonce.data(), words.data(), hello.nonce.size());
      std::memcpy(words.data(), &hello, sizeof hello);
    }
    Stranger stranger;
    stranger.fd = std::move(ours);
    const size_t first = words.empty() ? 0 : data[0] % words.size();  // in two pieces
    say(0, first);
    auto fate = stranger.advance(rank0, Role::Data);
    say(first, words.size() - first);
    if (fate == Stranger::Fate::Pending) fate = stranger.advance(rank0, Role::Data);
    if (fate == Stranger::Fate::Admitted || stranger.got > 112) std::abort();
    return 0;
  }
  say(0, words.size());
  ::shutdown(theirs.get(), SHUT_WR);
  try {
    prove_to(ours.get(), Address{}, rank1, 0, Role::Data, Deadline::after(1));
    std::abort();
  } catch (const Error&) {
  }
  return 0;
}
