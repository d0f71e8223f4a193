#include "transport/bootstrap.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/env.h"
#include "base/error.h"
#include "base/failpoint.h"
#include "base/process.h"
#include "transport/card.h"
#include "transport/frame.h"
#include "transport/hangup.h"
#include "transport/interface.h"

namespace roundel::transport {
namespace {

constexpr double kVerdictSeconds = 0.2;  // for the others to hear that they cannot start
constexpr double kCardSeconds = 5;       // for the cards of those who have come, and for telling them the outcome
constexpr double kLingerSeconds = 1;     // after a loss, for those who are about to come: they would wait for nobody
constexpr double kLookSeconds = 0.05;    // between two looks at those who wait
constexpr double kCauseSeconds = 0.1;    // between the end of a process's connections and its own

std::array<uint8_t, 16> host_id(const Job& job) {
  std::string id = job.host.empty() ? env::text("ROUNDEL_HOST_ID") : job.host;
  if (id.empty()) {
    char net[64] = {};
    if (::readlink("/proc/self/ns/net", net, sizeof net - 1) < 0) net[0] = '\0';
    id = read_line("/proc/sys/kernel/random/boot_id") + net;
  }
  id += format(" user %u", ::geteuid());  // users do not share memory
  const Digest digest = sha256({reinterpret_cast<const uint8_t*>(id.data()), id.size()});
  std::array<uint8_t, 16> short_id{};
  std::copy_n(digest.begin(), short_id.size(), short_id.begin());
  return short_id;
}

// Of process numbers; 0 where it is not to be seen.
uint64_t process_space() {
  struct stat status{};
  return ::stat("/proc/self/ns/pid", &status) == 0 ? status.st_ino : 0;
}

void set_address(Card& card, const Address& address) {
  card.address_length = address.length;
  card.address = address.storage;
}

Card make_card(const Job& job) {
  Card card;
  card.host = host_id(job);
  card.process = ::getpid();
  card.process_space = process_space();
  card.cores = own_cores();
  card.mpi_number = job.mpi_number;
  card.prefers_mpi = job.prefers_mpi;
  std::string settings = format("protocol %d", kFrameVersion);
  for (const char* name : {"ROUNDEL_TRANSPORT", "ROUNDEL_ALGORITHM", "ROUNDEL_TCP_SOCKETS", "ROUNDEL_DEAD_SECONDS"})
    settings += format(", %s=%s", name, env::text(name).c_str());
  std::strncpy(card.settings, settings.c_str(), sizeof card.settings - 1);
  return card;
}

// Where rank 0 listens. A wildcard with a chosen interface means that interface.
Fd rendezvous_listener(const Job& job) {
  if (job.rendezvous_fd >= 0) return Fd(::fcntl(job.rendezvous_fd, F_DUPFD_CLOEXEC, 0));
  const Address address = resolve(job.rendezvous);
  if (!is_wildcard(address)) return listen_on(address);
  return listen_on(with_port(address_for_peers(address), port_of(address)));
}

// A pidfd of a card's process where it is on this host, for telling how it ended.
Fd process_of(const Card& card, const Card& own) {
  const bool is_here = card.host == own.host && card.process_space == own.process_space && own.process_space != 0;
  return is_here ? open_process(card.process) : Fd();
}

// Rank 0's side: who has come so far. Reads their cards as they come, and notices when one goes.
class Guests {
 public:
  Guests(const Job& job, const Card& own) : job_(job), own_(own) {}

  void admit(int rank, Fd connection) { guests_[rank].link.connection = std::move(connection); }
  bool has(int rank) const { return guests_.contains(rank); }

  // Throws PeerLost.
  void look() {
    if (Clock::now() < next_look_) return;
    next_look_ = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(kLookSeconds));
    for (auto& [rank, guest] : guests_) {
      if (guest.bytes_to_come() > 0) read_card(guest);
      if (has_ended(guest.link.connection.get())) raise_lost(rank, guest);
    }
  }

  // All of them, by rank. Throws PeerLost.
  std::vector<Card> cards(Deadline deadline) {
    std::vector<Card> all(static_cast<size_t>(job_.size));
    all[0] = own_;
    for (auto& [rank, guest] : guests_) {
      try {
        recv_all(guest.link.connection.get(), guest.rest_of_card(), guest.bytes_to_come(), deadline);
        add(guest, guest.bytes_to_come());
      } catch (const Error& error) {
        if (error.kind() != ErrorKind::Generic && error.kind() != ErrorKind::Timeout) throw;
        raise_lost(rank, guest);
      }
      all[static_cast<size_t>(rank)] = guest.card;
    }
    return all;
  }

