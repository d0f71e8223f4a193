// Messages over byte streams: matching by tag, striping, flow control. Works over any mix of channels, so that a job whose
// ranks share hosts in part needs nothing else.
//
// A message whose receive is posted already goes straight to its destination; one that comes early is kept. How much a peer may
// make us keep is bounded by its credit: it sends at most that many bytes that we have not consumed. Beyond, it announces a
// message in a frame of its own, and sends it when we grant it, which we do as soon as its receive is posted. So what is waited
// for always comes through, whatever nobody asked for yet. Every header tells what its sender has consumed so far; where that
// is a quarter of the credit more than it told last, and it has nothing to send, a frame of its own tells it. Such a frame may
// be under way to a rank that has finished: whoever closes makes sure first that its own bytes have arrived (hangup.h).
//
// Where a stripe can leave a payload with its sender at no cost (MPI's can), an early message of a collective is left there.
//
// Every frame of a collective carries a hash of those that its sender has called before. A rank whose part in an operation is
// complete may not see that others disagreed about it; the next one in which it hears from them, or from whoever has heard from
// them, does not end well for it either.
//
// Where nothing announces what comes (MPI), sleeps are short: from kShortestNap on, longer the longer nothing has come.
//
// With several channels to a peer, frames take whichever has the least to do: tags match them, in any order.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "transport/doorbell.h"
#include "transport/monitor.h"
#include "transport/stripe.h"
#include "transport/transport.h"

namespace roundel::transport {

// What a peer may send unasked to each rank of a job of `size` ranks.
size_t credit_bytes(int size);

class StreamTransport final : public Transport, private FrameSink {
 public:
  using Channels = std::vector<std::unique_ptr<Channel>>;
  // channels[r] lead to rank r; none to this rank itself.
  StreamTransport(const Identity& identity, std::vector<Channels> channels, Doorbell* bell, double spin_seconds);
  ~StreamTransport() override;
  // One more way to a rank, before the first message.
  void add(std::unique_ptr<Stripe> stripe);

  Ticket send(int peer, const Tag& tag, ConstBytes bytes) override;
  Ticket recv(int peer, const Tag& tag, Bytes bytes) override;
  bool test(Ticket ticket) override;
  bool poll() override;
  void sleep(Deadline deadline, const Disturbed& disturbed) override;
  bool arm(const Disturbed& disturbed) override;
  void doze() override;
  void awake() override;
  void retire(const Tag& tag) override;
  std::vector<int> waiting_for() const override;
  bool exhausted(int peer) const override;
  void abandon() override;

  // Bytes of early messages from a peer that are kept here now.
  size_t kept_bytes(int peer) const;

 private:
  static constexpr size_t kRemembered = 16;
  static constexpr long kShortestNap = 20, kLongestNap = 1000;
  struct Posted {
    Signature signature;
    Bytes into;
    Ticket ticket;
    bool arriving = false;
  };
  struct Early {
    FrameHeader header;
    std::vector<std::byte> bytes;
  };
  struct Announced {
    FrameHeader header;
    Stripe* holder;  // the payload's; nullptr: its sender holds it
  };
  struct Waiting {
    Tag tag;
    ConstBytes bytes;
    Ticket ticket;
  };
  struct Peer;

  void before_write(Stripe& stripe, FrameHeader& header) override;
  void written(Ticket ticket) override { close_ticket(ticket); }
  Bytes begin_payload(Stripe& stripe, const FrameHeader& header) override;
  void finish_payload(Stripe& stripe, const FrameHeader& header) override;

  Ticket open_ticket();
  void close_ticket(Ticket ticket);
  Peer& peer_at(int rank);
  void note(const Tag& tag);
  void queue(Peer& peer, const Tag& tag, uint64_t length, uint16_t flags, ConstBytes payload, std::optional<Ticket> ticket);
  void send_eagerly(Peer& peer, const Waiting& message);
  void announce(Peer& peer, const Waiting& message);
  void release_held(Peer& peer);
  void consume(Peer& peer, size_t bytes);
  void announced(Peer& peer, const FrameHeader& header);
  void granted(Peer& peer, const FrameHeader& header);
  void check_signature(const Peer& peer, const FrameHeader& header);
  void check_history(const Peer& peer, const FrameHeader& header);
  bool flush(Peer& peer, Stripe& stripe);
  bool pump(Stripe& stripe);
  void watch_writable();
  void wait_for_events(int milliseconds);
  void nap();
  [[noreturn]] void raise_mismatch(int peer, const Signature& ours, const Signature& theirs) const;
  [[noreturn]] void raise_stale(int peer, uint64_t sequence, const Signature& theirs) const;
  [[noreturn]] void raise_gone(const Peer& peer) const;

  Member identity_;
  uint32_t credit_;  // in units
  std::vector<Peer> peers_;
  std::vector<Peer*> connected_;
  Doorbell* bell_;
  Backoff backoff_;
  Fd epoll_;
  bool looks_ = false;                                // there are peers that nothing announces
  unsigned looked_ = 0;                               // polls so far
  std::atomic<long> nap_microseconds_{kShortestNap};  // of the next sleep between two looks
  bool abandoned_ = false;
  Tag current_;                                    // the collective that was begun last
  uint64_t retired_ = 0;                           // the last complete collective
  uint32_t history_ = 0;                           // hash of all up to that one
  int diverged_ = -1;                              // who told that ranks have called different things before current_
  std::array<Signature, kRemembered> remembered_;  // what the last ones were, by sequence modulo kRemembered, for error texts
  std::vector<std::pair<uint32_t, bool>> slots_;   // generation, done
  std::vector<uint32_t> free_slots_;
};

}  // namespace roundel::transport
