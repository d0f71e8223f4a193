#include "transport/tcp.h"

#include <sys/socket.h>

#include <cerrno>

#include "base/env.h"
#include "base/error.h"

namespace roundel::transport {
namespace {

// Buffer sizes are left to the kernel: it tunes them up to several megabytes, and setting them would end that at
// net.core.*mem_max.
class TcpChannel final : public Channel {
 public:
  explicit TcpChannel(Fd fd) : fd_(std::move(fd)) {}

  size_t write(std::span<const iovec> parts) override {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(parts.data());
    message.msg_iovlen = parts.size();
    for (;;) {
      const ssize_t n = ::sendmsg(fd_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n >= 0) return static_cast<size_t>(n);
      if (errno == EAGAIN || errno == EWOULDBLOCK) return 0;
      if (errno != EINTR) throw PeerGone{};
    }
  }

  size_t read(void* data, size_t bytes) override {
    const iovec part{data, bytes};
    return read_into({&part, 1});
  }

  size_t read_into(std::span<const iovec> parts) override {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(parts.data());
    message.msg_iovlen = parts.size();
    for (;;) {
      const ssize_t n = ::recvmsg(fd_.get(), &message, MSG_DONTWAIT);
      if (n > 0) return static_cast<size_t>(n);
      if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return 0;
      if (n == 0 || errno != EINTR) throw PeerGone{};
    }
  }

  int descriptor() const override { return fd_.get(); }
  int socket() const override { return fd_.get(); }
  bool leaves_host() const override { return true; }

 private:
  Fd fd_;
};

}  // namespace

std::unique_ptr<Channel> socket_channel(Fd socket) { return std::make_unique<TcpChannel>(std::move(socket)); }

std::map<int, std::vector<std::unique_ptr<Channel>>> open_tcp(const Identity& identity, int listen_fd,
                                                              const std::map<int, Address>& lower,
                                                              const std::vector<int>& higher, const Patience& patience) {
  const auto sockets = static_cast<size_t>(env::number("ROUNDEL_TCP_SOCKETS", 1, 16));
  std::map<int, std::vector<std::unique_ptr<Channel>>> channels;
  for (const auto& [rank, address] : lower)
    for (size_t i = 0; i < sockets; ++i)
      channels[rank].push_back(socket_channel(connect_to(address, identity, rank, Role::Data, patience)));
  const std::string obstacle = accept_each(listen_fd, identity, Role::Data, higher, sockets, patience,
                                           [&](int rank, Fd fd) { channels[rank].push_back(socket_channel(std::move(fd))); });
  std::vector<int> missing;
  for (const int rank : higher)
    if (channels[rank].size() < sockets) missing.push_back(rank);
  if (!missing.empty())
    throw Timeout(
        format("rank %d: no connection from rank %s in time%s", identity.rank, join_ranks(missing).c_str(), obstacle.c_str()));
  return channels;
}

}  // namespace roundel::transport
