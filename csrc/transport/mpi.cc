#include "transport/mpi.h"

#include <unistd.h>

#include <cstring>
#include <utility>

#include "base/clock.h"
#include "base/copy.h"
#include "base/error.h"
#include "base/log.h"

namespace roundel::transport {
namespace {

constexpr size_t kHeader = sizeof(FrameHeader);
constexpr size_t kTogether = 4u << 10;  // payload that travels in its header's message
constexpr size_t kSlots = 4;            // headers that may arrive between two looks without being unexpected to MPI
constexpr size_t kUnderWay = 8;         // frames sent at a time
constexpr int kStripes = 2;             // while one waits for a payload, the other takes the next
static_assert(2 * kStripes <= kTagsPerWorld);
constexpr size_t kTurn = 16;                // frames; then another peer has its turn
constexpr double kClosingSeconds = 0.1;     // after a failure, for transfers that are under way from or to the caller's memory
constexpr uint32_t kEndMagic = 0x21444e45;  // "END!" in place of a frame's

using Slot = std::array<std::byte, kHeader + kTogether>;

// Requests that MPI has not ended, and the memory that they write to or read from: kept, because MPI may still do so.
struct Remains {
  std::vector<Mpi::Request> requests;
  std::vector<std::unique_ptr<Slot>> slots;
  std::vector<std::byte> early;
};
void keep_for_ever(Remains remains) {
  if (!remains.requests.empty()) new Remains(std::move(remains));
}

class MpiStripe final : public Stripe {
 public:
  MpiStripe(const Identity& identity, int peer, std::shared_ptr<MpiNumber> number, int mpi_rank, int index)
      : Stripe(identity.rank, peer, Wake::ByLooking),
        number_(std::move(number)),
        mpi_(number_->job().mpi()),
        mpi_rank_(mpi_rank),
        header_tag_(number_->tag(2 * index)),
        payload_tag_(number_->tag(2 * index + 1)) {
    for (Receive& receive : receives_) {
      receive.slot = std::make_unique<Slot>();
      post(receive);
    }
  }
  ~MpiStripe() override { release(0); }

  bool idle() const override { return out_.empty() && sends_.empty(); }
  bool flush(FrameSink& sink) override;
  bool pump(FrameSink& sink) override;
  // What comes early comes into memory of this stripe's own, and goes to its place as a whole.
  void redirect(Bytes into) override { into_ = into; }
  void close() override {
    Stripe::close();
    release(kClosingSeconds);
  }
  void end() override;
  bool ended() override;

 private:
  struct Send {
    std::unique_ptr<Slot> slot;
    Mpi::Request header = 0, payload = 0;
    bool header_left = true, payload_left = true;
    std::optional<Ticket> ticket{};
    size_t bytes = 0;  // of queued_bytes_
    size_t owed = 0;   // of owed_
  };
  struct Receive {
    std::unique_ptr<Slot> slot;
    Mpi::Request request = 0;
  };

  void post(Receive& receive) {
    receive.request = mpi_.receive(comm(), mpi_rank_, header_tag_, receive.slot->data(), receive.slot->size());
  }
  Mpi::Comm comm() const { return number_->job().comm(); }
  std::unique_ptr<Slot> take_slot();
  void send(FrameSink& sink, Outgoing& frame);
  void receive(FrameSink& sink);
  void finish(FrameSink& sink);
  [[noreturn]] void raise_gone(const Error& error);
  bool is_done(Mpi::Request& request);
  Mpi::Request start_send(int tag, ConstBytes bytes);
  bool has_left(Send& send);
  void release(double seconds) noexcept;

