#include "transport/stream.h"

#include <poll.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/crc32c.h"
#include "base/env.h"
#include "base/error.h"
#include "base/failpoint.h"
#include "transport/hangup.h"

namespace roundel::transport {
namespace {

// Credit is counted in units, so that 32 bits of a header hold it. The sum of all peers' credits stays below kAllCredit in a
// job of up to 64 ranks.
constexpr size_t kUnit = 64;
constexpr size_t kAllCredit = 64u << 20, kLeastCredit = 1u << 20, kMostCredit = 8u << 20;
constexpr uint32_t kBookkeeping = 2;       // units that a message of no bytes costs its receiver
constexpr size_t kMaxAnnounced = 64;       // point-to-point messages announced to one peer at a time; the rest wait unannounced
constexpr size_t kWorthATurn = 32u << 10;  // smaller payloads do not keep a socket busy
constexpr double kClosing = 1;             // seconds without a byte, after the end of one of several channels of a peer
constexpr unsigned kAllLooks = 16;         // polls, of which one looks for what nobody waits for
constexpr double kHangUp = 0.1;            // seconds for what was written to arrive, where the peer has nothing to tell us
constexpr double kHangUpWithNews = 5;      // and where it may: its frame would meet a closed socket, which destroys the rest

uint16_t short_of(uint32_t hash) { return static_cast<uint16_t>(hash ^ hash >> 16); }

uint32_t units_of(size_t bytes) { return static_cast<uint32_t>((bytes + kUnit - 1) / kUnit) + kBookkeeping; }

}  // namespace

size_t credit_bytes(int size) { return std::clamp(kAllCredit / static_cast<size_t>(size), kLeastCredit, kMostCredit); }

struct StreamTransport::Peer {
  int rank = -1;
  std::vector<std::unique_ptr<Stripe>> stripes;
  size_t next_stripe = 0;
  Wake wake = Wake::ByDescriptor;
  Clock::time_point quiet_since{};  // since a channel of several has ended, or has moved bytes after that

  std::map<Key, Posted> posted;
  std::map<Key, Early> early;
  std::map<Key, Announced> announced;  // its messages that wait for our receives
  size_t early_bytes = 0;

  std::map<Key, Waiting> waiting;  // our messages that it has to grant
  std::deque<Waiting> held;        // point-to-point messages that are not announced yet
  size_t announced_transfers = 0;

  // Units of all unasked messages, modulo 2^32: sent by us, consumed by it as far as we know; consumed by us,
  // and as it knows.
  uint32_t sent = 0, acknowledged = 0, consumed = 0, told = 0;
  bool telling = false;  // a frame for that is queued
  uint32_t in_flight() const { return sent - acknowledged; }

  bool awaits() const { return !posted.empty() || !waiting.empty(); }
  bool sending() const {
    return std::any_of(stripes.begin(), stripes.end(), [](const auto& stripe) { return stripe->owes(); });
  }
  bool ended() const {
    return std::all_of(stripes.begin(), stripes.end(), [](const auto& stripe) { return stripe->closed(); });
  }
  // Nothing comes any more; also when a single channel has ended and the others did not follow.
  bool gone() {
    if (ended()) return true;
    if (std::none_of(stripes.begin(), stripes.end(), [](const auto& stripe) { return stripe->closed(); })) return false;
    if (quiet_since == Clock::time_point{}) quiet_since = Clock::now();
    return Clock::now() - quiet_since > std::chrono::duration<double>(kClosing);
  }
};

StreamTransport::StreamTransport(const Identity& identity, std::vector<Channels> channels, Doorbell* bell, double spin_seconds)
    : identity_(identity),
      credit_(static_cast<uint32_t>(credit_bytes(identity.size) / kUnit)),
      peers_(channels.size()),
      bell_(bell),
      backoff_(spin_seconds),
      epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
  if (!epoll_) throw system_error("epoll_create1", errno);
  const bool crc = env::flag("ROUNDEL_CRC");
  epoll_event bell_event{EPOLLIN, {.ptr = nullptr}};
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, bell_->event(), &bell_event) != 0) throw system_error("epoll_ctl", errno);
  for (size_t r = 0; r < channels.size(); ++r) {
    Peer& peer = peers_[r];
    peer.rank = static_cast<int>(r);
    for (auto& channel : channels[r]) add(std::make_unique<ByteStripe>(identity_.rank, peer.rank, std::move(channel), crc));
  }
}

