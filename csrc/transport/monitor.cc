#include "transport/monitor.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/env.h"
#include "base/failpoint.h"
#include "base/process.h"
#include "base/recorder.h"
#include "base/text.h"
#include "transport/hangup.h"

namespace roundel::transport {
namespace {

constexpr char kGoodbye = 'L';
constexpr double kSendSeconds = 1;      // for all peers together: who does not drain 512 bytes is as good as gone
constexpr double kHangUpSeconds = 0.1;  // for the last words to arrive
constexpr double kAnswerSeconds = 3;    // after which an answer is no news
constexpr double kCauseSeconds = 0.02;  // between a connection's end and the word of how its process ended
constexpr double kBeats = 8;            // per dead_seconds: that many must go missing
constexpr double kNearlyDead = 0.75;    // of dead_seconds: whoever is as silent when another one is excluded shares its fate

Clock::duration seconds(double n) { return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(n)); }

void insert_sorted(std::vector<int>& ranks, int rank) {
  const auto at = std::lower_bound(ranks.begin(), ranks.end(), rank);
  if (at == ranks.end() || *at != rank) ranks.insert(at, rank);
}

void set_text(ControlMessage& message, const std::string& text) {
  const std::string_view fits = cut_text(text, sizeof message.text - 1);
  *std::copy(fits.begin(), fits.end(), message.text) = '\0';
}

// Ranks do not lie, but a bug in one shall not be another in us.
bool is_sane(const ControlMessage& message, const Member& self) {
  using Type = ControlMessage::Type;
  const auto is_rank = [&](int rank) { return rank >= 0 && rank < self.size; };
  if (message.magic != ControlMessage::kMagic || message.epoch != self.epoch || message.type > Type::Told ||
      message.kind > ErrorKind::Fenced || message.rank_count > ControlMessage::kMaxRanks ||
      !std::all_of(message.ranks, message.ranks + message.rank_count, is_rank))
    return false;
  if (message.type == Type::Left) return is_rank(message.about);
  if (message.type == Type::Ask || message.type == Type::Told) return is_rank(message.about) && is_rank(message.ranks[0]);
  return true;
}

}  // namespace

MonitorTimes MonitorTimes::from_settings(double start_seconds) {
  return {env::number("ROUNDEL_DEAD_SECONDS", 0.1, 1e6), start_seconds};
}

Monitor::Monitor(const Identity& identity, std::map<int, ControlLink> controls, std::function<void()> wake, MonitorTimes times)
    : identity_(identity),
      times_(times),
      wake_(std::move(wake)),
      event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      next_beat_(Clock::now()),
      last_round_(next_beat_),
      left_(static_cast<size_t>(identity.size)) {
  if (!event_) throw system_error("eventfd", errno);
  // Bytes that nobody acknowledges end the connection. (Keepalive alone does not: it rests while bytes are on their way.)
  const int limit = static_cast<int>(std::min(2e6, times_.dead_seconds + 1) * 1000);
  for (auto& [rank, link] : controls) {
    ::setsockopt(link.connection.get(), IPPROTO_TCP, TCP_USER_TIMEOUT, &limit, sizeof limit);
    Control& control = controls_[rank];
    control.fd = std::move(link.connection);
    control.process = std::move(link.process);
    control.pid = pid_of(control.process);
    control.heard = next_beat_ + seconds(std::max(0.0, times_.start_seconds - times_.dead_seconds));
  }
  thread_ = std::thread([this] { watch(); });
}

void Monitor::add(std::vector<Watch> watches) {
  {
    const std::lock_guard lock(sending_);
    for (Watch& watch : watches) {
      const int pid = pid_of(watch.process);
      added_.push_back({std::move(watch), pid});
    }
  }
  poke();
}

void Monitor::take_added() {
  const std::lock_guard lock(sending_);
  for (WatchedProcess& watched : added_) watches_.push_back(std::move(watched));
  added_.clear();
}

void Monitor::poke() { ::eventfd_write(event_.get(), 1); }

Monitor::~Monitor() {
  stop_ = true;
  poke();
  thread_.join();
  std::vector<int> sockets;
  for (const auto& [rank, control] : controls_)
    if (control.fd && !control.excluded) sockets.push_back(control.fd.get());
  hang_up(std::move(sockets), kHangUpSeconds);
}

