// Messages over byte streams: frames, matching by tag, checksums, back-pressure. Works over any mix of channels, so that a job
// whose ranks share hosts in part needs nothing else.
//
// A message whose receive is already posted goes straight to its destination. One that comes early is kept, up to kMaxEarly
// bytes per peer; then that peer's channel is left unread until something from that peer is waited for.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "transport/channel.h"
#include "transport/doorbell.h"
#include "transport/monitor.h"
#include "transport/transport.h"

namespace roundel::transport {

class StreamTransport final : public Transport {
 public:
  // channels[r] leads to rank r; null for this rank itself.
  StreamTransport(const Identity& identity, std::vector<std::unique_ptr<Channel>> channels, Doorbell* bell,
                  double spin_seconds);
  ~StreamTransport() override;

  Ticket send(int peer, const Tag& tag, ConstBytes bytes) override;
  Ticket recv(int peer, const Tag& tag, Bytes bytes) override;
  bool test(Ticket ticket) override;
  bool poll() override;
  void sleep(Deadline deadline) override;
  void retire(const Tag& tag) override;
  std::vector<int> waiting_for() const override;
  bool exhausted(int peer) const override;
  void abandon() override;

 private:
  struct Outgoing {
    FrameHeader header;
    ConstBytes payload;
    size_t sent = 0;  // of header and payload together
    Ticket ticket;
  };
  static constexpr size_t kRemembered = 16;
  using Key = std::pair<uint64_t, uint32_t>;  // sequence, index
  struct Posted {
    Signature signature;
    Bytes into;
    Ticket ticket;
  };
  struct Early {
    Signature signature;
    std::vector<std::byte> bytes;
  };
  struct Peer;

  Ticket open_ticket();
  void close_ticket(Ticket ticket);
  bool flush(Peer& peer);
  bool pump(Peer& peer);
  bool begin_payload(Peer& peer);
  void finish_payload(Peer& peer);
  void watch_descriptor(Peer& peer, bool writable, bool readable);
  [[noreturn]] void raise_mismatch(int peer, const Signature& ours, const Signature& theirs) const;
  [[noreturn]] void raise_stale(int peer, uint64_t sequence, const Signature& theirs) const;
  [[noreturn]] void raise_gone(const Peer& peer) const;

  Member identity_;
  std::vector<Peer> peers_;
  std::vector<Peer*> connected_;
  Doorbell* bell_;
  Backoff backoff_;
  Fd epoll_;
  bool crc_;
  bool abandoned_ = false;
  uint64_t retired_ = 0;                           // the last complete collective
  std::array<Signature, kRemembered> remembered_;  // what the last ones were, by sequence modulo kRemembered, for error texts
  std::vector<std::pair<uint32_t, bool>> slots_;   // generation, done
  std::vector<uint32_t> free_slots_;
};

}  // namespace roundel::transport