void StreamTransport::add(std::unique_ptr<Stripe> stripe) {
  Peer& peer = peer_at(stripe->peer());
  if (peer.stripes.empty()) connected_.push_back(&peer);
  peer.wake = stripe->wake();
  looks_ |= peer.wake == Wake::ByLooking;
  if (const int descriptor = stripe->descriptor(); descriptor >= 0) {
    epoll_event event{EPOLLIN, {.ptr = stripe.get()}};
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, descriptor, &event) != 0) throw system_error("epoll_ctl", errno);
  }
  peer.stripes.push_back(std::move(stripe));
}

StreamTransport::~StreamTransport() {
  if (abandoned_) return;
  std::vector<int> sockets;
  double seconds = kHangUp;
  for (const Peer* peer : connected_)
    for (const auto& stripe : peer->stripes) {
      if (stripe->closed() || stripe->socket() < 0) continue;
      sockets.push_back(stripe->socket());
      if (peer->in_flight() > credit_ / 4) seconds = kHangUpWithNews;
    }
  hang_up(std::move(sockets), seconds);
  if (!looks_) return;
  std::vector<Stripe*> open;
  for (const Peer* peer : connected_)
    for (const auto& stripe : peer->stripes) open.push_back(stripe.get());
  for (Stripe* stripe : open) stripe->end();
  for (const Deadline deadline = Deadline::after(seconds); !open.empty() && !deadline.passed(); ::usleep(kShortestNap))
    std::erase_if(open, [](Stripe* stripe) { return stripe->ended(); });
}

StreamTransport::Peer& StreamTransport::peer_at(int rank) { return peers_[static_cast<size_t>(rank)]; }

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

// All messages of a collective have one signature, so a peer's that differs is noticed as soon as it comes.
void StreamTransport::note(const Tag& tag) {
  if (tag.sequence < kPointToPoint) current_ = tag;
}

// -- sending

void StreamTransport::queue(Peer& peer, const Tag& tag, uint64_t length, uint16_t flags, ConstBytes payload,
                            std::optional<Ticket> ticket) {
  // The stripe with the least to do; among equals in turn for what is worth a turn.
  const size_t count = peer.stripes.size();
  size_t best = peer.next_stripe;
  for (size_t i = 1; i < count; ++i) {
    const size_t other = (peer.next_stripe + i) % count;
    if (peer.stripes[other]->queued_bytes() < peer.stripes[best]->queued_bytes()) best = other;
  }
  if (payload.size() >= kWorthATurn) peer.next_stripe = (best + 1) % count;
  Stripe& stripe = *peer.stripes[best];
  const bool first = stripe.idle();
  FrameHeader header = make_header(identity_.epoch, identity_.rank, tag, length, flags);
  header.history = short_of(history_);
  if (diverged_ >= 0) header.flags |= kDiverged;
  stripe.queue({header, payload, ticket});
  if (first) flush(peer, stripe);
}

void StreamTransport::send_eagerly(Peer& peer, const Waiting& message) {
  peer.sent += units_of(message.bytes.size());
  queue(peer, message.tag, message.bytes.size(), 0, message.bytes, message.ticket);
}

void StreamTransport::announce(Peer& peer, const Waiting& message) {
  const bool fresh = peer.waiting.try_emplace({message.tag.sequence, message.tag.index}, message).second;
  ROUNDEL_CHECK(fresh);
  if (message.tag.sequence >= kPointToPoint) ++peer.announced_transfers;
  queue(peer, message.tag, message.bytes.size(), kAnnounces, {}, std::nullopt);
}

Ticket StreamTransport::send(int peer_rank, const Tag& tag, ConstBytes bytes) {
  ROUNDEL_CHECK(bytes.size() <= kMaxPayload && peer_rank != identity_.rank);
  const Waiting message{tag, bytes, open_ticket()};
  note(tag);
  Peer& peer = peer_at(peer_rank);
  if (peer.in_flight() + uint64_t{units_of(bytes.size())} > credit_ / 2)  // who only sends reads here what was consumed
    for (const auto& stripe : peer.stripes) pump(*stripe);
  const bool transfer = tag.sequence >= kPointToPoint;
  if (transfer && (!peer.held.empty() || peer.announced_transfers >= kMaxAnnounced))
    peer.held.push_back(message);
  else if (peer.in_flight() + uint64_t{units_of(bytes.size())} > credit_)
    announce(peer, message);
  else
    send_eagerly(peer, message);
  failpoint::pass(failpoint::Point::StreamQueued);
  return message.ticket;
}

void StreamTransport::release_held(Peer& peer) {
  while (!peer.held.empty()) {
    const Waiting message = peer.held.front();
    const bool fits = peer.in_flight() + uint64_t{units_of(message.bytes.size())} <= credit_ / 2;
    if (!fits && peer.announced_transfers >= kMaxAnnounced) return;
    peer.held.pop_front();
    if (fits)
      send_eagerly(peer, message);
    else
      announce(peer, message);
  }
}

