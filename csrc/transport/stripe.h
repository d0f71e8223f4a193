// A stripe: one way to a peer. Takes frames from a queue and sends them; receives frames and asks its sink where their payloads
// go. ByteStripe does so over a channel, MpiStripe (mpi.h) with messages.
//
// Of a ByteStripe: small frames share a write, and a read takes what follows a payload along, so that a small message costs one
// system call at either end. A payload longer than what came with its header goes straight to its place. Checksums are computed
// while the bytes are in the cache: right before they are written, right after they have come.
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

// How one learns that there is something to receive.
enum class Wake { ByBell, ByDescriptor, ByLooking };

class Stripe {
 public:
  Stripe(int rank, int peer, Wake wake) : rank_(rank), peer_(peer), wake_(wake) {}
  virtual ~Stripe() = default;

  int peer() const { return peer_; }
  Wake wake() const { return wake_; }
  // The other end has closed and everything has been read.
  bool closed() const { return closed_; }
  // To wait on, and to hang up at the end; -1 where there is none.
  virtual int descriptor() const { return -1; }
  virtual int socket() const { return -1; }

  void queue(Outgoing frame);
  size_t queued_bytes() const { return queued_bytes_; }
  virtual bool idle() const { return out_.empty(); }
  // Whether anything is queued that the peer waits for; news of credit alone is not.
  bool owes() const { return owed_ > 0; }

  // Sends what can be sent, receives what has come, a bounded amount each time. True when anything moved.
  // flush() throws PeerGone; pump() throws CorruptFrame and whatever the sink does.
  virtual bool flush(FrameSink& sink) = 0;
  virtual bool pump(FrameSink& sink) = 0;

  // The payload under way: whether the sink keeps it for later, and whether it is that of this message.
  enum class Fate { Posted, Early, Held, Dropped } fate = Fate::Dropped;
  virtual bool keeps(const Key& key) const {
    return in_payload_ && fate == Fate::Early && Key{header_.sequence, header_.index} == key;
  }
  // Sends what keeps() is true of elsewhere, after what is here already: its receive is posted now.
  virtual void redirect(const Key& key, Bytes into) = 0;
  // Whether this payload, which nobody waits for yet, can stay where it is: then begin_payload() need not have a place for it
  // (Fate::Held), and claim() is called when somebody does.
  virtual bool can_hold(const FrameHeader&) const { return false; }
  virtual void claim(const FrameHeader&, Bytes) {}

  // Drops all that is queued.
  void drop_output();
  // The same, and reads nothing any more.
  virtual void close();

  // Where nobody else tells the peer that this is the end: says so. ended(): it has said so too; or there is no need.
  virtual void end() {}
  virtual bool ended() { return true; }

  std::vector<std::byte> dropped;  // where a payload goes that nobody wants
  bool wants_write = false;        // as told to epoll, by the transport

 protected:
  int rank_;
  int peer_;
  Wake wake_;
  bool closed_ = false;

  std::deque<Outgoing> out_;
  size_t queued_bytes_ = 0;
  size_t owed_ = 0;  // frames

  FrameHeader header_;
  bool in_payload_ = false;
  Bytes into_;
};

class ByteStripe final : public Stripe {
 public:
  // `checked`: payloads that leave here carry a checksum.
  ByteStripe(int rank, int peer, std::unique_ptr<Channel> channel, bool checked);

  int descriptor() const override { return channel_->descriptor(); }
  int socket() const override { return channel_->socket(); }
  bool flush(FrameSink& sink) override;
  bool pump(FrameSink& sink) override;
  void redirect(const Key& key, Bytes into) override;

 private:
  static constexpr size_t kStage = 8 << 10;
  void take(std::byte* bytes, size_t count);  // at their place

  std::unique_ptr<Channel> channel_;
  bool checked_;
  size_t header_got_ = 0;
  size_t payload_got_ = 0;
  uint32_t crc_ = 0;
  std::unique_ptr<std::byte[]> stage_;  // what was read beyond a payload: [stage_begin_, stage_end_)
  size_t stage_begin_ = 0, stage_end_ = 0;
};

}  // namespace roundel::transport
