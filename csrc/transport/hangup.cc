#include "transport/hangup.h"

#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <cerrno>

#include "base/clock.h"
#include "base/fd.h"

namespace roundel::transport {
namespace {

constexpr size_t kReads = 64;  // of one socket in a row: whoever goes on talking does not keep us from the deadline

bool is_over(int socket, Until until) {
  char dropped[4096];
  for (size_t i = 0; i < kReads; ++i) {
    const ssize_t n = ::recv(socket, dropped, sizeof dropped, MSG_DONTWAIT);
    if (n > 0 || (n < 0 && errno == EINTR)) continue;
    if (n == 0 || (errno != EAGAIN && errno != EWOULDBLOCK)) return true;
    break;
  }
  int unheard = 0;
  return until == Until::Arrived && ::ioctl(socket, SIOCOUTQ, &unheard) == 0 && unheard == 0;
}

}  // namespace

void hang_up(std::vector<int> sockets, double seconds, Until until) {
  if (in_forked_child()) return;
  const Deadline deadline = Deadline::after(seconds);
  for (const int socket : sockets) ::shutdown(socket, SHUT_WR);
  for (;;) {
    std::erase_if(sockets, [until](int socket) { return is_over(socket, until); });
    if (sockets.empty() || deadline.passed()) return;
    ::poll(nullptr, 0, 1);
  }
}

}  // namespace roundel::transport
