// Which of this host's interfaces the other ranks are told to come to: ROUNDEL_INTERFACE, else the one that the route to the
// rendezvous takes.
#pragma once

#include <string>
#include <vector>

#include "transport/handshake.h"

namespace roundel::transport {

struct Interface {
  std::string name;
  Address address;
  std::string text;  // of the address, without a port
  int prefix = 0;    // bits of its network
};

// Of this host, those that are up, one entry for each address that others can use. (Link-local ones mean nothing elsewhere.)
std::vector<Interface> interfaces();

bool is_wildcard(const Address& address);
bool is_loopback(const Address& address);

// The address to listen at, with any port: `by_route`, unless ROUNDEL_INTERFACE names an interface or one of this host's
// addresses; of an interface the one that is of the same family as `by_route`. Throws InvalidArgument with what this host has.
Address address_for_peers(const Address& by_route);

}  // namespace roundel::transport