void Monitor::watch() {
  std::vector<pollfd> entries;
  while (!stop_) {
    take_added();
    entries.assign(1, {event_.get(), POLLIN, 0});
    for (const auto& [rank, control] : controls_) entries.push_back({control.fd.get(), POLLIN, 0});
    for (const WatchedProcess& watched : watches_) {
      entries.push_back({watched.watch.connection.get(), POLLIN, 0});
      entries.push_back({watched.watch.process.get(), POLLIN, 0});
    }
    const double idle = attend(Clock::now());
    const int wait = idle < 0 ? -1 : static_cast<int>(std::min(idle, 1e6) * 1000) + 1;
    if (::poll(entries.data(), entries.size(), wait) < 0) continue;
    eventfd_t pokes = 0;
    ::eventfd_read(event_.get(), &pokes);
    size_t at = 1;
    for (auto& [rank, control] : controls_)
      if (entries[at++].revents != 0) read_control(rank, control);
    for (WatchedProcess& watched : watches_) {
      const bool spoke = entries[at++].revents != 0, ended = entries[at++].revents != 0;
      if (spoke || ended) read_watch(watched, ended);
    }
    lose_suspects(Clock::now());
    judge_silence(Clock::now());
  }
}

// Beats when it is time. Returns the seconds until there is something to do without being told, or -1 for never.
double Monitor::attend(Clock::time_point now) {
  if (controls_.empty() && suspects_.empty()) return -1;
  if (now >= next_beat_) {
    const ControlMessage beat = make_message();
    for (const auto& [rank, control] : controls_)
      if (!has_left(rank)) offer(rank, beat);
    next_beat_ = now + seconds(times_.dead_seconds / kBeats);
  }
  Clock::time_point next = next_beat_;
  for (const Suspect& suspect : suspects_) next = std::min(next, suspect.due);
  for (const auto& [rank, control] : controls_)
    if (control.fd && !control.excluded && !has_left(rank)) next = std::min(next, control.heard + seconds(times_.dead_seconds));
  return std::max(0.0, std::chrono::duration<double>(next - now).count());
}

// Called after everything that has arrived was read.
void Monitor::judge_silence(Clock::time_point now) {
  const Clock::duration dead = seconds(times_.dead_seconds);
  // Was it this process that stood still? Then it has no right to judge: all begin anew. (What arrived meanwhile has been
  // read.)
  const bool stood_still = now - last_round_ > dead / 2;
  last_round_ = now;
  if (stood_still)
    for (auto& [rank, control] : controls_) control.heard = std::max(control.heard, now);
  std::vector<int> silent;
  bool any_dead = false;
  for (const auto& [rank, control] : controls_) {
    if (!control.fd || control.excluded || has_left(rank)) continue;
    any_dead |= now - control.heard >= dead;
    if (now - control.heard >= seconds(times_.dead_seconds * kNearlyDead)) silent.push_back(rank);
  }
  if (!any_dead) return;
  if (identity_.rank == 0)
    exclude(silent);
  else
    fence();
}

void Monitor::exclude(const std::vector<int>& ranks) {
  ControlMessage word = make_message();
  word.type = ControlMessage::Type::Trouble;
  word.kind = ErrorKind::Fenced;
  set_text(word, format("excluded from the job: rank 0 has heard nothing from it for %g s", times_.dead_seconds));
  for (const int rank : ranks) controls_.at(rank).excluded = true;
  const Trouble trouble{
      ErrorKind::PeerLost, ranks,
      format("nothing heard from rank %s for %g s: stopped, or cut off", join_ranks(ranks).c_str(), times_.dead_seconds)};
  accept_trouble(trouble);
  ControlMessage message = make_message();
  message.type = ControlMessage::Type::Trouble;
  message.kind = trouble.kind;
  message.rank_count = static_cast<uint16_t>(std::min<size_t>(ranks.size(), ControlMessage::kMaxRanks));
  std::copy_n(ranks.begin(), message.rank_count, message.ranks);
  set_text(message, trouble.text);
  pass_on(message, -1);  // first to those who go on
  for (const int rank : ranks) send(controls_.at(rank), word, Deadline::after(0));
}

// Rank 0 may go on without this rank, so this rank must not go on without rank 0.
void Monitor::fence() {
  controls_.at(0).excluded = true;
  accept_trouble(
      {ErrorKind::Fenced, {}, format("lost touch with the job: nothing heard from rank 0 for %g s", times_.dead_seconds)});
  ControlMessage message = make_message();
  message.type = ControlMessage::Type::Trouble;
  message.kind = ErrorKind::Fenced;
  set_text(message, format("gave up: it had heard nothing from rank 0 for %g s", times_.dead_seconds));
  send(controls_.at(0), message, Deadline::after(0));
}

