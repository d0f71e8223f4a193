// What a member may say on its control connection: a whole failure detector of rank 0, with two connections, fed with the input
// on one of them. The first byte chooses whether messages are given a valid beginning.
#include <poll.h>
#include <sys/socket.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "transport/monitor.h"

using namespace roundel;
using namespace roundel::transport;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  constexpr size_t kMessage = 512;
  constexpr uint32_t kBeginning[2] = {0x4c544352, 1};  // magic, epoch
  std::vector<uint8_t> words(data + 1, data + size);
  if ((data[0] & 1) != 0)
    for (size_t at = 0; at + kMessage <= words.size(); at += kMessage)
      std::memcpy(words.data() + at, kBeginning, sizeof kBeginning);
  int pairs[2][2];
  for (auto& pair : pairs)
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) std::abort();
  std::map<int, ControlLink> controls;
  controls[1].connection = Fd(pairs[0][0]);
  controls[2].connection = Fd(pairs[1][0]);
  Fd theirs(pairs[0][1]), others(pairs[1][1]);
  ::send(theirs.get(), words.data(), words.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  ::shutdown(theirs.get(), SHUT_WR);
  Monitor monitor(Identity(Token{}, 0, 3, 1), std::move(controls), [] {});
  for (int i = 0; i < 1000 && !monitor.troubled() && !monitor.somebody_left(); ++i) ::poll(nullptr, 0, 1);
  try {
    monitor.raise_if_left({1, 2}, "fuzzing");
    monitor.raise_trouble("fuzzing");
  } catch (const Error&) {
  }
  theirs.reset();  // or the monitor would wait at its end for them to read
  others.reset();
  return 0;
}
