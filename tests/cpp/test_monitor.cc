// The failure detector on socket pairs in one process: what each rank's monitor makes of deaths, silence and goodbyes.
#include "transport/monitor.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <memory>

#include "base/process.h"
#include "check.h"

using namespace roundel;
using namespace roundel::transport;

namespace {

constexpr double kDead = 0.4;  // seconds: short, so that the tests are

std::pair<Fd, Fd> connected() {
  int both[2];
  ROUNDEL_CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, both) == 0);
  return {Fd(both[0]), Fd(both[1])};
}

std::unique_ptr<Monitor> monitor(int rank, int size, std::map<int, Fd> controls, double start = kDead) {
  return std::make_unique<Monitor>(
      Identity({}, rank, size, 1), std::move(controls), std::vector<Watch>{}, [] {}, MonitorTimes{kDead, start});
}

bool becomes_troubled(const Monitor& m, double seconds) {
  for (const Deadline deadline = Deadline::after(seconds); !m.troubled() && !deadline.passed();) ::poll(nullptr, 0, 1);
  return m.troubled();
}

std::string trouble_of(const Monitor& m) {
  try {
    m.raise_trouble("a test");
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

}  // namespace

TEST(monitors_that_beat_stay_untroubled) {
  auto [a, b] = connected();
  std::map<int, Fd> zero, one;
  zero[1] = std::move(a);
  one[0] = std::move(b);
  const auto m0 = monitor(0, 2, std::move(zero)), m1 = monitor(1, 2, std::move(one));
  ::poll(nullptr, 0, static_cast<int>(3 * kDead * 1000));
  CHECK(!m0->troubled() && !m1->troubled());
}

TEST(rank_0_excludes_all_who_are_silent_and_tells_them_and_the_others) {
  auto [a, b] = connected();
  auto [c, d] = connected();
  auto [e, f] = connected();
  std::map<int, Fd> zero, one;
  zero[1] = std::move(a);
  zero[2] = std::move(c);
  zero[3] = std::move(e);
  one[0] = std::move(b);
  const auto m0 = monitor(0, 4, std::move(zero)), m1 = monitor(1, 4, std::move(one));
  CHECK(becomes_troubled(*m0, 10 * kDead));
  CHECK(becomes_troubled(*m1, kDead));
  for (const Monitor* m : {m0.get(), m1.get()}) {
    try {
      m->raise_trouble("a test");
    } catch (const PeerLost& lost) {
      CHECK((lost.ranks == std::vector<int>{2, 3}));
      CHECK(std::string(lost.what()).find("nothing heard from rank 2 and 3 for 0.4 s") != std::string::npos);
    }
  }
  // Word of it lies in the excluded ranks' sockets, behind heartbeats: whoever wakes late finds it at once.
  std::map<int, Fd> two;
  two[0] = std::move(d);
  const auto m2 = monitor(2, 4, std::move(two));
  CHECK(becomes_troubled(*m2, kDead));
  CHECK_THROWS(m2->raise_trouble("a test"), Fenced);
  CHECK(trouble_of(*m2).find("excluded from the job") != std::string::npos);
}

TEST(a_rank_that_does_not_hear_rank_0_fences_itself) {
  auto [a, b] = connected();
  std::map<int, Fd> one;
  one[0] = std::move(b);
  const auto m1 = monitor(1, 2, std::move(one));
  CHECK(!becomes_troubled(*m1, kDead / 2));
  CHECK(becomes_troubled(*m1, 10 * kDead));
  CHECK_THROWS(m1->raise_trouble("a test"), Fenced);
  CHECK(trouble_of(*m1).find("lost touch with the job") != std::string::npos);
}

TEST(a_first_heartbeat_may_take_as_long_as_the_start) {
  auto [a, b] = connected();
  std::map<int, Fd> zero;
  zero[1] = std::move(a);
  const auto m0 = monitor(0, 2, std::move(zero), 3 * kDead);
  CHECK(!becomes_troubled(*m0, 2 * kDead));
  CHECK(becomes_troubled(*m0, 10 * kDead));
}

TEST(who_has_left_may_be_silent) {
  auto [a, b] = connected();
  std::map<int, Fd> zero, one;
  zero[1] = std::move(a);
  one[0] = std::move(b);
  const auto m0 = monitor(0, 2, std::move(zero));
  auto m1 = monitor(1, 2, std::move(one));
  m1->leave(Deadline::after(1));
  m1.reset();
  CHECK(!becomes_troubled(*m0, 2 * kDead));
  CHECK(m0->somebody_left());
}

TEST(garbage_on_a_control_connection_is_a_lost_rank) {
  auto [a, b] = connected();
  std::map<int, Fd> zero;
  zero[1] = std::move(a);
  const auto m0 = monitor(0, 2, std::move(zero));
  const std::string garbage(700, 'x');
  send_all(b.get(), garbage.data(), garbage.size(), Deadline::after(1));
  CHECK(becomes_troubled(*m0, 10 * kDead));
  CHECK(trouble_of(*m0).find("garbage") != std::string::npos);
}

TEST(ranks_answer_what_they_do_by_way_of_rank_0) {
  auto [a, b] = connected();
  auto [c, d] = connected();
  std::map<int, Fd> zero, one, two;
  zero[1] = std::move(a);
  zero[2] = std::move(c);
  one[0] = std::move(b);
  two[0] = std::move(d);
  const auto m0 = monitor(0, 3, std::move(zero)), m1 = monitor(1, 3, std::move(one)), m2 = monitor(2, 3, std::move(two));
  const Signature gather{OpKind::Gather, DType::Float32, ReduceOp::Sum, 0, 2, 7, 11};
  m2->set_waiting(5, gather);
  m1->ask(2);
  m1->ask(0);
  m0->ask(1);
  const Deadline deadline = Deadline::after(5);
  while ((m1->answer_of(2).empty() || m1->answer_of(0).empty() || m0->answer_of(1).empty()) && !deadline.passed())
    ::poll(nullptr, 0, 1);
  CHECK(!m1->answer_of(2).empty() && !m1->answer_of(0).empty() && !m0->answer_of(1).empty());
  CHECK(m0->answer_of(2).empty());
  CHECK(m1->called_by(2, 5) == gather);
  CHECK(!m1->called_by(2, 4) && !m1->called_by(0, 5) && !m0->called_by(2, 5));
}

TEST(how_a_process_ended_is_known_to_others_than_its_parent) {
  for (const bool reaped : {false, true}) {
    for (const int how : {SIGKILL, SIGTERM, 0}) {
      const pid_t pid = ::fork();
      if (pid == 0) {
        if (how != 0) ::poll(nullptr, 0, -1);
        ::_exit(7);
      }
      const Fd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
      CHECK_EQ(pid_of(pidfd), pid);
      if (how != 0) ::kill(pid, how);
      pollfd ended{pidfd.get(), POLLIN, 0};
      CHECK_EQ(::poll(&ended, 1, 5000), 1);
      if (reaped) ::waitpid(pid, nullptr, 0);
      const std::string text = how_it_ended(pidfd, pid);
      const std::string expected = how == SIGKILL   ? "killed by signal 9 (Killed)"
                                   : how == SIGTERM ? "killed by signal 15 (Terminated)"
                                                    : "exit code 7";
      CHECK(text == expected || (reaped && text.empty()));  // kernels before 6.15 forget it with the reaping
      if (!reaped) ::waitpid(pid, nullptr, 0);
    }
  }
}
