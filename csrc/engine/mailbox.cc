#include "engine/mailbox.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"

namespace roundel::engine {
namespace {

// Apart from the communicator's own transfers, which count from kPointToPoint.
constexpr uint64_t kFirst = transport::kPointToPoint | 1ull << 62;
constexpr size_t kLongest = 256u << 20;  // as a garbled length would be larger

transport::Tag tag_of(uint64_t number, uint32_t part) {
  transport::Tag tag{kFirst | number, part, {}};
  tag.signature.kind = OpKind::PointToPoint;
  return tag;
}

}  // namespace

Mailbox::Mailbox(transport::Transport& transport, const std::vector<int>& peers) : transport_(transport) {
  for (const int peer : peers) inboxes_[peer];
}

void Mailbox::send(int peer, const std::string& message) {
  forget_sent();
  Outgoing& out = outgoing_.emplace_back();
  out.peer = peer;
  const uint64_t number = sent_[peer]++;
  const size_t inside = std::min(message.size(), sizeof out.head.bytes);
  out.head.length = static_cast<uint32_t>(message.size());
  std::memcpy(out.head.bytes, message.data(), inside);
  out.rest = message.substr(inside);
  out.tickets.push_back(transport_.send(peer, tag_of(number, 0), {reinterpret_cast<const std::byte*>(&out.head), kHead}));
  if (!out.rest.empty())
    out.tickets.push_back(
        transport_.send(peer, tag_of(number, 1), {reinterpret_cast<const std::byte*>(out.rest.data()), out.rest.size()}));
}

void Mailbox::forget_sent() {
  for (Outgoing& out : outgoing_) std::erase_if(out.tickets, [this](transport::Ticket t) { return transport_.test(t); });
  while (!outgoing_.empty() && outgoing_.front().tickets.empty()) outgoing_.pop_front();
}

bool Mailbox::flushed(const std::vector<int>& peers) {
  forget_sent();
  return std::none_of(outgoing_.begin(), outgoing_.end(), [&](const Outgoing& out) {
    return !out.tickets.empty() && std::find(peers.begin(), peers.end(), out.peer) != peers.end();
  });
}

std::optional<std::string> Mailbox::take(int peer, Inbox& inbox) {
  if (inbox.state == State::Idle) {  // only now: whoever has said goodbye may close its connection
    inbox.ticket = transport_.recv(peer, tag_of(inbox.number, 0), {reinterpret_cast<std::byte*>(&inbox.head), kHead});
    inbox.state = State::Head;
  }
  if (inbox.state == State::Dismissed || !transport_.test(inbox.ticket)) return std::nullopt;
  const size_t inside = std::min<size_t>(inbox.head.length, sizeof inbox.head.bytes);
  if (inbox.state == State::Head && inbox.head.length > inside) {
    if (inbox.head.length > kLongest) throw CorruptFrame(format("rank %d sent a control message of impossible length", peer));
    inbox.state = State::Rest;
    inbox.rest.resize(inbox.head.length - inside);
    inbox.ticket =
        transport_.recv(peer, tag_of(inbox.number, 1), {reinterpret_cast<std::byte*>(inbox.rest.data()), inbox.rest.size()});
    return take(peer, inbox);
  }
  std::string message(reinterpret_cast<const char*>(inbox.head.bytes), inside);
  if (std::exchange(inbox.state, State::Idle) == State::Rest) message += inbox.rest;
  ++inbox.number;
  return message;
}

std::optional<std::pair<int, std::string>> Mailbox::receive() {
  for (auto& [peer, inbox] : inboxes_)
    if (auto message = take(peer, inbox)) return std::pair(peer, std::move(*message));
  return std::nullopt;
}

void Mailbox::dismiss(int peer) { inboxes_.at(peer).state = State::Dismissed; }

}  // namespace roundel::engine
