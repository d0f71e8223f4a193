// A stripe: one channel to a peer. Takes frames from a queue and writes them; reads frames and asks its sink where their
// payloads go.
//
// Small frames share a write, and a read takes what follows a payload along, so that a small message costs one system call at
// either end. A payload longer than what came with its header goes straight to its place. Checksums are computed while the
// bytes are in the cache: right before they are written, right after they have come.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "transport/channel.h"
#include "transport/transport.h"

namespace roundel::transport {

struct Outgoing {
  FrameHeader header;
  ConstBytes payload;
  std::optional<Ticket> ticket;
  size_t sent = 0;  // of header and payload together
  bool sealed = false;
};

class Stripe;

// What becomes of frames; called by flush() and pump() only.
class FrameSink {
 public:
  virtual ~FrameSink() = default;
  virtual void before_write(Stripe& stripe, FrameHeader& header) = 0;
  virtual void written(Ticket ticket) = 0;
  // A frame has begun: where its payload goes, payload_bytes() long. It may end anything by an exception.
  virtual Bytes begin_payload(Stripe& stripe, const FrameHeader& header) = 0;
  // All of it is here, with the right checksum.
  virtual void finish_payload(Stripe& stripe, const FrameHeader& header) = 0;
};

using Key = std::pair<uint64_t, uint32_t>;  // sequence, index

class Stripe {
 public:
  // `checked`: payloads that leave here carry a checksum.
  Stripe(int rank, int peer, std::unique_ptr<Channel> channel, bool checked);

  int peer() const { return peer_; }
  Channel& channel() { return *channel_; }
  // The other end has closed and everything has been read.
  bool closed() const { return closed_; }

  void queue(Outgoing frame);
  size_t queued_bytes() const { return queued_bytes_; }
  bool idle() const { return out_.empty(); }
  // Whether anything is queued that the peer waits for; news of credit alone is not.
  bool owes() const { return owed_ > 0; }

  // Writes what the channel takes, reads what it has, a bounded amount each time. True when anything moved.
  // flush() throws PeerGone; pump() throws CorruptFrame and whatever the sink does.
  bool flush(FrameSink& sink);
  bool pump(FrameSink& sink);

  // The payload under way: of which message, and whether the sink keeps it for later.
  enum class Fate { Posted, Early, Dropped } fate = Fate::Dropped;
  bool reading(const Key& key, Fate of_fate) const {
    return in_payload_ && fate == of_fate && Key{header_.sequence, header_.index} == key;
  }
  // Sends the rest of the payload under way elsewhere, after what is here already.
  void redirect(Bytes into);

  // Drops all that is queued.
  void drop_output();
  // The same, and reads nothing any more.
  void close();

  std::vector<std::byte> dropped;  // where a payload goes that nobody wants
  bool wants_write = false;        // as told to epoll, by the transport

 private:
  static constexpr size_t kStage = 8 << 10;
  void take(std::byte* bytes, size_t count);  // at their place

  int rank_;
  int peer_;
  std::unique_ptr<Channel> channel_;
  bool checked_;
  bool closed_ = false;

  std::deque<Outgoing> out_;
  size_t queued_bytes_ = 0;
  size_t owed_ = 0;  // frames

  FrameHeader header_;
  size_t header_got_ = 0;
  bool in_payload_ = false;
  Bytes into_;
  size_t payload_got_ = 0;
  uint32_t crc_ = 0;
  std::unique_ptr<std::byte[]> stage_;  // what was read beyond a payload: [stage_begin_, stage_end_)
  size_t stage_begin_ = 0, stage_end_ = 0;
};

}  // namespace roundel::transport
