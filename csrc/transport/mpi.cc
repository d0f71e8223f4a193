#include "transport/mpi.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "base/clock.h"
#include "base/copy.h"
#include "base/error.h"
#include "base/log.h"

namespace roundel::transport {
namespace {

// Longer messages than this MPI libraries hand over in a second step, when the receive is there: Open MPI's over shared memory
// take 4096 bytes less its headers at once, others more.
constexpr size_t kAtOnce = 4000;
constexpr size_t kMessages = 3;  // of that size that a short payload may take
constexpr size_t kSlots = 8;     // receives posted for them, so that what comes between two looks finds its place
constexpr size_t kUnderWay = 8;  // frames sent at a time
static_assert(1 + kUnderWay <= kTagsPerWorld);
constexpr size_t kTurn = 16;                // messages; then another peer has its turn
constexpr double kClosingSeconds = 0.1;     // after a failure, for transfers that are under way from or to the caller's memory
constexpr uint32_t kEndMagic = 0x21444e45;  // "END!" in place of a frame's

struct Announcement {
  FrameHeader frame;
  uint64_t way = 0;  // on which tag a long payload follows
};
constexpr size_t kFirst = kAtOnce - sizeof(Announcement);      // payload in a frame's first message
constexpr size_t kShort = kFirst + (kMessages - 1) * kAtOnce;  // payloads that come in messages of that kind

using Slot = std::array<std::byte, kAtOnce>;

// Requests that MPI has not ended, and the memory that they write to or read from: kept, because MPI may still do so.
struct Remains {
  std::vector<Mpi::Request> requests;
  std::vector<std::unique_ptr<Slot>> slots;
  std::vector<std::vector<std::byte>> others;
};
void keep_for_ever(Remains remains) {
  if (!remains.requests.empty()) new Remains(std::move(remains));
}

class MpiStripe final : public Stripe {
 public:
  MpiStripe(const Identity& identity, int peer, std::shared_ptr<MpiNumber> number, int mpi_rank)
      : Stripe(identity.rank, peer, Wake::ByLooking),
        number_(std::move(number)),
        mpi_(number_->job().mpi()),
        mpi_rank_(mpi_rank) {
    for (Receive& receive : receives_) {
      receive.slot = std::make_unique<Slot>();
      post(receive);
    }
  }
  ~MpiStripe() override { release(0); }

  bool idle() const override { return out_.empty() && sends_.empty(); }
  bool flush(FrameSink& sink) override;
  bool pump(FrameSink& sink) override;
  bool keeps(const Key& key) const override { return Stripe::keeps(key) || find_long(key) != longs_.size(); }
  void redirect(const Key& key, Bytes into) override;
  // Some ways stay free for what is waited for.
  bool can_hold(const FrameHeader& header) const override { return header.length > kShort && held_.size() < kUnderWay / 2; }
  void claim(const FrameHeader& header, Bytes into) override;
  void close() override {
    Stripe::close();
    release(kClosingSeconds);
  }
  void end() override;
  bool ended() override;

 private:
  struct Send {
    std::unique_ptr<Slot> slot;
    std::array<Mpi::Request, kMessages> requests{};
    size_t begun = 0, done = 0;  // of them
    std::optional<size_t> way{};
    std::optional<Ticket> ticket{};
    size_t bytes = 0;  // of queued_bytes_
    size_t owed = 0;   // of owed_
  };
  struct Receive {
    std::unique_ptr<Slot> slot;
    Mpi::Request request = 0;
  };
  struct Long {
    FrameHeader header;
    Fate fate;
    Mpi::Request request;
    Bytes into;
    std::vector<std::byte> own;  // where it comes first if nobody waits for it yet, and stays if nobody wants it
  };

