// The failure detector on socket pairs in one process: what each rank's monitor makes of deaths, silence and goodbyes.
#include "transport/monitor.h"

#include <linux/sched.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <functional>
#include <memory>
#include <thread>

#include "base/process.h"
#include "check.h"
#include "transport/hangup.h"

using namespace roundel;
using namespace roundel::transport;

namespace {

constexpr double kDead = 0.4;  // seconds: short, so that the tests are

std::pair<Fd, Fd> connected() {
  int both[2];
  ROUNDEL_CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, both) == 0);
  return {Fd(both[0]), Fd(both[1])};
}

// Where a close with unread input is a reset, unlike between unix sockets.
std::pair<Fd, Fd> connected_by_tcp() {
  const Fd listener = listen_on(resolve("127.0.0.1:0"));
  const Address address = local_address(listener.get());
  Fd one(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  ROUNDEL_CHECK(::connect(one.get(), reinterpret_cast<const sockaddr*>(&address.storage), address.length) == 0);
  Fd other(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  ROUNDEL_CHECK(other.get() >= 0);
  return {std::move(one), std::move(other)};
}

std::unique_ptr<Monitor> monitor(int rank, int size, std::map<int, Fd> controls, double start = kDead) {
  std::map<int, ControlLink> links;
  for (auto& [peer, fd] : controls) links[peer].connection = std::move(fd);
  return std::make_unique<Monitor>(Identity({}, rank, size, 1), std::move(links), [] {}, MonitorTimes{kDead, start});
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

TEST(lies_about_ranks_are_garbage) {
  using Type = ControlMessage::Type;
  const auto is_refused = [](const std::function<void(ControlMessage&)>& lie) {
    auto [a, b] = connected();
    std::map<int, Fd> zero;
    zero[1] = std::move(a);
    const auto m0 = monitor(0, 3, std::move(zero));
    ControlMessage message;
    message.epoch = 1;
    lie(message);
    send_all(b.get(), &message, sizeof message, Deadline::after(1));
    return becomes_troubled(*m0, kDead / 2) && trouble_of(*m0).find("garbage") != std::string::npos;
  };
  CHECK(!is_refused([](ControlMessage&) {}));
  for (const int rank : {-1, 3, 1 << 30}) {
    for (const Type type : {Type::Left, Type::Ask, Type::Told})
      CHECK(is_refused([&](ControlMessage& m) { m.type = type, m.about = rank; }));
    for (const Type type : {Type::Ask, Type::Told})
      CHECK(is_refused([&](ControlMessage& m) { m.type = type, m.about = 1, m.ranks[0] = rank; }));
    CHECK(is_refused(
        [&](ControlMessage& m) { m.type = Type::Trouble, m.kind = ErrorKind::PeerLost, m.rank_count = 2, m.ranks[1] = rank; }));
  }
  CHECK(is_refused([](ControlMessage& m) { m.type = static_cast<Type>(5); }));
  CHECK(is_refused([](ControlMessage& m) { m.type = Type::Trouble, m.kind = static_cast<ErrorKind>(8); }));
}

TEST(questions_to_a_rank_that_does_not_read_block_nobody) {
  auto [a, b] = connected();
  auto [c, d] = connected();
  const int small = 4096;
  ::setsockopt(c.get(), SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
  std::map<int, Fd> zero, one;
  zero[1] = std::move(a);
  zero[2] = std::move(c);  // nobody reads at the other end
  one[0] = std::move(b);
  const auto m0 = monitor(0, 3, std::move(zero), 5), m1 = monitor(1, 3, std::move(one), 5);
  const auto start = Clock::now();
  for (int i = 0; i < 50; ++i) {
    m0->ask(2);
    m1->ask(2);
  }
  while (m1->answer_of(0).empty() && Clock::now() - start < std::chrono::seconds(4)) {
    m1->ask(0);
    ::poll(nullptr, 0, 5);
  }
  CHECK(Clock::now() - start < std::chrono::milliseconds(500));
  CHECK_EQ(trouble_of(*m0) + trouble_of(*m1), "");
  const auto before = Clock::now();
  m0->report(Error("enough"), {});  // tells the one that listens, and does not wait long for the other
  CHECK(becomes_troubled(*m1, 0.5));
  CHECK(Clock::now() - before < std::chrono::milliseconds(1500));
}

TEST(an_answer_is_no_news_after_three_seconds) {
  auto [a, b] = connected();
  std::map<int, Fd> zero, one;
  zero[1] = std::move(a);
  one[0] = std::move(b);
  const auto m0 = monitor(0, 2, std::move(zero)), m1 = monitor(1, 2, std::move(one));
  m0->ask(1);
  for (const Deadline deadline = Deadline::after(2); m0->answer_of(1).empty() && !deadline.passed();) ::poll(nullptr, 0, 1);
  CHECK(!m0->answer_of(1).empty());
  ::poll(nullptr, 0, 3100);
  CHECK(m0->answer_of(1).empty());
}

TEST(what_was_said_last_arrives_though_what_came_was_never_read) {
  auto [a, b] = connected_by_tcp();
  const std::vector<char> words(100'000, 'w');
  size_t said = 0, heard = 0;
  for (ssize_t n; (n = ::send(a.get(), words.data(), words.size(), MSG_NOSIGNAL | MSG_DONTWAIT)) > 0;)
    said += static_cast<size_t>(n);  // far more than the other end's kernel takes
  CHECK_EQ(::send(b.get(), "unread", 6, MSG_NOSIGNAL), 6);
  std::thread leaving([&] {
    hang_up({a.get()}, 5);
    a.reset();
  });
  ::poll(nullptr, 0, 20);
  std::vector<char> into(100'000);
  for (ssize_t n; (n = ::recv(b.get(), into.data(), into.size(), 0)) > 0;) heard += static_cast<size_t>(n);
  leaving.join();
  CHECK_EQ(heard, said);
}

TEST(a_hang_up_waits_for_nobody_longer_than_told) {
  auto [a, b] = connected_by_tcp();
  const std::vector<char> words(100'000, 'w');
  while (::send(a.get(), words.data(), words.size(), MSG_NOSIGNAL | MSG_DONTWAIT) > 0) {
  }
  const auto start = Clock::now();
  hang_up({a.get()}, 0.1);
  CHECK(Clock::now() - start > std::chrono::milliseconds(90) && Clock::now() - start < std::chrono::milliseconds(400));
  auto [c, d] = connected_by_tcp();
  CHECK_EQ(::send(c.get(), "heard", 5, MSG_NOSIGNAL), 5);
  const auto again = Clock::now();
  hang_up({c.get()}, 5);  // what is said has arrived, though nobody reads it
  CHECK(Clock::now() - again < std::chrono::milliseconds(500));
}

TEST(a_text_that_does_not_fit_is_cut_between_characters) {
  auto [a, b] = connected();
  std::map<int, Fd> zero, one;
  zero[1] = std::move(a);
  one[0] = std::move(b);
  const auto m0 = monitor(0, 2, std::move(zero)), m1 = monitor(1, 2, std::move(one));
  std::string text;
  while (text.size() < 600) text += "\u91cd";
  m1->report(Error(text), {});
  CHECK(becomes_troubled(*m0, 2));
  const std::string heard = trouble_of(*m0);
  const size_t end = heard.find(" (noticed during");
  CHECK(heard.size() > 350 && end != std::string::npos);
  CHECK_EQ(heard.substr(end - 3, 3), "\u91cd");
}

TEST(a_rank_that_left_and_closed_costs_its_host_mates_no_wait) {
  std::vector<Watch> watches;
  std::vector<std::pair<Fd, Fd>> pairs;
  for (int rank = 1; rank <= 30; ++rank) {
    pairs.push_back(connected());
    watches.push_back({rank, std::move(pairs.back().first), Fd(static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0)))});
  }
  const auto m0 = monitor(0, 31, {});
  m0->add(std::move(watches));
  const auto start = Clock::now();
  for (auto& [mine, theirs] : pairs) {
    CHECK_EQ(::send(theirs.get(), "L", 1, MSG_NOSIGNAL), 1);
    theirs.reset();
  }
  while (!m0->troubled() && Clock::now() - start < std::chrono::milliseconds(50)) ::poll(nullptr, 0, 1);
  CHECK(!m0->troubled());
  CHECK(m0->somebody_left());
}

TEST(a_closed_connection_of_a_process_that_lives_is_a_loss_after_a_moment) {
  auto [mine, theirs] = connected();
  std::vector<Watch> watches;
  watches.push_back({1, std::move(mine), Fd(static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0)))});
  const auto m0 = monitor(0, 2, {});
  m0->add(std::move(watches));
  theirs.reset();
  CHECK(becomes_troubled(*m0, 1));
  CHECK(trouble_of(*m0).find("rank 1 closed its connection without shutdown") != std::string::npos);
}

TEST(the_end_of_a_control_connection_tells_how_its_process_ended) {
  auto [mine, theirs] = connected_by_tcp();
  const pid_t pid = ::fork();
  if (pid == 0) ::poll(nullptr, 0, -1);  // holds no copy: descriptors of the library are closed in children
  std::map<int, ControlLink> links;
  links[1] = {std::move(mine), open_process(pid)};
  const Monitor m0(Identity({}, 0, 2, 1), std::move(links), [] {}, MonitorTimes{kDead, kDead});
  ::kill(pid, SIGKILL);
  theirs.reset();
  CHECK(becomes_troubled(m0, 1));
  CHECK(trouble_of(m0).find("rank 1 ended without shutdown: killed by signal 9 (Killed)") != std::string::npos);
  ::waitpid(pid, nullptr, 0);
}

TEST(a_process_that_has_the_number_of_a_dead_one_is_not_taken_for_it) {
  const pid_t pid = ::fork();
  if (pid == 0) ::poll(nullptr, 0, -1);
  const Fd pidfd = open_process(pid);
  ::kill(pid, SIGKILL);
  ::waitpid(pid, nullptr, 0);
  clone_args arguments{};
  arguments.exit_signal = SIGCHLD;
  arguments.set_tid = reinterpret_cast<uint64_t>(&pid);
  arguments.set_tid_size = 1;
  const auto successor = static_cast<pid_t>(::syscall(SYS_clone3, &arguments, sizeof arguments));
  if (successor == 0) ::_exit(7);
  if (successor < 0) return;  // only root may choose numbers
  CHECK_EQ(successor, pid);
  pollfd ended{pidfd.get(), POLLIN, 0};
  CHECK_EQ(::poll(&ended, 1, 0), 1);  // the watched one is as dead as before
  const Fd other = open_process(successor);
  CHECK_EQ(how_it_ends(other, 5), "exit code 7");
  const std::string text = how_it_ended(pidfd, pid);
  CHECK(text.empty() || text == "killed by signal 9 (Killed)");
  ::waitpid(successor, nullptr, 0);
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
