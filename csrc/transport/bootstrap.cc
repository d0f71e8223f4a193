#include "transport/bootstrap.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/env.h"
#include "base/error.h"
#include "base/failpoint.h"
#include "transport/card.h"
#include "transport/frame.h"
#include "transport/hangup.h"

namespace roundel::transport {
namespace {

constexpr double kVerdictSeconds = 0.2;  // for the others to hear that they cannot start

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

Card make_card(const Job& job, const Address& address) {
  Card card;
  card.host = host_id(job);
  card.address_length = address.length;
  card.address = address.storage;
  std::string settings = format("protocol %d", kFrameVersion);
  for (const char* name : {"ROUNDEL_TRANSPORT", "ROUNDEL_ALGORITHM", "ROUNDEL_TCP_SOCKETS", "ROUNDEL_DEAD_SECONDS"})
    settings += format(", %s=%s", name, env::text(name).c_str());
  std::strncpy(card.settings, settings.c_str(), sizeof card.settings - 1);
  return card;
}

bool is_wildcard(const Address& address) {
  if (address.storage.ss_family == AF_INET)
    return reinterpret_cast<const sockaddr_in*>(&address.storage)->sin_addr.s_addr == htonl(INADDR_ANY);
  return IN6_IS_ADDR_UNSPECIFIED(&reinterpret_cast<const sockaddr_in6*>(&address.storage)->sin6_addr);
}

std::string missing_text(const Job& job, const std::map<int, Fd>& arrived) {
  std::vector<int> missing;
  for (int r = 1; r < job.size; ++r)
    if (!arrived.contains(r)) missing.push_back(r);
  return format("%zu of %d ranks did not arrive within %g s: rank %s", missing.size(), job.size, job.start_timeout,
                join_ranks(missing).c_str());
}

Rendezvous host_rendezvous(const Job& job, const Identity& identity, Deadline deadline) {
  Rendezvous result;
  const Fd listener =
      job.rendezvous_fd >= 0 ? Fd(::fcntl(job.rendezvous_fd, F_DUPFD_CLOEXEC, 0)) : listen_on(resolve(job.rendezvous));
  if (!listener) throw system_error("the rendezvous descriptor from the launcher", errno);
  ::fcntl(listener.get(), F_SETFL, ::fcntl(listener.get(), F_GETFL) | O_NONBLOCK);
  std::vector<int> others;
  for (int r = 1; r < job.size; ++r) others.push_back(r);
  std::string obstacle;
  result.controls = accept_all(listener.get(), identity, Role::Control, others, deadline, &obstacle);

  // Those who came share whatever the verdict is, also when others are missing.
  const Deadline soon = Deadline::after(5);
  Verdict verdict;
  std::vector<Card> cards(static_cast<size_t>(job.size));
  if (result.controls.size() < others.size()) {
    verdict.set(Verdict::Missing, missing_text(job, result.controls) + obstacle);
  } else {
    Address here = local_address(listener.get());
    if (is_wildcard(here) && !result.controls.empty()) here = local_address(result.controls.begin()->second.get());
    result.data_listener = listen_on(with_port(here, 0));
    cards[0] = make_card(job, local_address(result.data_listener.get()));
    for (const auto& [rank, fd] : result.controls) {
      Card& card = cards[static_cast<size_t>(rank)];
      try {
        recv_all(fd.get(), &card, sizeof card, soon);
      } catch (const Error&) {
        verdict.set(Verdict::Missing, format("rank %d went away during the start", rank));
        continue;
      }
      if (const std::string wrong = refusal(card, cards[0]); !wrong.empty())
        verdict.set(Verdict::Refused, format("rank %d %s", rank, wrong.c_str()));
    }
  }
  for (const auto& [rank, fd] : result.controls) {
    try {
      send_all(fd.get(), &verdict, sizeof verdict, soon);
      if (verdict.outcome == Verdict::Accepted) send_all(fd.get(), cards.data(), cards.size() * sizeof(Card), soon);
    } catch (const Error&) {
      verdict.set(Verdict::Missing, format("rank %d went away during the start", rank));
    }
  }
  if (verdict.outcome != Verdict::Accepted) {  // some have cards under way that nobody reads
    std::vector<int> sockets;
    for (const auto& [rank, fd] : result.controls) sockets.push_back(fd.get());
    hang_up(std::move(sockets), kVerdictSeconds, Until::Closed);
  }
  verdict.raise_unless_accepted(0);
  result.peers = read_cards(cards);
  return result;
}

Rendezvous join_rendezvous(const Job& job, const Identity& identity, Deadline deadline) {
  Rendezvous result;
  failpoint::pass(failpoint::Point::StartConnect);
  Fd control = connect_to(resolve(job.rendezvous), identity, 0, Role::Control, deadline);
  result.data_listener = listen_on(with_port(local_address(control.get()), 0));
  const Card card = make_card(job, local_address(result.data_listener.get()));
  failpoint::pass(failpoint::Point::StartCard);
  Verdict verdict;
  std::vector<Card> cards(static_cast<size_t>(job.size));
  try {
    try {
      send_all(control.get(), &card, sizeof card, deadline);
    } catch (const Timeout&) {
      throw;
    } catch (const Error&) {
      // Rank 0 has closed: its verdict may lie in the socket.
    }
    recv_all(control.get(), &verdict, sizeof verdict,
             Deadline::after(deadline.seconds_left() + 5));  // rank 0 judges at the deadline
    if (verdict.outcome == Verdict::Accepted) recv_all(control.get(), cards.data(), cards.size() * sizeof(Card), deadline);
  } catch (const Timeout&) {
    throw Timeout(format("rank %d: rank 0 did not send the table of ranks within %g s", job.rank, job.start_timeout));
  } catch (const Error&) {
    throw Error(format("rank %d: rank 0 went away during the start", job.rank));
  }
  verdict.raise_unless_accepted(job.rank);
  result.peers = read_cards(cards);
  result.controls[0] = std::move(control);
  return result;
}

}  // namespace

Rendezvous meet(const Job& job, const Identity& identity, Deadline deadline) {
  if (job.size == 1) return {{Peer{}}, {}, {}};
  return job.rank == 0 ? host_rendezvous(job, identity, deadline) : join_rendezvous(job, identity, deadline);
}

}  // namespace roundel::transport
