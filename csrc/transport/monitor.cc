#include "transport/monitor.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace roundel::transport {

// Control connections carry nothing but these, whole.
struct ControlMessage {
  static constexpr uint32_t kMagic = 0x4c544352;  // "RCTL"
  enum class Type : uint8_t { Trouble, Left };
  static constexpr int kMaxRanks = 24;  // more than these in one report are counted in its text only

  uint32_t magic = kMagic;
  uint32_t epoch = 0;
  int32_t about = -1;  // Left: who
  Type type = Type::Left;
  ErrorKind kind = ErrorKind::Generic;
  uint16_t rank_count = 0;
  int32_t ranks[kMaxRanks] = {};
  char text[400] = {};
};
static_assert(sizeof(ControlMessage) == 512);

namespace {

constexpr char kGoodbye = 'L';
constexpr double kVerdictSeconds = 0.3;  // a report by way of rank 0 takes milliseconds
constexpr double kSendSeconds = 1;  // a peer that does not even drain 512 bytes is as good as gone; its own host will notice

void insert_sorted(std::vector<int>& ranks, int rank) {
  const auto at = std::lower_bound(ranks.begin(), ranks.end(), rank);
  if (at == ranks.end() || *at != rank) ranks.insert(at, rank);
}

}  // namespace

Monitor::Monitor(const Identity& identity, std::map<int, Fd> controls, std::vector<Watch> watches, std::function<void()> wake)
    : identity_(identity),
      controls_(std::move(controls)),
      watches_(std::move(watches)),
      wake_(std::move(wake)),
      stop_event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      left_(static_cast<size_t>(identity.size)) {
  if (!stop_event_) throw system_error("eventfd", errno);
  thread_ = std::thread([this] { watch(); });
}

Monitor::~Monitor() {
  stop_ = true;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(stop_event_.get(), &one, sizeof one);
  thread_.join();
}

void Monitor::watch() {
  while (!stop_) {
    std::vector<pollfd> entries{{stop_event_.get(), POLLIN, 0}};
    for (const auto& [rank, fd] : controls_) entries.push_back({fd.get(), POLLIN, 0});
    for (const Watch& watch : watches_) {
      entries.push_back({watch.connection.get(), POLLIN, 0});
      entries.push_back({watch.process.get(), POLLIN, 0});
    }
    if (::poll(entries.data(), entries.size(), -1) < 0) continue;
    size_t at = 1;
    for (auto& [rank, fd] : controls_)
      if (entries[at++].revents != 0) read_control(rank, fd);
    for (Watch& watch : watches_) {
      const bool spoke = entries[at++].revents != 0, ended = entries[at++].revents != 0;
      if (spoke || ended) read_watch(watch, ended);
    }
  }
}

void Monitor::read_control(int rank, Fd& fd) {
  ControlMessage message;
  try {
    recv_all(fd.get(), &message, sizeof message, Deadline::after(kSendSeconds));
    if (message.magic != ControlMessage::kMagic || message.epoch != identity_.epoch ||
        message.rank_count > ControlMessage::kMaxRanks)
      throw Error("garbage on a control connection");
  } catch (const Error&) {
    {
      const std::lock_guard lock(mutex_);
      fd.reset();
    }
    return lost(rank, "closed its control connection");
  }
  if (message.type == ControlMessage::Type::Left) {
    if (message.about >= 0 && message.about < identity_.size) mark_left(message.about);
  } else {
    message.text[sizeof message.text - 1] = '\0';
    accept_trouble({message.kind, {message.ranks, message.ranks + message.rank_count}, message.text});
  }
  if (identity_.rank == 0) pass_on(message, rank);
}

// A process that leaves in order says goodbye before it ends: look for that word first.
void Monitor::read_watch(Watch& watch, bool process_ended) {
  char word = 0;
  const ssize_t got = watch.connection ? ::recv(watch.connection.get(), &word, 1, MSG_DONTWAIT) : 0;
  if (got == 1 && word == kGoodbye) return mark_left(watch.rank);
  const bool closed = got == 0 || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
  if (!closed && !process_ended) return;
  {
    const std::lock_guard lock(mutex_);
    watch.connection.reset();
    watch.process.reset();
  }
  lost(watch.rank,
       process_ended ? "ended without shutdown (killed, crashed or exited)" : "closed its connection without shutdown");
}