void Monitor::read_control(int rank, Control& control) {
  for (;;) {
    const ssize_t n = ::recv(control.fd.get(), reinterpret_cast<char*>(&control.incoming) + control.got,
                             sizeof control.incoming - control.got, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    control.got += n > 0 ? static_cast<size_t>(n) : 0;
    if (n > 0 && control.got < sizeof control.incoming) continue;
    const ControlMessage& message = control.incoming;
    if (n <= 0 || !is_sane(message, identity_)) {
      {
        const std::lock_guard lock(sending_);
        control.fd.reset();
      }
      if (!control.excluded)
        lost_soon(rank, n <= 0 ? "closed its control connection without shutdown (its process ended, or its host)"
                               : "sent garbage on its control connection");
      return;
    }
    control.got = 0;
    control.heard = Clock::now();
    if (!control.excluded) handle(rank, message);
  }
}

void Monitor::handle(int rank, ControlMessage message) {
  message.text[sizeof message.text - 1] = '\0';
  switch (message.type) {
    case ControlMessage::Type::Beat:
      return;
    case ControlMessage::Type::Left:
      mark_left(message.about);
      break;
    case ControlMessage::Type::Trouble:
      if (identity_.rank == 0 && message.kind == ErrorKind::Fenced) return lost(rank, message.text);
      accept_trouble({message.kind, {message.ranks, message.ranks + message.rank_count}, message.text});
      break;
    case ControlMessage::Type::Ask:
      if (message.about == identity_.rank) {
        message.type = ControlMessage::Type::Told;
        set_text(message, recorder::doing());
        {
          const std::lock_guard lock(mutex_);
          message.sequence = waiting_.sequence;
          message.signature = waiting_.signature;
        }
        return offer(rank, message);
      }
      return offer(message.about, message);  // rank 0 hands it on
    case ControlMessage::Type::Told: {
      if (message.ranks[0] != identity_.rank) return offer(message.ranks[0], message);
      const std::lock_guard lock(mutex_);
      answers_[message.about] = {message.text, {message.sequence, message.signature}, Clock::now()};
      return;
    }
  }
  if (identity_.rank == 0) pass_on(message, rank);
}

// A process that leaves in order says goodbye before it ends: look for that word first.
void Monitor::read_watch(WatchedProcess& watched, bool process_ended) {
  Watch& watch = watched.watch;
  char word = 0;
  const ssize_t got = watch.connection ? ::recv(watch.connection.get(), &word, 1, MSG_DONTWAIT) : 0;
  if (got == 1 && word == kGoodbye) return mark_left(watch.rank);
  const bool closed = got == 0 || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
  if (!closed && !process_ended) return;
  std::string how;
  if (process_ended && !has_left(watch.rank)) {
    const std::string cause = how_it_ended(watch.process, watched.pid);
    how = "ended without shutdown" + (cause.empty() ? " (killed, crashed or exited)" : ": " + cause);
  }
  {
    const std::lock_guard lock(sending_);
    watch.connection.reset();
    if (process_ended || has_left(watch.rank)) watch.process.reset();
  }
  if (process_ended)
    lost(watch.rank, how);
  else  // a process closes its connections a little before it has ended
    lost_soon(watch.rank, "closed its connection without shutdown");
}

// For one whose end others see better, as its own host does: their word may be on its way.
void Monitor::lost_soon(int rank, const std::string& how) {
  if (!has_left(rank)) suspects_.push_back({rank, how, Clock::now() + seconds(kCauseSeconds)});
}

void Monitor::lose_suspects(Clock::time_point now) {
  std::erase_if(suspects_, [&](const Suspect& suspect) {
    if (!is_known_lost(suspect.rank) && now < suspect.due) return false;
    if (!is_known_lost(suspect.rank)) {
      const std::string cause = cause_of(suspect.rank);
      lost(suspect.rank, cause.empty() ? suspect.how : "ended without shutdown: " + cause);
    }
    return true;
  });
}

// Of one at the other end of a control connection, where its process is on this host.
std::string Monitor::cause_of(int rank) const {
  const auto found = controls_.find(rank);
  return found == controls_.end() ? "" : how_it_ended(found->second.process, found->second.pid);
}

bool Monitor::is_known_lost(int rank) const {
  const std::lock_guard lock(mutex_);
  return std::find(trouble_.ranks.begin(), trouble_.ranks.end(), rank) != trouble_.ranks.end();
}

void Monitor::lost(int rank, const std::string& how) {
  if (has_left(rank)) return;
  // On the far side of a cut others end because they have fenced themselves: that is not the reason, it is about to be ours.
  if (identity_.rank != 0 && rank != 0) {
    const Control& arbiter = controls_.at(0);
    if (arbiter.fd && !arbiter.excluded && Clock::now() - arbiter.heard > seconds(times_.dead_seconds * kNearlyDead))
      return fence();
  }
  const Trouble trouble{ErrorKind::PeerLost, {rank}, format("rank %d %s", rank, how.c_str())};
  accept_trouble(trouble);
  ControlMessage message = make_message();
  message.type = ControlMessage::Type::Trouble;
  message.kind = trouble.kind;
  message.rank_count = 1;
  message.ranks[0] = rank;
  set_text(message, trouble.text);
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

bool Monitor::has_left(int rank) const {
  const std::lock_guard lock(mutex_);
  return left_[static_cast<size_t>(rank)];
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

ControlMessage Monitor::make_message() const {
  ControlMessage message;
  message.epoch = identity_.epoch;
  return message;
}

// False when the peer takes none of it before the deadline. A message that is taken in part is the connection's last: what
// would follow could not be told from the rest. The peer's death is noticed where it is watched.
bool Monitor::send(const Control& to, const ControlMessage& message, Deadline deadline) {
  const std::lock_guard lock(sending_);
  if (!to.fd) return true;
  const char* bytes = reinterpret_cast<const char*>(&message);
  for (size_t sent = 0; sent < sizeof message;) {
    pollfd writable{to.fd.get(), POLLOUT, 0};  // then there is room for it whole
    if (::poll(&writable, 1, deadline.passed() ? 0 : deadline.milliseconds_left(1000)) == 1) {
      const ssize_t n = ::send(to.fd.get(), bytes + sent, sizeof message - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n > 0) sent += static_cast<size_t>(n);
      if (n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR) && !deadline.passed())) continue;
      if (n < 0 && errno != EAGAIN && errno != EINTR) return true;  // it has closed
    } else if (!deadline.passed()) {
      continue;
    }
    if (sent > 0) ::shutdown(to.fd.get(), SHUT_RDWR);
    return sent > 0;
  }
  return true;
}

// What is not worth waiting for: dropped where there is no room for it now.
void Monitor::offer(int rank, const ControlMessage& message) {
  const auto to = controls_.find(rank);
  if (to != controls_.end() && !to->second.excluded) send(to->second, message, Deadline::after(0));
}

void Monitor::pass_on(const ControlMessage& message, int except) {
  std::vector<const Control*> slow;
  for (const auto& [rank, control] : controls_)
    if (rank != except && !control.excluded && !send(control, message, Deadline::after(0))) slow.push_back(&control);
  const Deadline deadline = Deadline::after(kSendSeconds);
  for (const Control* control : slow) send(*control, message, deadline);
}

void Monitor::ask(int rank) {
  ControlMessage message = make_message();
  message.type = ControlMessage::Type::Ask;
  message.about = rank;
  message.ranks[0] = identity_.rank;
  offer(identity_.rank == 0 ? rank : 0, message);
}

std::string Monitor::answer_of(int rank) const {
  const std::lock_guard lock(mutex_);
  const auto found = answers_.find(rank);
  const bool is_news = found != answers_.end() && Clock::now() - found->second.told < seconds(kAnswerSeconds);
  return is_news ? found->second.text : "";
}

void Monitor::set_waiting(uint64_t sequence, const Signature& signature) {
  const std::lock_guard lock(mutex_);
  waiting_ = {sequence, signature};
}

std::optional<Signature> Monitor::called_by(int rank, uint64_t sequence) const {
  const std::lock_guard lock(mutex_);
  const auto found = answers_.find(rank);
  if (found == answers_.end() || found->second.wait.sequence != sequence) return std::nullopt;
  return found->second.wait.signature;
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
    case ErrorKind::Fenced:
      throw Fenced(text);
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
  ControlMessage message = make_message();
  message.type = ControlMessage::Type::Trouble;
  message.kind = error.kind();
  message.rank_count = static_cast<uint16_t>(std::min<size_t>(ranks.size(), ControlMessage::kMaxRanks));
  std::copy_n(ranks.begin(), message.rank_count, message.ranks);
  const std::string text = error.what();
  set_text(message, format("rank %d reported: %s", identity_.rank, text.c_str()));
  accept_trouble({error.kind(), ranks, text});
  pass_on(message, -1);
}

void Monitor::leave(Deadline deadline) {
  failpoint::pass(failpoint::Point::LeaveBefore);
  {
    const std::lock_guard lock(sending_);
    for (const auto* watches : {&watches_, &added_})
      for (const auto& [watch, pid] : *watches)
        if (watch.connection) ::send(watch.connection.get(), &kGoodbye, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
  }
  ControlMessage message = make_message();
  message.type = ControlMessage::Type::Left;
  message.about = identity_.rank;
  pass_on(message, -1);
  failpoint::pass(failpoint::Point::LeaveAfter);
  await_others(deadline);
}

void Monitor::await_others(Deadline deadline) const {
  if (identity_.rank != 0) return;
  while (!troubled() && left_count_ < identity_.size - 1 && !deadline.passed()) ::poll(nullptr, 0, 1);
}

}  // namespace roundel::transport