  std::shared_ptr<MpiNumber> number_;
  Mpi& mpi_;
  int mpi_rank_, header_tag_, payload_tag_;
  std::deque<Send> sends_;
  std::vector<std::unique_ptr<Slot>> free_slots_;
  std::array<Receive, kSlots> receives_;
  size_t next_ = 0;           // of them
  Mpi::Request payload_ = 0;  // while in_payload_
  std::vector<std::byte> early_;
  bool into_early_ = false;  // the payload under way comes there first
  bool released_ = false;
};

// An error of MPI's own is the end of this way; what has happened to the peer the monitor knows better.
void MpiStripe::raise_gone(const Error& error) {
  log::info(format("the way to rank %d ends: %s", peer_, error.what()));
  release(0);
  throw PeerGone{};
}

bool MpiStripe::is_done(Mpi::Request& request) {
  try {
    return mpi_.test(request);
  } catch (const Error& error) {
    raise_gone(error);
  }
}

Mpi::Request MpiStripe::start_send(int tag, ConstBytes bytes) {
  try {
    return mpi_.send(comm(), mpi_rank_, tag, bytes.data(), bytes.size());
  } catch (const Error& error) {
    raise_gone(error);
  }
}

bool MpiStripe::has_left(Send& send) {
  if (!send.header_left) send.header_left = is_done(send.header);
  if (!send.payload_left) send.payload_left = is_done(send.payload);
  return send.header_left && send.payload_left;
}

std::unique_ptr<Slot> MpiStripe::take_slot() {
  if (free_slots_.empty()) return std::make_unique<Slot>();
  auto slot = std::move(free_slots_.back());
  free_slots_.pop_back();
  return slot;
}

void MpiStripe::send(FrameSink& sink, Outgoing& frame) {
  sink.before_write(*this, frame.header);
  seal(frame.header, frame.payload, false);
  const bool together = frame.payload.size() <= kTogether;
  Send& begun = sends_.emplace_back(take_slot());
  begun.ticket = frame.ticket;
  begun.bytes = kHeader + frame.payload.size();
  begun.owed = (frame.header.flags & kCredits) == 0;
  std::byte* message = begun.slot->data();
  std::memcpy(message, &frame.header, kHeader);
  if (together && !frame.payload.empty()) std::memcpy(message + kHeader, frame.payload.data(), frame.payload.size());
  begun.header = start_send(header_tag_, {message, kHeader + (together ? frame.payload.size() : 0)});
  begun.header_left = false;
  if (together) return;
  begun.payload = start_send(payload_tag_, frame.payload);
  begun.payload_left = false;
}

bool MpiStripe::flush(FrameSink& sink) {
  bool moved = false;
  while (!released_ && (!sends_.empty() || !out_.empty())) {
    if (!out_.empty() && sends_.size() < kUnderWay) {
      send(sink, out_.front());
      out_.pop_front();
    } else if (has_left(sends_.front())) {
      Send& left = sends_.front();
      queued_bytes_ -= left.bytes;
      owed_ -= left.owed;
      if (left.ticket) sink.written(*left.ticket);
      free_slots_.push_back(std::move(left.slot));
      sends_.pop_front();
    } else {
      break;
    }
    moved = true;
  }
  return moved;
}

void MpiStripe::finish(FrameSink& sink) {
  in_payload_ = false;
  sink.finish_payload(*this, header_);
}

// The header at the front, and its payload or the receive for it.
void MpiStripe::receive(FrameSink& sink) {
  Receive& receive = receives_[next_];
  std::memcpy(&header_, receive.slot->data(), kHeader);
  if (header_.magic == kEndMagic) {
    closed_ = true;
    return;
  }
  validate(header_, peer_);
  into_ = sink.begin_payload(*this, header_);
  ROUNDEL_CHECK(into_.size() == payload_bytes(header_));
  in_payload_ = true;
  const bool together = into_.size() <= kTogether;
  if (together && !into_.empty()) std::memcpy(into_.data(), receive.slot->data() + kHeader, into_.size());
  post(receive);
  next_ = (next_ + 1) % kSlots;
  if (together) return finish(sink);
  if (fate == Fate::Early) early_.resize(into_.size());
  payload_ = mpi_.receive(comm(), mpi_rank_, payload_tag_, fate == Fate::Early ? early_.data() : into_.data(), into_.size());
  into_early_ = fate == Fate::Early;
}

bool MpiStripe::pump(FrameSink& sink) {
  bool moved = false;
  try {
    for (size_t turn = 0; turn < kTurn && !closed_ && !released_; ++turn) {
      if (!is_done(in_payload_ ? payload_ : receives_[next_].request)) break;
      moved = true;
      if (!in_payload_) {
        receive(sink);
        continue;
      }
      if (into_early_) copy_bytes(into_.data(), early_.data(), into_.size());
      finish(sink);
    }
  } catch (const PeerGone&) {
    closed_ = true;
  }
  return moved;
}

void MpiStripe::end() {
  if (closed_ || released_) return;
  FrameHeader header;
  header.magic = kEndMagic;
  Send& goodbye = sends_.emplace_back(take_slot());
  std::memcpy(goodbye.slot->data(), &header, kHeader);
  try {
    goodbye.header = start_send(header_tag_, {goodbye.slot->data(), kHeader});
    goodbye.header_left = false;
  } catch (const PeerGone&) {  // it needs none
  }
}

// What else comes is dropped: frames that tell of credit.
bool MpiStripe::ended() {
  try {
    while (!released_ && !sends_.empty() && has_left(sends_.front())) sends_.pop_front();
    while (!released_ && !closed_ && !in_payload_ && is_done(receives_[next_].request)) {
      std::memcpy(&header_, receives_[next_].slot->data(), kHeader);
      closed_ = header_.magic == kEndMagic;
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
  try {
    for (size_t i = 0; i < kSlots; ++i) {
      Receive& receive = receives_[(next_ + i) % kSlots];
      mpi_.cancel(receive.request);
      remains.requests.push_back(receive.request);
      remains.slots.push_back(std::move(receive.slot));
    }
    if (in_payload_) {
      mpi_.cancel(payload_);
      remains.requests.push_back(payload_);
      remains.early = std::move(early_);
    }
    for (Send& send : sends_) {
      if (!send.header_left) remains.requests.push_back(send.header);
      if (!send.payload_left) remains.requests.push_back(send.payload);
      remains.slots.push_back(std::move(send.slot));
    }
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
    for (int i = 0; i < kStripes; ++i)
      stripes.push_back(std::make_unique<MpiStripe>(identity, peer, number, members[static_cast<size_t>(peer)], i));
  return stripes;
}

}  // namespace roundel::transport
