// TCP channels: ROUNDEL_TCP_SOCKETS connections for each pair of ranks, made and authenticated at start.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "transport/channel.h"
#include "transport/handshake.h"

namespace roundel::transport {

// Connects to `lower` ranks at their addresses and accepts the `higher` ones on `listen_fd`. Throws Timeout naming who is
// missing.
std::map<int, std::vector<std::unique_ptr<Channel>>> open_tcp(const Identity& identity, int listen_fd,
                                                              const std::map<int, Address>& lower,
                                                              const std::vector<int>& higher, const Patience& patience);

// A connected stream socket of any family as a channel.
std::unique_ptr<Channel> socket_channel(Fd socket);

}  // namespace roundel::transport
