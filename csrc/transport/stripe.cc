#include "transport/stripe.h"

#include <algorithm>
#include <cstring>

#include "base/copy.h"
#include "base/crc32c.h"
#include "base/error.h"
#include "base/failpoint.h"

namespace roundel::transport {
namespace {

constexpr size_t kHeader = sizeof(FrameHeader);
constexpr size_t kTurn = 512u << 10;     // then the other direction has its turn
constexpr size_t kTogether = 64u << 10;  // frames up to this much in all share a write
constexpr size_t kParts = 16;

}  // namespace

ByteStripe::ByteStripe(int rank, int peer, std::unique_ptr<Channel> channel, bool checked)
    : Stripe(rank, peer, channel->descriptor() < 0 ? Wake::ByBell : Wake::ByDescriptor),
      channel_(std::move(channel)),
      checked_(checked && channel_->leaves_host()),
      stage_(new std::byte[kStage]) {}

void Stripe::queue(Outgoing frame) {
  queued_bytes_ += kHeader + frame.payload.size();
  owed_ += (frame.header.flags & kCredits) == 0;
  out_.push_back(std::move(frame));
}

bool ByteStripe::flush(FrameSink& sink) {
  size_t moved = 0;
  while (!out_.empty() && moved < kTurn) {
    iovec parts[kParts];
    size_t count = 0, bytes = 0;
    for (auto frame = out_.begin(); frame != out_.end() && count + 2 <= kParts && bytes < kTogether; ++frame) {
      if (!frame->sealed) {
        sink.before_write(*this, frame->header);
        seal(frame->header, frame->payload, checked_);
        frame->sealed = true;
      }
      const size_t header_sent = std::min(frame->sent, kHeader), payload_sent = frame->sent - header_sent;
      if (header_sent < kHeader)
        parts[count++] = {reinterpret_cast<std::byte*>(&frame->header) + header_sent, kHeader - header_sent};
      if (payload_sent < frame->payload.size())
        parts[count++] = {const_cast<std::byte*>(frame->payload.data()) + payload_sent, frame->payload.size() - payload_sent};
      bytes += kHeader + frame->payload.size() - frame->sent;
    }
    const bool header_alone = out_.front().sent < kHeader && failpoint::wants(failpoint::Point::StreamHeaderSent);
    if (header_alone || failpoint::wants(failpoint::Point::StreamHalfSent)) {
      count = 1;
      if (!header_alone && out_.front().sent >= kHeader) parts[0].iov_len = (parts[0].iov_len + 1) / 2;
      bytes = parts[0].iov_len;
    }
    const size_t wrote = channel_->write({parts, count});
    moved += wrote;
    queued_bytes_ -= wrote;
    for (size_t left = wrote; left > 0;) {
      Outgoing& front = out_.front();
      const size_t taken = std::min(left, kHeader + front.payload.size() - front.sent);
      front.sent += taken;
      left -= taken;
      if (front.sent == kHeader && !front.payload.empty()) failpoint::pass(failpoint::Point::StreamHeaderSent);
      if (front.sent > kHeader && front.sent < kHeader + front.payload.size())
        failpoint::pass(failpoint::Point::StreamHalfSent);
      if (front.sent < kHeader + front.payload.size()) break;
      if (front.ticket) sink.written(*front.ticket);
      owed_ -= (front.header.flags & kCredits) == 0;
      out_.pop_front();
    }
    if (wrote < bytes) break;
  }
  return moved > 0;
}

void ByteStripe::take(std::byte* bytes, size_t count) {
  if (count > 0) failpoint::pass(failpoint::Point::StreamReceived, bytes, count);
  if ((header_.flags & kHasPayloadCrc) != 0) crc_ = crc32c(bytes, count, crc_);
  payload_got_ += count;
}

bool ByteStripe::pump(FrameSink& sink) {
  size_t moved = 0;
  for (bool drained = false; !closed_;) {
    const size_t staged = stage_end_ - stage_begin_;
    if (!in_payload_) {
      const size_t n = std::min(kHeader - header_got_, staged);
      std::memcpy(reinterpret_cast<std::byte*>(&header_) + header_got_, stage_.get() + stage_begin_, n);
      header_got_ += n;
      stage_begin_ += n;
      if (header_got_ == kHeader) {
        failpoint::pass(failpoint::Point::StreamHeaderReceived, &header_, kHeader);
        validate(header_, peer_);
        payload_got_ = 0;
        crc_ = 0;
        into_ = sink.begin_payload(*this, header_);
        ROUNDEL_CHECK(into_.size() == payload_bytes(header_));
        in_payload_ = true;
      }
    }
    if (in_payload_) {
      const size_t n = std::min(into_.size() - payload_got_, stage_end_ - stage_begin_);
      if (n > 0) copy_bytes(into_.data() + payload_got_, stage_.get() + stage_begin_, n);
      take(into_.data() + payload_got_, n);
      stage_begin_ += n;
      if (payload_got_ == into_.size()) {
        if ((header_.flags & kHasPayloadCrc) != 0 && crc_ != header_.payload_crc)
          throw CorruptFrame(format("rank %d: a payload from rank %d (%s) failed its checksum", rank_, peer_,
                                    header_.signature.describe().c_str()));
        in_payload_ = false;
        header_got_ = 0;
        sink.finish_payload(*this, header_);
        continue;
      }
    }
    if (drained || moved >= kTurn) break;
    const size_t wanted = in_payload_ ? into_.size() - payload_got_ : 0;
    iovec places[2];
    size_t count = 0;
    if (wanted > 0) places[count++] = {into_.data() + payload_got_, wanted};
    places[count++] = {stage_.get(), kStage};
    size_t n = 0;
    try {
      n = channel_->read_into({places, count});
    } catch (const PeerGone&) {
      closed_ = true;
      break;
    }
    if (n == 0) break;
    moved += n;
    drained = n < wanted + kStage;
    const size_t placed = std::min(n, wanted);
    if (placed > 0) take(into_.data() + payload_got_, placed);
    stage_begin_ = 0;
    stage_end_ = n - placed;
  }
  return moved > 0;
}

void ByteStripe::redirect(const Key&, Bytes into) {
  std::copy_n(into_.begin(), payload_got_, into.begin());
  into_ = into;
  fate = Fate::Posted;
}

void Stripe::drop_output() {
  out_.clear();
  queued_bytes_ = owed_ = 0;
}

void Stripe::close() {
  closed_ = true;
  drop_output();
}

}  // namespace roundel::transport