void Monitor::lost(int rank, const char* how) {
  {
    const std::lock_guard lock(mutex_);
    if (left_[static_cast<size_t>(rank)]) return;
  }
  const Trouble trouble{ErrorKind::PeerLost, {rank}, format("rank %d %s", rank, how)};
  accept_trouble(trouble);
  ControlMessage message;
  message.epoch = identity_.epoch;
  message.type = ControlMessage::Type::Trouble;
  message.kind = trouble.kind;
  message.rank_count = 1;
  message.ranks[0] = rank;
  std::strncpy(message.text, trouble.text.c_str(), sizeof message.text - 1);
  pass_on(message, rank);
}

void Monitor::accept_trouble(const Trouble& trouble) {
  {
    const std::lock_guard lock(mutex_);
    if (!troubled_.load(std::memory_order_relaxed)) {
      trouble_ = trouble;
      troubled_.store(true, std::memory_order_release);
    } else if (trouble_.kind == ErrorKind::PeerLost && trouble.kind == ErrorKind::PeerLost) {
      for (const int rank : trouble.ranks) insert_sorted(trouble_.ranks, rank);
    }
  }
  wake_();
}

void Monitor::mark_left(int rank) {
  {
    const std::lock_guard lock(mutex_);
    if (!left_[static_cast<size_t>(rank)]) {
      left_[static_cast<size_t>(rank)] = true;
      left_count_.fetch_add(1, std::memory_order_release);
    }
  }
  wake_();
}

void Monitor::pass_on(const ControlMessage& message, int except) {
  const std::lock_guard lock(mutex_);
  for (const auto& [rank, fd] : controls_) {
    if (rank == except || !fd) continue;
    try {
      send_all(fd.get(), &message, sizeof message, Deadline::after(kSendSeconds));
    } catch (const Error&) {
      // Its own death is noticed where it is watched.
    }
  }
}

void Monitor::raise_trouble(const std::string& during) const {
  if (!troubled()) return;
  const std::lock_guard lock(mutex_);
  const std::string text = format("rank %d: %s (noticed during %s)", identity_.rank, trouble_.text.c_str(), during.c_str());
  switch (trouble_.kind) {
    case ErrorKind::PeerLost:
      throw PeerLost(text, trouble_.ranks, identity_.epoch, during);
    case ErrorKind::Mismatch:
      throw Mismatch(text);
    case ErrorKind::CorruptFrame:
      throw CorruptFrame(text);
    case ErrorKind::Timeout:
      throw Timeout(text);
    default:
      throw Error(text);
  }
}

void Monitor::raise_if_left(const std::vector<int>& needed, const std::string& during) const {
  std::vector<int> gone;
  {
    const std::lock_guard lock(mutex_);
    for (const int rank : needed)
      if (left_[static_cast<size_t>(rank)]) gone.push_back(rank);
  }
  if (gone.empty()) return;
  throw PeerLost(format("rank %d: rank %s left the job (shutdown) while %s still needed it", identity_.rank,
                        join_ranks(gone).c_str(), during.c_str()),
                 gone, identity_.epoch, during);
}

void Monitor::await_trouble(const std::string& during) const {
  for (const Deadline deadline = Deadline::after(kVerdictSeconds); !deadline.passed(); ::poll(nullptr, 0, 1))
    raise_trouble(during);
}

void Monitor::report(const Error& error, const std::vector<int>& ranks) {
  if (troubled()) return;
  ControlMessage message;
  message.epoch = identity_.epoch;
  message.type = ControlMessage::Type::Trouble;
  message.kind = error.kind();
  message.rank_count = static_cast<uint16_t>(std::min<size_t>(ranks.size(), ControlMessage::kMaxRanks));
  std::copy_n(ranks.begin(), message.rank_count, message.ranks);
  const std::string text = error.what();
  std::strncpy(message.text, format("rank %d reported: %s", identity_.rank, text.c_str()).c_str(), sizeof message.text - 1);
  accept_trouble({error.kind(), ranks, text});
  pass_on(message, -1);
}

void Monitor::leave(Deadline deadline) {
  {
    const std::lock_guard lock(mutex_);
    for (const Watch& watch : watches_)
      if (watch.connection) ::send(watch.connection.get(), &kGoodbye, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
  }
  ControlMessage message;
  message.epoch = identity_.epoch;
  message.about = identity_.rank;
  pass_on(message, -1);
  if (identity_.rank != 0) return;
  while (!troubled() && left_count_ < identity_.size - 1 && !deadline.passed()) ::poll(nullptr, 0, 1);
}

}  // namespace roundel::transport