void StreamTransport::before_write(Stripe& stripe, FrameHeader& header) {
  Peer& peer = peer_at(stripe.peer());
  header.credit = peer.told = peer.consumed;
  if ((header.flags & kCredits) != 0) peer.telling = false;
}

bool StreamTransport::flush(Peer& peer, Stripe& stripe) {
  try {
    return stripe.flush(*this);
  } catch (const PeerGone&) {
    if (!stripe.owes()) {  // it does not care any more; what it has sent is still to be read
      stripe.drop_output();
      return false;
    }
    stripe.close();
    raise_gone(peer);
  }
}

// -- receiving

Ticket StreamTransport::recv(int peer_rank, const Tag& tag, Bytes bytes) {
  ROUNDEL_CHECK(bytes.size() <= kMaxPayload && peer_rank != identity_.rank);
  const Ticket ticket = open_ticket();
  note(tag);
  Peer& peer = peer_at(peer_rank);
  const Key key{tag.sequence, tag.index};
  // Any message of this operation shows its signature.
  if (const auto first = peer.early.lower_bound({tag.sequence, 0});
      first != peer.early.end() && first->first.first == tag.sequence && first->second.header.signature != tag.signature)
    raise_mismatch(peer_rank, tag.signature, first->second.header.signature);
  if (const auto first = peer.announced.lower_bound({tag.sequence, 0});
      first != peer.announced.end() && first->first.first == tag.sequence && first->second.header.signature != tag.signature)
    raise_mismatch(peer_rank, tag.signature, first->second.header.signature);

  const auto early = peer.early.find(key);
  if (early != peer.early.end()) {
    std::vector<std::byte>& message = early->second.bytes;
    if (message.size() != bytes.size()) raise_mismatch(peer_rank, tag.signature, early->second.header.signature);
    check_history(peer, early->second.header);
    peer.early_bytes -= message.size();
    const auto half =
        std::find_if(peer.stripes.begin(), peer.stripes.end(), [&](const auto& stripe) { return stripe->keeps(key); });
    if (half != peer.stripes.end()) {  // half of it is here: the rest goes straight to its place
      (*half)->redirect(key, bytes);
      peer.posted.try_emplace(key, Posted{tag.signature, bytes, ticket, true});
    } else {
      std::copy(message.begin(), message.end(), bytes.begin());
      close_ticket(ticket);
      consume(peer, bytes.size());
    }
    peer.early.erase(early);
    return ticket;
  }
  const bool fresh = peer.posted.try_emplace(key, Posted{tag.signature, bytes, ticket}).second;
  ROUNDEL_CHECK(fresh);
  if (const auto found = peer.announced.find(key); found != peer.announced.end()) {
    const auto [header, holder] = found->second;
    if (header.length != bytes.size()) raise_mismatch(peer_rank, tag.signature, header.signature);
    check_history(peer, header);
    peer.announced.erase(found);
    if (holder != nullptr) {
      peer.posted[key].arriving = true;
      holder->claim(header, bytes);
    } else {
      queue(peer, tag, bytes.size(), kGrants, {}, std::nullopt);
    }
  }
  return ticket;
}

// A message that came unasked has its place. Its sender learns of it by whatever we send next, or else in a frame of its own.
void StreamTransport::consume(Peer& peer, size_t bytes) {
  peer.consumed += units_of(bytes);
  if (peer.telling || peer.consumed - peer.told <= credit_ / 4) return;
  if (std::any_of(peer.stripes.begin(), peer.stripes.end(), [](const auto& stripe) { return stripe->closed(); })) return;
  peer.telling = true;
  queue(peer, {}, 0, kCredits, {}, std::nullopt);
}

// Throws when a message shows that its sender called something else.
void StreamTransport::check_signature(const Peer& peer, const FrameHeader& header) {
  if (header.sequence <= retired_) raise_stale(peer.rank, header.sequence, header.signature);
  if (header.sequence == current_.sequence && header.signature != current_.signature)
    raise_mismatch(peer.rank, current_.signature, header.signature);
  const auto posted = peer.posted.lower_bound({header.sequence, 0});
  if (posted != peer.posted.end() && posted->first.first == header.sequence && posted->second.signature != header.signature)
    raise_mismatch(peer.rank, posted->second.signature, header.signature);
  if (header.sequence == current_.sequence) check_history(peer, header);
}

