#include "transport/interface.h"

#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>

#include <bit>
#include <cerrno>
#include <cstring>
#include <memory>

#include "base/env.h"
#include "base/error.h"

namespace roundel::transport {
namespace {

const in6_addr& ip6_of(const Address& address) { return reinterpret_cast<const sockaddr_in6*>(&address.storage)->sin6_addr; }

in_addr_t ip4_of(const Address& address) { return reinterpret_cast<const sockaddr_in*>(&address.storage)->sin_addr.s_addr; }

std::string without_port(const Address& address) {
  const std::string text = address.text.substr(0, address.text.rfind(':'));
  return text.front() == '[' ? text.substr(1, text.size() - 2) : text;
}

int prefix_of(const sockaddr* mask) {
  if (mask == nullptr) return 0;
  const bool is_ip4 = mask->sa_family == AF_INET;
  const auto* bytes = is_ip4 ? reinterpret_cast<const uint8_t*>(&reinterpret_cast<const sockaddr_in*>(mask)->sin_addr)
                             : reinterpret_cast<const uint8_t*>(&reinterpret_cast<const sockaddr_in6*>(mask)->sin6_addr);
  int bits = 0;
  for (int i = 0; i < (is_ip4 ? 4 : 16); ++i) bits += std::popcount(bytes[i]);
  return bits;
}

}  // namespace

std::vector<Interface> interfaces() {
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) throw system_error("getifaddrs", errno);
  const std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> owned(list, ::freeifaddrs);
  std::vector<Interface> found;
  for (const ifaddrs* at = list; at != nullptr; at = at->ifa_next) {
    const int family = at->ifa_addr != nullptr ? at->ifa_addr->sa_family : AF_UNSPEC;
    if ((family != AF_INET && family != AF_INET6) || (at->ifa_flags & IFF_UP) == 0) continue;
    Interface each{at->ifa_name, {}, {}, prefix_of(at->ifa_netmask)};
    each.address.length = family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
    std::memcpy(&each.address.storage, at->ifa_addr, each.address.length);
    if (family == AF_INET6 && IN6_IS_ADDR_LINKLOCAL(&ip6_of(each.address))) continue;
    each.address = with_port(each.address, 0);
    each.text = without_port(each.address);
    found.push_back(std::move(each));
  }
  return found;
}

namespace {

[[noreturn]] void raise_unknown(const std::string& wanted, const char* what, const std::vector<Interface>& all) {
  std::string has;
  for (const Interface& each : all) has += (has.empty() ? "" : ", ") + each.name + " (" + each.text + ")";
  throw InvalidArgument(format("ROUNDEL_INTERFACE=%s: %s; this host has %s", wanted.c_str(), what, has.c_str()));
}

}  // namespace

bool is_wildcard(const Address& address) {
  if (address.storage.ss_family == AF_INET) return ip4_of(address) == htonl(INADDR_ANY);
  return IN6_IS_ADDR_UNSPECIFIED(&ip6_of(address));
}

bool is_loopback(const Address& address) {
  if (address.storage.ss_family == AF_INET) return ntohl(ip4_of(address)) >> 24 == IN_LOOPBACKNET;
  return IN6_IS_ADDR_LOOPBACK(&ip6_of(address));
}

Address address_for_peers(const Address& by_route) {
  const std::string wanted = env::text("ROUNDEL_INTERFACE");
  if (wanted.empty()) return with_port(by_route, 0);
  const std::vector<Interface> all = interfaces();
  bool is_known = false;
  for (const Interface& each : all) {
    is_known |= each.name == wanted;
    if (each.text == wanted || (each.name == wanted && each.address.storage.ss_family == by_route.storage.ss_family))
      return each.address;
  }
  const char* family = by_route.storage.ss_family == AF_INET ? "no IPv4 address there, as the rendezvous has"
                                                             : "no IPv6 address there, as the rendezvous has";
  raise_unknown(wanted, is_known ? family : "no interface or address of that name", all);
}

}  // namespace roundel::transport
