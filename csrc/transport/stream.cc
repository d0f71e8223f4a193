#include "transport/stream.h"

#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/crc32c.h"
#include "base/env.h"
#include "base/error.h"
#include "base/failpoint.h"

namespace roundel::transport {
namespace {
constexpr size_t kMaxEarly = 64u << 20;
constexpr size_t kHeader = sizeof(FrameHeader);
}  // namespace

struct StreamTransport::Peer {
  int rank = -1;
  std::unique_ptr<Channel> channel;
  bool closed = false;
  bool wants_write = false, wants_read = true;  // as told to epoll

  std::deque<Outgoing> out;

  // The frame being read: its header until `got` reaches kHeader, then its payload into `into`.
  FrameHeader header;
  size_t got = 0;
  Bytes into;
  uint32_t crc = 0;
  enum class Fate { Posted, Early, Dropped } fate = Fate::Dropped;
  Key key;
  std::vector<std::byte> dropped;
  bool reading() const { return got >= kHeader && into.data() != nullptr; }  // a payload has been begun

  std::map<Key, Posted> posted;
  std::map<Key, Early> early;
  size_t early_bytes = 0;
};

StreamTransport::StreamTransport(const Identity& identity, std::vector<std::unique_ptr<Channel>> channels, Doorbell* bell,
                                 double spin_seconds)
    : identity_(identity),
      peers_(channels.size()),
      bell_(bell),
      backoff_(spin_seconds),
      epoll_(::epoll_create1(EPOLL_CLOEXEC)),
      crc_(env::flag("ROUNDEL_CRC")) {
  if (!epoll_) throw system_error("epoll_create1", errno);
  epoll_event bell_event{EPOLLIN, {.ptr = nullptr}};
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, bell_->event(), &bell_event) != 0) throw system_error("epoll_ctl", errno);
  for (size_t r = 0; r < channels.size(); ++r) {
    Peer& peer = peers_[r];
    peer.rank = static_cast<int>(r);
    if (channels[r] == nullptr) continue;
    peer.channel = std::move(channels[r]);
    connected_.push_back(&peer);
    if (peer.channel->descriptor() < 0) continue;
    epoll_event event{EPOLLIN, {.ptr = &peer}};
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, peer.channel->descriptor(), &event) != 0)
      throw system_error("epoll_ctl", errno);
  }
}

StreamTransport::~StreamTransport() = default;

Ticket StreamTransport::open_ticket() {
  if (abandoned_) throw Error(format("rank %d: this communicator ended with an earlier error", identity_.rank));
  uint32_t slot;
  if (free_slots_.empty()) {
    slot = static_cast<uint32_t>(slots_.size());
    slots_.emplace_back(0, false);
  } else {
    slot = free_slots_.back();
    free_slots_.pop_back();
    slots_[slot].second = false;
  }
  return {slot, slots_[slot].first};
}

void StreamTransport::close_ticket(Ticket ticket) { slots_[ticket.slot].second = true; }

bool StreamTransport::test(Ticket ticket) {
  auto& [generation, done] = slots_[ticket.slot];
  ROUNDEL_CHECK(generation == ticket.generation);
  if (!done) return false;
  ++generation;
  free_slots_.push_back(ticket.slot);
  return true;
}

Ticket StreamTransport::send(int peer_rank, const Tag& tag, ConstBytes bytes) {
  ROUNDEL_CHECK(bytes.size() <= kMaxPayload && peer_rank != identity_.rank);
  const Ticket ticket = open_ticket();
  Peer& peer = peers_[static_cast<size_t>(peer_rank)];
  const bool checked = crc_ && peer.channel->leaves_host();
  peer.out.push_back({make_header(identity_.epoch, identity_.rank, tag, bytes, checked), bytes, 0, ticket});
  failpoint::pass(failpoint::Point::StreamQueued);
  if (peer.out.size() == 1) flush(peer);
  return ticket;
}

Ticket StreamTransport::recv(int peer_rank, const Tag& tag, Bytes bytes) {
  ROUNDEL_CHECK(bytes.size() <= kMaxPayload && peer_rank != identity_.rank);
  const Ticket ticket = open_ticket();
  Peer& peer = peers_[static_cast<size_t>(peer_rank)];
  const Key key{tag.sequence, tag.index};
  const auto first = peer.early.lower_bound({tag.sequence, 0});  // any early message of this operation shows its signature
  if (first != peer.early.end() && first->first.first == tag.sequence && first->second.signature != tag.signature)
    raise_mismatch(peer_rank, tag.signature, first->second.signature);
  const auto found = peer.early.find(key);
  if (found == peer.early.end()) {
    const bool fresh = peer.posted.try_emplace(key, Posted{tag.signature, bytes, ticket}).second;
    ROUNDEL_CHECK(fresh);
    return ticket;
  }
  std::vector<std::byte>& message = found->second.bytes;
  if (message.size() != bytes.size()) raise_mismatch(peer_rank, tag.signature, found->second.signature);
  if (peer.reading() && peer.fate == Peer::Fate::Early &&
      peer.key == key) {  // half of it is here: the rest goes straight to its place
    std::copy_n(message.begin(), peer.got - kHeader, bytes.begin());
    peer.fate = Peer::Fate::Posted;
    peer.into = bytes;
    peer.posted.try_emplace(key, Posted{tag.signature, bytes, ticket});
    peer.early_bytes -= message.size();
    peer.early.erase(found);
    return ticket;
  }
  std::copy(message.begin(), message.end(), bytes.begin());
  peer.early_bytes -= message.size();
  peer.early.erase(found);
  if (!peer.wants_read) watch_descriptor(peer, peer.wants_write, true);
  close_ticket(ticket);
  return ticket;
}