// Raises nothing yet: those who see the difference itself say more, and this rank would not read what they say.
void StreamTransport::check_history(const Peer& peer, const FrameHeader& header) {
  if (header.sequence >= kPointToPoint) return;
  if (header.history != short_of(history_) || (header.flags & kDiverged) != 0) diverged_ = peer.rank;
}

void StreamTransport::announced(Peer& peer, const FrameHeader& header) {
  check_signature(peer, header);
  const Key key{header.sequence, header.index};
  const auto posted = peer.posted.find(key);
  if (posted == peer.posted.end()) {
    peer.announced[key] = {header, nullptr};
    return;
  }
  if (posted->second.into.size() != header.length) raise_mismatch(peer.rank, posted->second.signature, header.signature);
  queue(peer, {header.sequence, header.index, header.signature}, header.length, kGrants, {}, std::nullopt);
}

void StreamTransport::granted(Peer& peer, const FrameHeader& header) {
  const auto found = peer.waiting.find({header.sequence, header.index});
  if (found == peer.waiting.end())
    throw CorruptFrame(format("rank %d: rank %d asks for a message that was not announced to it", identity_.rank, peer.rank));
  const Waiting message = found->second;
  peer.waiting.erase(found);
  if (header.sequence >= kPointToPoint) --peer.announced_transfers;
  queue(peer, message.tag, message.bytes.size(), kGranted, message.bytes, message.ticket);
  release_held(peer);
}

Bytes StreamTransport::begin_payload(Stripe& stripe, const FrameHeader& header) {
  Peer& peer = peer_at(stripe.peer());
  stripe.fate = Stripe::Fate::Dropped;
  if (header.epoch != identity_.epoch) {  // from before a restart: read and forget
    stripe.dropped.resize(payload_bytes(header));
    return stripe.dropped;
  }
  if (static_cast<int32_t>(header.credit - peer.acknowledged) > 0) {  // headers of several stripes may overtake each other
    peer.acknowledged = header.credit;
    release_held(peer);
  }
  if ((header.flags & kCredits) != 0) return {};
  if ((header.flags & kAnnounces) != 0) return announced(peer, header), Bytes{};
  if ((header.flags & kGrants) != 0) return granted(peer, header), Bytes{};
  check_signature(peer, header);
  const Key key{header.sequence, header.index};
  const auto posted = peer.posted.find(key);
  if (posted != peer.posted.end() ? posted->second.arriving : peer.early.contains(key) || peer.announced.contains(key))
    throw CorruptFrame(format("rank %d: a message from rank %d came twice (%s)", identity_.rank, peer.rank,
                              header.signature.describe().c_str()));
  if (posted != peer.posted.end()) {
    if (posted->second.into.size() != header.length) raise_mismatch(peer.rank, posted->second.signature, header.signature);
    stripe.fate = Stripe::Fate::Posted;
    posted->second.arriving = true;
    return posted->second.into;
  }
  // Who sends to a peer may count on its taking it up; ranks of a collective all come to their receives.
  if (header.sequence < kPointToPoint && stripe.can_hold(header)) {
    peer.announced[key] = {header, &stripe};
    stripe.fate = Stripe::Fate::Held;
    return {};
  }
  if (peer.early_bytes + header.length > credit_ * kUnit)
    throw CorruptFrame(format("rank %d: rank %d sends more than it has credit for", identity_.rank, peer.rank));
  Early& early = peer.early[key];
  early.header = header;
  early.bytes.resize(header.length);
  peer.early_bytes += header.length;
  stripe.fate = Stripe::Fate::Early;
  return early.bytes;
}

void StreamTransport::finish_payload(Stripe& stripe, const FrameHeader& header) {
  failpoint::pass(failpoint::Point::StreamMatched);
  Peer& peer = peer_at(stripe.peer());
  if (stripe.fate != Stripe::Fate::Posted) return;
  const auto posted = peer.posted.find({header.sequence, header.index});
  close_ticket(posted->second.ticket);
  peer.posted.erase(posted);
  if ((header.flags & kGranted) == 0) consume(peer, header.length);
}

bool StreamTransport::pump(Stripe& stripe) {
  if (stripe.closed()) return false;
  const bool moved = stripe.pump(*this);
  if (moved) peer_at(stripe.peer()).quiet_since = {};
  if (stripe.closed() && stripe.descriptor() >= 0) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, stripe.descriptor(), nullptr);
  return moved;
}

// -- waiting