  // Whoever has gone meanwhile is not waited for: a loss after the start is the monitor's.
  void tell(const Verdict& verdict, const std::vector<Card>& cards, Deadline deadline) const {
    for (const auto& [rank, guest] : guests_) {
      try {
        send_all(guest.link.connection.get(), &verdict, sizeof verdict, deadline);
        if (verdict.outcome == Verdict::Accepted)
          send_all(guest.link.connection.get(), cards.data(), cards.size() * sizeof(Card), deadline);
      } catch (const Error& error) {
        if (error.kind() != ErrorKind::Generic && error.kind() != ErrorKind::Timeout) throw;
      }
    }
  }

  // Some have cards under way that nobody reads.
  void send_away() const {
    std::vector<int> sockets;
    for (const auto& [rank, guest] : guests_) sockets.push_back(guest.link.connection.get());
    hang_up(std::move(sockets), kVerdictSeconds, Until::Closed);
  }

  // This host's address towards them, rather one that other hosts can reach.
  Address own_address() const {
    Address found;
    for (const auto& [rank, guest] : guests_) {
      found = local_address(guest.link.connection.get());
      if (!is_loopback(found)) break;
    }
    return found;
  }

  std::map<int, ControlLink> take_links() {
    std::map<int, ControlLink> links;
    for (auto& [rank, guest] : guests_) links[rank] = std::move(guest.link);
    return links;
  }

 private:
  struct Guest {
    ControlLink link;
    Card card;
    size_t got = 0;  // of it
    size_t bytes_to_come() const { return sizeof card - got; }
    char* rest_of_card() { return reinterpret_cast<char*>(&card) + got; }
  };

  void read_card(Guest& guest) const {
    const int fd = guest.link.connection.get();
    const ssize_t n = ::recv(fd, guest.rest_of_card(), guest.bytes_to_come(), MSG_DONTWAIT);
    if (n > 0) add(guest, static_cast<size_t>(n));
  }

  void add(Guest& guest, size_t bytes) const {
    guest.got += bytes;
    if (bytes > 0 && guest.bytes_to_come() == 0) guest.link.process = process_of(guest.card, own_);
  }

  [[noreturn]] void raise_lost(int rank, const Guest& guest) const {
    const std::string cause = how_it_ends(guest.link.process, kCauseSeconds);
    throw PeerLost(cause.empty()
                       ? format("rank %d went away during the start (an error there, or its process or host ended)", rank)
                       : format("rank %d ended during the start: %s", rank, cause.c_str()),
                   {rank}, job_.epoch);
  }