bool StreamTransport::flush(Peer& peer) {
  bool moved = false;
  while (!peer.out.empty()) {
    Outgoing& front = peer.out.front();
    iovec parts[2];
    size_t count = 0;
    if (front.sent < kHeader) parts[count++] = {reinterpret_cast<std::byte*>(&front.header) + front.sent, kHeader - front.sent};
    const size_t payload_sent = front.sent > kHeader ? front.sent - kHeader : 0;
    if (payload_sent < front.payload.size())
      parts[count++] = {const_cast<std::byte*>(front.payload.data()) + payload_sent, front.payload.size() - payload_sent};
    if (front.sent < kHeader && failpoint::wants(failpoint::Point::StreamHeaderSent)) count = 1;
    if (failpoint::wants(failpoint::Point::StreamHalfSent)) parts[count - 1].iov_len = (parts[count - 1].iov_len + 1) / 2;
    try {
      const size_t wrote = peer.channel->write({parts, count});
      front.sent += wrote;
      moved |= wrote > 0;
    } catch (const PeerGone&) {
      peer.closed = true;
      raise_gone(peer);
    }
    if (front.sent == kHeader && !front.payload.empty()) failpoint::pass(failpoint::Point::StreamHeaderSent);
    if (front.sent > kHeader && front.sent < kHeader + front.payload.size()) failpoint::pass(failpoint::Point::StreamHalfSent);
    if (front.sent < kHeader + front.payload.size()) break;
    close_ticket(front.ticket);
    peer.out.pop_front();
  }
  if (peer.wants_write == peer.out.empty()) watch_descriptor(peer, !peer.out.empty(), peer.wants_read);
  return moved;
}

// Decides where the payload of a validated header goes. False: leave the channel unread for now.
bool StreamTransport::begin_payload(Peer& peer) {
  const FrameHeader& header = peer.header;
  peer.key = {header.sequence, header.index};
  peer.crc = 0;
  if (!peer.wants_read) watch_descriptor(peer, peer.wants_write, true);
  if (header.epoch != identity_.epoch) {  // from before a restart: read and forget
    peer.fate = Peer::Fate::Dropped;
    peer.dropped.resize(header.length);
    peer.into = peer.dropped;
    return true;
  }
  if (header.sequence <= retired_) raise_stale(peer.rank, header.sequence, header.signature);
  const auto posted = peer.posted.lower_bound({header.sequence, 0});
  if (posted != peer.posted.end() && posted->first.first == header.sequence && posted->second.signature != header.signature)
    raise_mismatch(peer.rank, posted->second.signature, header.signature);
  const auto exact = peer.posted.find(peer.key);
  if (exact != peer.posted.end()) {
    if (exact->second.into.size() != header.length) raise_mismatch(peer.rank, exact->second.signature, header.signature);
    peer.fate = Peer::Fate::Posted;
    peer.into = exact->second.into;
    return true;
  }
  if (peer.early_bytes > 0 && peer.early_bytes + header.length > kMaxEarly && peer.posted.empty()) {
    if (peer.wants_read) watch_descriptor(peer, peer.wants_write, false);
    return false;
  }
  Early& early = peer.early[peer.key];
  early.signature = header.signature;
  early.bytes.resize(header.length);
  peer.early_bytes += header.length;
  peer.fate = Peer::Fate::Early;
  peer.into = early.bytes;
  return true;
}

void StreamTransport::finish_payload(Peer& peer) {
  if ((peer.header.flags & kHasPayloadCrc) != 0 && peer.crc != peer.header.payload_crc)
    throw CorruptFrame(format("rank %d: a payload from rank %d (%s) failed its checksum", identity_.rank, peer.rank,
                              peer.header.signature.describe().c_str()));
  failpoint::pass(failpoint::Point::StreamMatched);
  if (peer.fate == Peer::Fate::Posted) {
    const auto posted = peer.posted.find(peer.key);
    close_ticket(posted->second.ticket);
    peer.posted.erase(posted);
  }
  peer.dropped.clear();
  peer.into = {};
  peer.got = 0;
}

