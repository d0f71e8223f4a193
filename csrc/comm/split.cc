#include "comm/split.h"

#include <poll.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "base/env.h"
#include "base/error.h"

namespace roundel::comm {
namespace {

constexpr double kStartShare = 0.8;  // of an operation's patience, for meeting the group

struct Wish {
  int64_t color, key;
};

// What every rank gives, gathered from all.
template <class T>
std::vector<T> gather_from_all(Communicator& parent, const T& mine, const char* what) {
  const auto size = static_cast<size_t>(parent.world().size);
  std::vector<T> all(size);
  T copy = mine;
  Operation o;
  o.kind = OpKind::AllGather;
  o.name = what;
  o.parts = plan::Parts::even(size * sizeof(T), parent.world().size);
  o.in = {&copy, sizeof(T), DType::UInt8};
  o.out = {all.data(), size * sizeof(T), DType::UInt8};
  parent.run(o);
  return all;
}

// The parent's ranks that form a group with this one, in their new order.
std::vector<int> members_of(const std::vector<Wish>& wishes, int rank) {
  const auto wish = [&](int r) { return wishes[static_cast<size_t>(r)]; };
  std::vector<int> members;
  for (int r = 0; r < static_cast<int>(wishes.size()); ++r)
    if (wish(r).color == wish(rank).color) members.push_back(r);
  std::stable_sort(members.begin(), members.end(), [&](int a, int b) { return wish(a).key < wish(b).key; });
  return members;
}

// Of the exception being handled; whatever it is, the other ranks must hear of it.
void set_text_of_current(char* text, size_t bytes) {
  try {
    throw;
  } catch (const std::exception& error) {
    std::strncpy(text, error.what(), bytes - 1);
  } catch (...) {
    std::strncpy(text, "an unknown exception", bytes - 1);
  }
  if (text[0] == '\0') std::strncpy(text, "an exception without text", bytes - 1);
}

}  // namespace

std::shared_ptr<Communicator> split(Communicator& parent, int color, int key) {
  const transport::World& world = parent.world();
  const double start_timeout = env::number("ROUNDEL_START_TIMEOUT", 0.001, 1e9);
  const double operation_timeout = env::number("ROUNDEL_TIMEOUT", 0.001, 1e9);
  const std::vector<Wish> wishes = gather_from_all(parent, Wish{color, key}, "split: colors");
  const std::vector<int> members = members_of(wishes, world.rank);

  // The first of each group says where the others find it.
  struct Meeting {
    char address[64] = {};
    char error[192] = {};
    bool lost = false;  // it is that a rank has left the parent, or is lost there
  } mine, outcome;
  transport::Job job;
  job.rank = static_cast<int>(std::find(members.begin(), members.end(), world.rank) - members.begin());
  job.size = static_cast<int>(members.size());
  job.epoch = world.epoch;
  job.mpi = world.mpi;
  job.token = parent.token_of_group(color);
  // Whoever has met the others waits for the outcome no longer than ROUNDEL_TIMEOUT: by then it must be known everywhere.
  job.start_timeout = std::min(start_timeout, kStartShare * operation_timeout);
  // Who waits for a member that has left the parent, or is lost there, must not wait for the deadline. The parent says better
  // who is lost, in the end: in the group's numbers nobody is.
  job.look = [&parent, &outcome] {
    try {
      parent.attend_all("split");
    } catch (const Error& error) {
      outcome.lost = error.kind() == ErrorKind::PeerLost;
      throw Error(error.what());
    }
  };
  for (const int r : members) job.members.push_back(world.members[static_cast<size_t>(r)]);
  Fd listener;
  if (color >= 0 && job.rank == 0 && job.size > 1) {
    try {
      listener = transport::listen_on(transport::with_port(world.address, 0));
      std::strncpy(mine.address, transport::local_address(listener.get()).text.c_str(), sizeof mine.address - 1);
    } catch (...) {
      set_text_of_current(mine.error, sizeof mine.error);
    }
  }
  const std::vector<Meeting> meetings = gather_from_all(parent, mine, "split: addresses");

  std::shared_ptr<Communicator> made;
  std::exception_ptr own;
  if (color >= 0) {
    const Meeting& meeting = meetings[static_cast<size_t>(members[0])];
    job.rendezvous = meeting.address;
    job.rendezvous_fd = listener ? listener.get() : -1;
    try {
      if (meeting.error[0] != '\0') throw Error(std::string(meeting.error, ::strnlen(meeting.error, sizeof meeting.error)));
      made = Communicator::open(transport::open_world(job));
    } catch (const Error&) {
      set_text_of_current(outcome.error, sizeof outcome.error);
    } catch (...) {  // such as Ctrl-C: the caller wants its own exception back
      set_text_of_current(outcome.error, sizeof outcome.error);
      own = std::current_exception();
    }
  }
  std::vector<Meeting> outcomes;
  try {
    outcomes = gather_from_all(parent, outcome, "split: outcomes");
  } catch (...) {
    if (own) std::rethrow_exception(own);
    throw;
  }
  if (own) std::rethrow_exception(own);
  if (std::ranges::any_of(outcomes, &Meeting::lost)) {  // what they have heard is on its way here
    const Deadline heard = Deadline::after(transport::Monitor::kVerdictSeconds);
    do parent.attend_all("split");
    while (!heard.passed() && ::poll(nullptr, 0, 1) == 0);
  }
  for (int r = 0; r < world.size; ++r)
    if (outcomes[static_cast<size_t>(r)].error[0] != '\0')
      throw Error(format("rank %d: split failed on rank %d: %.*s", world.rank, r, static_cast<int>(sizeof outcome.error - 1),
                         outcomes[static_cast<size_t>(r)].error));
  if (made != nullptr) parent.adopt(made);
  return made;
}

}  // namespace roundel::comm
