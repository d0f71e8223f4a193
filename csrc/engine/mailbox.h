// Control messages of any length between the engines of neighbours in the tree, in order, over the communicator's transport.
// Called by whoever drives the engine. A message travels as a head of fixed size, which holds short ones whole, and the rest.
#pragma once

#include <deque>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "transport/transport.h"

namespace roundel::engine {

class Mailbox {
 public:
  Mailbox(transport::Transport& transport, const std::vector<int>& peers);

  void send(int peer, const std::string& message);
  // The next message that has come from anyone, after the transport was polled.
  std::optional<std::pair<int, std::string>> receive();
  // Of the peer whose message was received last: nothing more is expected from it, and its connection may end.
  void dismiss(int peer);
  // Whether all that was sent to these has left this process' hands.
  bool flushed(const std::vector<int>& peers);

 private:
  static constexpr size_t kHead = 256;  // what a few dozen requests by number need
  struct Head {
    uint32_t length = 0;
    std::byte bytes[kHead - sizeof(uint32_t)] = {};
  };
  enum class State { Idle, Head, Rest, Dismissed };
  struct Inbox {
    uint64_t number = 0;
    State state = State::Idle;
    Head head;
    std::string rest;
    transport::Ticket ticket;
  };
  struct Outgoing {
    int peer;
    Head head;
    std::string rest;
    std::vector<transport::Ticket> tickets;
  };
  std::optional<std::string> take(int peer, Inbox& inbox);
  void forget_sent();

  transport::Transport& transport_;
  std::map<int, Inbox> inboxes_;
  std::map<int, uint64_t> sent_;
  std::deque<Outgoing> outgoing_;
};

}  // namespace roundel::engine