// Reads frames until the channel is empty. A complete header that must wait stays in peer.header with got == kHeader and no
// payload begun.
bool StreamTransport::pump(Peer& peer) {
  bool moved = false;
  for (;;) {
    size_t n = 0;
    try {
      if (peer.got < kHeader) {
        n = peer.channel->read(reinterpret_cast<std::byte*>(&peer.header) + peer.got, kHeader - peer.got);
        peer.got += n;
        if (peer.got < kHeader) {
          if (n == 0) return moved;
          continue;
        }
        failpoint::pass(failpoint::Point::StreamHeaderReceived, &peer.header, kHeader);
        validate(peer.header, peer.rank);
      }
      if (!peer.reading() && !begin_payload(peer)) return moved;
      const size_t done = peer.got - kHeader;
      if (done < peer.header.length) {
        n = peer.channel->read(peer.into.data() + done, peer.header.length - done);
        if (n == 0) return moved;
        failpoint::pass(failpoint::Point::StreamReceived, peer.into.data() + done, n);
        if ((peer.header.flags & kHasPayloadCrc) != 0) peer.crc = crc32c(peer.into.data() + done, n, peer.crc);
        peer.got += n;
        moved = true;
      }
      if (peer.got == kHeader + peer.header.length) {
        finish_payload(peer);
        moved = true;
      }
    } catch (const PeerGone&) {
      peer.closed = true;
      if (peer.channel->descriptor() >= 0) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, peer.channel->descriptor(), nullptr);
      return moved;
    }
  }
}

bool StreamTransport::poll() {
  bool moved = false;
  for (Peer* peer : connected_) {
    if (!peer->out.empty()) {
      if (peer->closed) raise_gone(*peer);
      moved |= flush(*peer);
    }
    if (!peer->closed && (peer->channel->descriptor() < 0 || !peer->posted.empty())) moved |= pump(*peer);
    if (peer->closed && !peer->posted.empty()) raise_gone(*peer);
  }
  if (moved) backoff_.reset();
  return moved;
}

void StreamTransport::sleep(Deadline deadline) {
  if (backoff_.again()) return;
  bell_->announce_event_sleep();
  if (!poll()) {
    epoll_event events[16];
    const int ready = ::epoll_wait(epoll_.get(), events, 16, deadline.milliseconds_left(100));
    for (int i = 0; i < ready; ++i)
      if (auto* peer = static_cast<Peer*>(events[i].data.ptr); peer != nullptr && !peer->closed && peer->wants_read)
        pump(*peer);
  }
  bell_->awake();
  backoff_.reset();
}

void StreamTransport::watch_descriptor(Peer& peer, bool writable, bool readable) {
  peer.wants_write = writable;
  peer.wants_read = readable;
  if (peer.channel->descriptor() < 0 || peer.closed) return;
  epoll_event event{(readable ? EPOLLIN : 0u) | (writable ? EPOLLOUT : 0u), {.ptr = &peer}};
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, peer.channel->descriptor(), &event);
}

void StreamTransport::retire(const Tag& tag) {
  failpoint::pass(failpoint::Point::StreamRetire);
  retired_ = tag.sequence;
  remembered_[tag.sequence % kRemembered] = tag.signature;
  for (const Peer* peer : connected_)
    if (const auto first = peer->early.begin(); first != peer->early.end() && first->first.first <= retired_)
      raise_stale(peer->rank, first->first.first, first->second.signature);
}

std::vector<int> StreamTransport::waiting_for() const {
  std::vector<int> ranks;
  for (const Peer* peer : connected_)
    if (!peer->posted.empty() || !peer->out.empty()) ranks.push_back(peer->rank);
  return ranks;
}

bool StreamTransport::exhausted(int peer_rank) const {
  const Peer& peer = peers_[static_cast<size_t>(peer_rank)];
  return peer.channel == nullptr || peer.channel->descriptor() < 0 || peer.closed || !peer.out.empty();
}

void StreamTransport::abandon() {
  abandoned_ = true;
  for (Peer* peer : connected_) {
    peer->closed = true;
    peer->out.clear();
    peer->posted.clear();
    peer->early.clear();
  }
}

void StreamTransport::raise_mismatch(int peer, const Signature& ours, const Signature& theirs) const {
  throw Mismatch(format("rank %d called %s where rank %d called %s", identity_.rank, ours.describe().c_str(), peer,
                        theirs.describe().c_str()));
}

// Within the memory of this rank it can say what it called itself.
void StreamTransport::raise_stale(int peer, uint64_t sequence, const Signature& theirs) const {
  if (sequence + kRemembered > retired_) raise_mismatch(peer, remembered_[sequence % kRemembered], theirs);
  throw Mismatch(format("rank %d called %s as operation %llu, which rank %d has long finished as something else", peer,
                        theirs.describe().c_str(), static_cast<unsigned long long>(sequence), identity_.rank));
}

void StreamTransport::raise_gone(const Peer& peer) const {
  throw PeerLost(format("rank %d closed its connection", peer.rank), {peer.rank}, identity_.epoch);
}

}  // namespace roundel::transport