  const Job& job_;
  Card own_;
  std::map<int, Guest> guests_;
  Clock::time_point next_look_{};
};

std::string missing_text(const Job& job, const Guests& guests) {
  std::vector<int> missing;
  for (int r = 1; r < job.size; ++r)
    if (!guests.has(r)) missing.push_back(r);
  return format("%zu of %d ranks did not arrive within %g s: rank %s", missing.size(), job.size, job.start_timeout,
                join_ranks(missing).c_str());
}

// A rank that can be reached from its own host only, and one on another host: nothing where there is no such pair. (Where all
// have come by way of loopback, hosts are pretended.)
std::string unreachable(const std::vector<Card>& cards) {
  for (size_t a = 0; a < cards.size(); ++a)
    for (size_t b = 0; b < cards.size(); ++b)
      if (cards[a].host != cards[b].host && is_loopback(address_of(cards[a])) && !is_loopback(address_of(cards[b])))
        return format(
            "rank %zu can be reached at %s only, and rank %zu is on another host: start it with rank 0's address in "
            "the network between them, or ROUNDEL_INTERFACE",
            a, address_of(cards[a]).text.c_str(), b);
  return "";
}

// Everybody is there: may they start?
Verdict judge(const std::vector<Card>& cards) {
  Verdict verdict;
  for (size_t rank = 0; rank < cards.size(); ++rank)
    if (const std::string wrong = refusal(cards[rank], cards[0]); !wrong.empty())
      verdict.set(Verdict::Refused, format("rank %zu %s", rank, wrong.c_str()));
  if (verdict.outcome != Verdict::Accepted) return verdict;
  if (const std::string wrong = unreachable(cards); !wrong.empty()) verdict.set(Verdict::Refused, wrong);
  return verdict;
}

Rendezvous host_rendezvous(const Job& job, const Identity& identity, const Patience& patience) {
  Rendezvous result;
  const Fd listener = rendezvous_listener(job);
  if (!listener) throw system_error("the rendezvous descriptor from the launcher", errno);
  ::fcntl(listener.get(), F_SETFL, ::fcntl(listener.get(), F_GETFL) | O_NONBLOCK);
  Address here = local_address(listener.get());
  if (!is_wildcard(here)) here = address_for_peers(here);  // what is wrong with it is wrong before anybody comes
  std::vector<int> others;
  for (int r = 1; r < job.size; ++r) others.push_back(r);

  // Those who came share whatever the verdict is, also when others are missing.
  Guests guests(job, make_card(job));
  std::vector<Card> cards;
  Verdict verdict;
  const auto admit = [&](int rank, Fd connection) { guests.admit(rank, std::move(connection)); };
  try {
    const auto look = [&] {
      guests.look();
      if (patience.look) patience.look();
    };
    const std::string obstacle =
        accept_each(listener.get(), identity, Role::Control, others, 1, {patience.deadline, look}, admit);
    if (!std::all_of(others.begin(), others.end(), [&](int rank) { return guests.has(rank); })) {
      verdict.set(Verdict::Missing, missing_text(job, guests) + obstacle);
    } else {
      result.data_listener = listen_on(is_wildcard(here) ? address_for_peers(guests.own_address()) : here);
      cards = guests.cards(Deadline::after(kCardSeconds));
      set_address(cards[0], local_address(result.data_listener.get()));
      verdict = judge(cards);
    }
  } catch (const PeerLost& error) {
    verdict.set(Verdict::Lost, error.what());
    verdict.lost = error.ranks.front();
  }
  guests.tell(verdict, cards, Deadline::after(kCardSeconds));
  if (verdict.outcome == Verdict::Lost) {
    std::erase_if(others, [&](int rank) { return guests.has(rank); });
    accept_each(listener.get(), identity, Role::Control, others, 1,
                {Deadline::after(std::min(kLingerSeconds, patience.deadline.seconds_left())), patience.look},
                [&](int rank, Fd connection) {
                  ::send(connection.get(), &verdict, sizeof verdict, MSG_NOSIGNAL | MSG_DONTWAIT);
                  admit(rank, std::move(connection));
                });
  }
  if (verdict.outcome != Verdict::Accepted) guests.send_away();
  verdict.raise_unless_accepted(identity);
  result.peers = read_cards(cards);
  result.controls = guests.take_links();
  return result;
}

Rendezvous join_rendezvous(const Job& job, const Identity& identity, const Patience& patience) {
  Rendezvous result;
  failpoint::pass(failpoint::Point::StartConnect);
  Fd control = connect_to(resolve(job.rendezvous), identity, 0, Role::Control, patience);
  result.data_listener = listen_on(address_for_peers(local_address(control.get())));
  Card card = make_card(job);
  set_address(card, local_address(result.data_listener.get()));
  failpoint::pass(failpoint::Point::StartCard);
  Verdict verdict;
  std::vector<Card> cards(static_cast<size_t>(job.size));
  try {
    try {
      send_all(control.get(), &card, sizeof card, patience);
    } catch (const Timeout&) {
      throw;
    } catch (const Error&) {
      // Rank 0 has closed: its verdict may lie in the socket.
    }
    recv_all(control.get(), &verdict, sizeof verdict,
             {Deadline::after(patience.deadline.seconds_left() + 5), patience.look});  // rank 0 judges at the deadline
    if (verdict.outcome == Verdict::Accepted) recv_all(control.get(), cards.data(), cards.size() * sizeof(Card), patience);
  } catch (const Timeout&) {
    throw Timeout(format("rank %d: rank 0 did not send the table of ranks within %g s", job.rank, job.start_timeout));
  } catch (const Error&) {
    patience.check();  // what it throws is the better reason
    throw PeerLost(
        format("rank %d: rank 0 went away during the start (an error there, or its process or host ended)", job.rank), {0},
        job.epoch);
  }
  verdict.raise_unless_accepted(identity);
  result.peers = read_cards(cards);
  result.controls[0] = {std::move(control), process_of(cards[0], card)};
  return result;
}

}  // namespace

Rendezvous meet(const Job& job, const Identity& identity, const Patience& patience) {
  if (job.size == 1) {
    Rendezvous alone;
    Peer& self = alone.peers.emplace_back();
    self.mpi_number = job.mpi_number;
    self.prefers_mpi = job.prefers_mpi;
    self.cores = own_cores();
    return alone;
  }
  return job.rank == 0 ? host_rendezvous(job, identity, patience) : join_rendezvous(job, identity, patience);
}

}  // namespace roundel::transport
