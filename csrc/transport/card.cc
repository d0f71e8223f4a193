#include "transport/card.h"

#include <netinet/in.h>

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "base/text.h"

namespace roundel::transport {
namespace {

// Up to the first zero, or all of it: nobody promises that there is one.
template <size_t N>
std::string text_in(const char (&field)[N]) {
  return {field, ::strnlen(field, N)};
}

bool has_usable_address(const Card& card) {
  const auto family = card.address.ss_family;
  const size_t expected = family == AF_INET ? sizeof(sockaddr_in) : family == AF_INET6 ? sizeof(sockaddr_in6) : 0;
  return expected != 0 && card.address_length == expected;
}

}  // namespace

std::string Card::settings_text() const { return text_in(settings); }

std::string refusal(const Card& card, const Card& own) {
  if (!has_usable_address(card)) return "sent an address of an unknown family or length";
  const std::string theirs = card.settings_text(), ours = own.settings_text();
  return theirs == ours ? "" : "has '" + theirs + "' where rank 0 has '" + ours + "'";
}

Address address_of(const Card& card) {
  Address address;
  address.storage = card.address;
  address.length = card.address_length;
  return with_port(address, port_of(address));  // and its text
}

std::vector<Peer> read_cards(const std::vector<Card>& cards) {
  std::vector<Peer> peers;
  std::vector<std::array<uint8_t, 16>> hosts;
  for (const Card& card : cards) {
    if (!has_usable_address(card)) throw Error("a rank sent an address of an unknown family or length");
    auto at = std::find(hosts.begin(), hosts.end(), card.host);
    if (at == hosts.end()) at = hosts.insert(hosts.end(), card.host);
    peers.push_back(
        {static_cast<int>(at - hosts.begin()), address_of(card), card.mpi_number, card.prefers_mpi != 0, card.cores});
  }
  return peers;
}

void Verdict::set(Outcome what, const std::string& why) {
  outcome = what;
  const std::string_view fits = cut_text(why, sizeof text - 1);
  *std::copy(fits.begin(), fits.end(), text) = '\0';
}

void Verdict::raise_unless_accepted(const Member& self) const {
  if (outcome == Accepted) return;
  const std::string why = format("rank %d: the job could not start: %s", self.rank, text_in(text).c_str());
  if (outcome == Missing) throw Timeout(why);
  if (outcome == Lost && lost >= 0 && lost < self.size) throw PeerLost(why, {lost}, self.epoch);
  throw Error(why);
}

}  // namespace roundel::transport