  // An error of MPI's own is the end of this way; what has happened to the peer the monitor knows better.
  template <class Call>
  std::invoke_result_t<Call> ask(Call call) {
    try {
      return call();
    } catch (const Error& error) {
      log::info(format("the way to rank %d ends: %s", peer_, error.what()));
      release(0);
      throw PeerGone{};
    }
  }
  void post(Receive& receive) {
    receive.request = ask([&] { return mpi_.receive(comm(), mpi_rank_, number_->tag(0), receive.slot->data(), kAtOnce); });
  }
  Mpi::Comm comm() const { return number_->job().comm(); }
  int tag_of(size_t way) const { return number_->tag(1 + static_cast<int>(way)); }
  std::unique_ptr<Slot> take_slot();
  void send(FrameSink& sink, Outgoing& frame);
  bool has_left(Send& send);
  void take_message(FrameSink& sink);
  // Of those that are kept for later: which of longs_, or past its end.
  size_t find_long(const Key& key) const;
  void take_first(FrameSink& sink, const Slot& slot);
  void take_bytes(FrameSink& sink, const std::byte* data, size_t most);
  void receive_long(const FrameHeader& header, size_t way, Bytes into);
  bool finish_longs(FrameSink& sink);
  void release(double seconds) noexcept;

  std::shared_ptr<MpiNumber> number_;
  Mpi& mpi_;
  int mpi_rank_;
  std::vector<Send> sends_;
  std::array<bool, kUnderWay> taken_{};  // ways
  std::vector<std::unique_ptr<Slot>> free_slots_;
  std::array<Receive, kSlots> receives_;
  size_t next_ = 0;             // of them
  size_t got_ = 0;              // while in_payload_
  std::map<Key, size_t> held_;  // ways
  std::vector<Long> longs_;
  bool end_came_ = false;
  bool released_ = false;
};

std::unique_ptr<Slot> MpiStripe::take_slot() {
  if (free_slots_.empty()) return std::make_unique<Slot>();
  auto slot = std::move(free_slots_.back());
  free_slots_.pop_back();
  return slot;
}

// A long payload's send ends when its receive is there, and with it the use of its tag: its receiver may leave it for later.
void MpiStripe::send(FrameSink& sink, Outgoing& frame) {
  sink.before_write(*this, frame.header);
  seal(frame.header, frame.payload, false);
  Send& send = sends_.emplace_back();
  send.slot = take_slot();
  send.ticket = frame.ticket;
  send.bytes = sizeof(FrameHeader) + frame.payload.size();
  send.owed = (frame.header.flags & kCredits) == 0;
  const bool is_short = frame.payload.size() <= kShort;
  Announcement announcement{frame.header};
  if (!is_short) {
    announcement.way = static_cast<size_t>(std::find(taken_.begin(), taken_.end(), false) - taken_.begin());
    send.way = announcement.way;
    taken_[announcement.way] = true;
  }
  const auto begin = [&](const std::byte* data, size_t bytes) {
    send.requests[send.begun] = ask([&] { return mpi_.send(comm(), mpi_rank_, number_->tag(0), data, bytes); });
    ++send.begun;
  };
  const ConstBytes payload = frame.payload;
  const size_t first = is_short ? std::min(payload.size(), kFirst) : 0;
  std::memcpy(send.slot->data(), &announcement, sizeof announcement);
  if (first > 0) std::memcpy(send.slot->data() + sizeof announcement, payload.data(), first);
  begin(send.slot->data(), sizeof announcement + first);
  if (is_short) {
    for (size_t at = first; at < payload.size(); at += kAtOnce)
      begin(payload.data() + at, std::min(kAtOnce, payload.size() - at));
  } else {
    send.requests[1] = ask(
        [&] { return mpi_.send_when_received(comm(), mpi_rank_, tag_of(announcement.way), payload.data(), payload.size()); });
    ++send.begun;
  }
}

bool MpiStripe::has_left(Send& send) {
  while (send.done < send.begun && ask([&] { return mpi_.test(send.requests[send.done]); })) ++send.done;
  return send.done == send.begun;
}

bool MpiStripe::flush(FrameSink& sink) {
  bool moved = false;
  for (size_t i = 0; !released_ && (i < sends_.size() || (!out_.empty() && i < kUnderWay));) {
    if (i == sends_.size()) {
      send(sink, out_.front());
      out_.pop_front();
      moved = true;
    }
    Send& left = sends_[i];
    if (!has_left(left)) {
      ++i;
      continue;
    }
    queued_bytes_ -= left.bytes;
    owed_ -= left.owed;
    if (left.way) taken_[*left.way] = false;
    if (left.ticket) sink.written(*left.ticket);
    free_slots_.push_back(std::move(left.slot));
    sends_.erase(sends_.begin() + static_cast<ptrdiff_t>(i));
    moved = true;
  }
  return moved;
}

void MpiStripe::receive_long(const FrameHeader& header, size_t way, Bytes into) {
  std::vector<std::byte> own(fate == Fate::Posted ? 0 : into.size());
  std::byte* data = own.empty() ? into.data() : own.data();
  const auto request = ask([&] { return mpi_.receive(comm(), mpi_rank_, tag_of(way), data, into.size()); });
  longs_.push_back({header, fate, request, into, std::move(own)});
}

size_t MpiStripe::find_long(const Key& key) const {
  const auto found = std::find_if(longs_.begin(), longs_.end(), [&](const Long& each) {
    return each.fate == Fate::Early && Key{each.header.sequence, each.header.index} == key;
  });
  return static_cast<size_t>(found - longs_.begin());
}

void MpiStripe::claim(const FrameHeader& header, Bytes into) {
  const auto held = held_.find({header.sequence, header.index});
  const size_t way = held->second;
  held_.erase(held);
  const Fate of_other = std::exchange(fate, Fate::Posted);
  receive_long(header, way, into);
  fate = of_other;
}

void MpiStripe::take_bytes(FrameSink& sink, const std::byte* data, size_t most) {
  const size_t n = std::min(most, into_.size() - got_);
  if (n > 0) std::memcpy(into_.data() + got_, data, n);
  got_ += n;
  if (got_ < into_.size()) return;
  in_payload_ = false;
  sink.finish_payload(*this, header_);
}

void MpiStripe::take_first(FrameSink& sink, const Slot& slot) {
  Announcement announcement;
  std::memcpy(&announcement, slot.data(), sizeof announcement);
  header_ = announcement.frame;
  if (header_.magic == kEndMagic) {
    end_came_ = true;
    return;
  }
  validate(header_, peer_);
  if (announcement.way >= kUnderWay) throw CorruptFrame(format("rank %d: rank %d names a tag that it has not", rank_, peer_));
  into_ = sink.begin_payload(*this, header_);
  const size_t bytes = payload_bytes(header_);
  if (fate == Fate::Held && bytes > kShort) {
    held_[{header_.sequence, header_.index}] = announcement.way;
    return;
  }
  ROUNDEL_CHECK(into_.size() == bytes);
  if (bytes > kShort) return receive_long(header_, announcement.way, into_);
  in_payload_ = true;
  got_ = 0;
  take_bytes(sink, slot.data() + sizeof announcement, kFirst);
}

// Messages of frames come in the order in which they were sent.
void MpiStripe::take_message(FrameSink& sink) {
  Receive& receive = receives_[next_];
  if (in_payload_)
    take_bytes(sink, receive.slot->data(), kAtOnce);
  else
    take_first(sink, *receive.slot);
  if (end_came_) return;
  post(receive);
  next_ = (next_ + 1) % kSlots;
}

bool MpiStripe::finish_longs(FrameSink& sink) {
  bool moved = false;
  for (size_t i = 0; i < longs_.size();) {
    if (!ask([&] { return mpi_.test(longs_[i].request); })) {
      ++i;
      continue;
    }
    const Long done = std::move(longs_[i]);
    longs_.erase(longs_.begin() + static_cast<ptrdiff_t>(i));
    if (done.fate != Fate::Dropped && !done.own.empty()) copy_bytes(done.into.data(), done.own.data(), done.into.size());
    const Fate of_other = std::exchange(fate, done.fate);
    sink.finish_payload(*this, done.header);
    fate = of_other;
    moved = true;
  }
  return moved;
}

bool MpiStripe::pump(FrameSink& sink) {
  bool moved = false;
  try {
    for (size_t turn = 0; turn < kTurn && !end_came_ && !released_; ++turn) {
      if (!ask([&] { return mpi_.test(receives_[next_].request); })) break;
      take_message(sink);
      moved = true;
    }
    moved |= finish_longs(sink);
    closed_ |= end_came_ && longs_.empty();
  } catch (const PeerGone&) {
    closed_ = true;
  }
  return moved;
}

void MpiStripe::redirect(const Key& key, Bytes into) {
  if (const size_t at = find_long(key); at < longs_.size()) {
    longs_[at].into = into;
    longs_[at].fate = Fate::Posted;
    return;
  }
  std::copy_n(into_.begin(), got_, into.begin());
  into_ = into;
  fate = Fate::Posted;
}

void MpiStripe::end() {
  if (closed_ || released_) return;
  Announcement announcement;
  announcement.frame.magic = kEndMagic;
  Send& goodbye = sends_.emplace_back();
  goodbye.slot = take_slot();
  std::memcpy(goodbye.slot->data(), &announcement, sizeof announcement);
  try {
    goodbye.requests[0] =
        ask([&] { return mpi_.send(comm(), mpi_rank_, number_->tag(0), goodbye.slot->data(), sizeof announcement); });
    goodbye.begun = 1;
  } catch (const PeerGone&) {  // it needs none
  }
}

// What else comes is dropped: frames that tell of credit.
bool MpiStripe::ended() {
  try {
    while (!released_ && !sends_.empty() && has_left(sends_.front())) sends_.erase(sends_.begin());
    while (!released_ && !closed_ && !in_payload_ && ask([&] { return mpi_.test(receives_[next_].request); })) {
      FrameHeader header;
      std::memcpy(&header, receives_[next_].slot->data(), sizeof header);
      closed_ = header.magic == kEndMagic;
      post(receives_[next_]);
      next_ = (next_ + 1) % kSlots;
    }
  } catch (const PeerGone&) {
  }
  return released_ || (sends_.empty() && closed_);
}

// Withdraws what is posted. A transfer that has begun from or to the caller's memory may take a moment to end.
void MpiStripe::release(double seconds) noexcept {
  if (std::exchange(released_, true)) return;
  Remains remains;
  const auto withdraw = [&](Mpi::Request request) {
    mpi_.cancel(request);
    remains.requests.push_back(request);
  };
  try {
    for (size_t i = end_came_ ? 1 : 0; i < kSlots; ++i) {
      Receive& receive = receives_[(next_ + i) % kSlots];
      withdraw(receive.request);
      remains.slots.push_back(std::move(receive.slot));
    }
    for (Long& each : longs_) {
      withdraw(each.request);
      remains.others.push_back(std::move(each.own));
    }
    for (Send& send : sends_) {
      remains.requests.insert(remains.requests.end(), &send.requests[send.done], &send.requests[send.begun]);
      remains.slots.push_back(std::move(send.slot));
    }
    longs_.clear();
    sends_.clear();
    const Deadline deadline = Deadline::after(seconds);
    do {
      std::erase_if(remains.requests, [this](Mpi::Request& request) { return mpi_.test(request); });
    } while (!remains.requests.empty() && !deadline.passed() && ::usleep(50) == 0);
  } catch (const std::exception& error) {
    log::info(format("the way to rank %d ends: %s", peer_, error.what()));
  }
  keep_for_ever(std::move(remains));
}

}  // namespace

MpiNumber::MpiNumber(std::shared_ptr<MpiJob> job, uint32_t number) : job_(std::move(job)), number_(number) {
  job_->take_number(number);
}

MpiNumber::~MpiNumber() { job_->give_back_number(number_); }

std::vector<std::unique_ptr<Stripe>> open_mpi(const Identity& identity, const std::shared_ptr<MpiNumber>& number,
                                              const std::vector<int>& peers, const std::vector<int>& members) {
  std::vector<std::unique_ptr<Stripe>> stripes;
  for (const int peer : peers)
    stripes.push_back(std::make_unique<MpiStripe>(identity, peer, number, members[static_cast<size_t>(peer)]));
  return stripes;
}

}  // namespace roundel::transport