bool StreamTransport::poll() {
  bool moved = false;
  const bool looks_around = ++looked_ % kAllLooks == 0;  // also for what nobody waits for
  for (Peer* peer : connected_) {
    for (const auto& stripe : peer->stripes)
      if (!stripe->idle()) moved |= flush(*peer, *stripe);
    if (peer->wake == Wake::ByBell || peer->awaits() || (peer->wake == Wake::ByLooking && looks_around))
      for (const auto& stripe : peer->stripes) moved |= pump(*stripe);
    if ((peer->awaits() || peer->sending()) && peer->gone()) raise_gone(*peer);
  }
  if (moved) {
    backoff_.reset();
    nap_microseconds_.store(kShortestNap, std::memory_order_relaxed);
  }
  return moved;
}

void StreamTransport::sleep(Deadline deadline, const Disturbed& disturbed) {
  if (backoff_.again()) return;
  if (arm(disturbed)) {
    if (looks_) nap();
    wait_for_events(looks_ ? 0 : deadline.milliseconds_left(100));
  }
  bell_->awake();
  backoff_.reset();
}

bool StreamTransport::arm(const Disturbed& disturbed) {
  bell_->announce_event_sleep();
  if (poll() || disturbed()) return false;
  watch_writable();
  return true;
}

void StreamTransport::doze() {
  if (looks_) return nap();
  epoll_event events[1];
  ::epoll_wait(epoll_.get(), events, 1, 100);
}

void StreamTransport::awake() {
  wait_for_events(0);
  bell_->awake();
}

void StreamTransport::nap() {
  const long microseconds = nap_microseconds_.load(std::memory_order_relaxed);
  nap_microseconds_.store(std::min(2 * microseconds, kLongestNap), std::memory_order_relaxed);
  pollfd events{epoll_.get(), POLLIN, 0};
  const timespec time{0, microseconds * 1000};
  ::ppoll(&events, 1, &time, nullptr);
}

// Takes up bytes that nobody has asked for yet too: else they would end every sleep.
void StreamTransport::wait_for_events(int milliseconds) {
  epoll_event events[16];
  const int ready = ::epoll_wait(epoll_.get(), events, 16, milliseconds);
  for (int i = 0; i < ready; ++i)
    if (auto* stripe = static_cast<Stripe*>(events[i].data.ptr); stripe != nullptr) pump(*stripe);
}

void StreamTransport::watch_writable() {
  for (Peer* peer : connected_) {
    if (peer->wake != Wake::ByDescriptor) continue;
    for (const auto& stripe : peer->stripes) {
      if (stripe->closed() || stripe->wants_write == !stripe->idle()) continue;
      stripe->wants_write = !stripe->idle();
      epoll_event event{EPOLLIN | (stripe->wants_write ? EPOLLOUT : 0u), {.ptr = stripe.get()}};
      ::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, stripe->descriptor(), &event);
    }
  }
}

void StreamTransport::retire(const Tag& tag) {
  failpoint::pass(failpoint::Point::StreamRetire);
  retired_ = tag.sequence;
  remembered_[tag.sequence % kRemembered] = tag.signature;
  for (const Peer* peer : connected_) {
    if (const auto first = peer->early.begin(); first != peer->early.end() && first->first.first <= retired_)
      raise_stale(peer->rank, first->first.first, first->second.header.signature);
    if (const auto first = peer->announced.begin(); first != peer->announced.end() && first->first.first <= retired_)
      raise_stale(peer->rank, first->first.first, first->second.header.signature);
  }
  if (diverged_ >= 0)
    throw Diverged(
        format("rank %d: rank %d had called something else before %s (operation %llu), or knew of a rank that had; "
               "this rank's last operations were %s and this one",
               identity_.rank, diverged_, tag.signature.describe().c_str(), static_cast<unsigned long long>(tag.sequence),
               remembered_[(tag.sequence - 1) % kRemembered].describe().c_str()));
  history_ = crc32c(&tag.signature, sizeof tag.signature, history_);
}

std::vector<int> StreamTransport::waiting_for() const {
  std::vector<int> ranks;
  for (const Peer* peer : connected_)
    if (peer->awaits() || peer->sending()) ranks.push_back(peer->rank);
  return ranks;
}

bool StreamTransport::exhausted(int peer_rank) const {
  const Peer& peer = peers_[static_cast<size_t>(peer_rank)];
  return peer.stripes.empty() || peer.wake == Wake::ByBell || peer.ended() || peer.sending() || !peer.waiting.empty();
}

size_t StreamTransport::kept_bytes(int peer) const { return peers_[static_cast<size_t>(peer)].early_bytes; }

void StreamTransport::abandon() {
  abandoned_ = true;
  for (Peer* peer : connected_) {
    for (const auto& stripe : peer->stripes) stripe->close();
    peer->posted.clear();
    peer->early.clear();
    peer->announced.clear();
    peer->waiting.clear();
    peer->held.clear();
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
