// What ranks tell each other at the rendezvous: fixed structs. Their senders have proved to be members; what they hold is
// checked all the same before it is used.
#pragma once

#include "transport/bootstrap.h"

namespace roundel::transport {

// What a rank says of itself.
struct Card {
  std::array<uint8_t, 16> host{};
  uint32_t address_length = 0;
  sockaddr_storage address{};
  int32_t process = 0;         // its number, among the processes that
  uint64_t process_space = 0;  // this names (a pid namespace)
  uint32_t mpi_number = 0;     // proposed for MPI messages; 0: MPI cannot carry them here
  Cores cores{};               // that it may use
  uint32_t prefers_mpi = 0;    // there is hardware that MPI makes better use of than TCP
  char settings[204] = {};     // must be equal on all ranks

  std::string settings_text() const;
};

// Why the card cannot be accepted beside rank 0's own: "has '...' where rank 0 has '...'", or "" when it can.
std::string refusal(const Card& card, const Card& own);

// Of a card that was not refused.
Address address_of(const Card& card);

// The table of all ranks. Throws Error when a card holds no usable address.
std::vector<Peer> read_cards(const std::vector<Card>& cards);

// What rank 0 makes of all cards.
struct Verdict {
  enum Outcome : uint32_t { Accepted, Missing, Refused, Lost };
  Outcome outcome = Accepted;
  char text[504] = {};
  int32_t lost = -1;  // which rank

  void set(Outcome what, const std::string& why);
  // Throws Timeout, PeerLost or Error with the text.
  void raise_unless_accepted(const Member& self) const;
};

}  // namespace roundel::transport
