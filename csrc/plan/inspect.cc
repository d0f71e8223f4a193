// The checker's first half: one plan by itself.
#include "plan/inspect.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "base/error.h"

namespace roundel::plan {
namespace {

std::string describe(const Place& place) {
  constexpr const char* names[] = {"In", "Out", "Scratch"};
  return format("%s[%zu, %zu)", names[static_cast<int>(place.buffer)], place.begin, place.begin + place.count);
}

bool before(const Place& a, const Place& b) {
  return std::tie(a.buffer, a.begin, a.count) < std::tie(b.buffer, b.begin, b.count);
}

bool equal(const Place& a, const Place& b) { return !before(a, b) && !before(b, a); }

// What is wrong with a place, or nullptr.
const char* flaw(const Place& place, const Extents& extents) {
  const size_t extent = extents.of(place.buffer);
  if (place.buffer == Buffer::In && extent == 0) return "there is no In on this rank";
  if (place.buffer == Buffer::Out && extent == 0) return "there is no Out on this rank";
  if (place.count == 0) return "an empty range";
  if (place.begin > extent || place.count > extent - place.begin) return "outside the buffer";
  return nullptr;
}

// What is wrong with a step by itself, or nullptr.
const char* flaw(const Step& step, int rank, const Plan& plan, const Algorithm& algorithm, const Shape& shape,
                 const Extents& extents) {
  if (communicates(step) && (step.peer < 0 || step.peer >= shape.size || step.peer == rank)) return "no such peer";
  if (communicates(step) && !step.from.empty()) return "`from` is for Fold and Copy";
  if (step.action == Action::Fold && step.from.empty()) return "nothing to fold";
  if (step.action == Action::Copy && step.from.size() != 1) return "a copy is from one place";
  if (step.action != Action::Send && step.place.buffer == Buffer::In) return "In is never written";
  if (adds(step) && !reduces(algorithm.collective)) return "this collective reduces nothing";
  if (step.last && !adds(step)) return "`last` on a step that adds nothing";
  if (plan.single_fold && step.action == Action::RecvReduce) return "single_fold, yet it reduces what it receives";
  if (const char* what = flaw(step.place, extents)) return what;
  for (const Place& place : step.from) {
    if (place.count != step.place.count) return "places of different length";
    if (const char* what = flaw(place, extents)) return what;
  }
  return nullptr;
}

void inspect_ranges(int rank, const Plan& plan) {
  std::vector<Place> named;
  for (const Step& step : plan.steps) {
    named.push_back(step.place);
    named.insert(named.end(), step.from.begin(), step.from.end());
  }
  std::sort(named.begin(), named.end(), before);
  named.erase(std::unique(named.begin(), named.end(), equal), named.end());
  for (size_t i = 1; i < named.size(); ++i) {
    const Place &a = named[i - 1], &b = named[i];
    if (a.buffer == b.buffer && a.begin + a.count > b.begin)
      throw Fault{format("rank %d: %s and %s are neither equal nor disjoint", rank, describe(a).c_str(), describe(b).c_str())};
  }
}

// Steps of one round run concurrently: what one writes, no other may touch.
void inspect_rounds(int rank, const Plan& plan) {
  struct Use {
    Place place;
    bool writes;
    size_t step;
  };
  std::vector<Use> uses;  // of one round
  for (size_t begin = 0, end = 0; begin < plan.steps.size(); begin = end) {
    uses.clear();
    for (; end < plan.steps.size() && plan.steps[end].round == plan.steps[begin].round; ++end) {
      const Step& step = plan.steps[end];
      uses.push_back({step.place, step.action != Action::Send, end});
      for (const Place& place : step.from)
        if (!equal(place, step.place)) uses.push_back({place, false, end});
    }
    std::sort(uses.begin(), uses.end(), [](const Use& a, const Use& b) { return before(a.place, b.place); });
    size_t touched = 0, written = 0;  // up to where, in the buffer at hand
    for (size_t i = 0; i < uses.size(); ++i) {
      const Use& use = uses[i];
      if (i == 0 || uses[i - 1].place.buffer != use.place.buffer) touched = written = 0;
      if (use.place.begin < (use.writes ? touched : written))
        throw Fault{plan::describe(rank, plan, use.step) + ": another step of the round uses the same range"};
      touched = std::max(touched, use.place.begin + use.place.count);
      if (use.writes) written = std::max(written, use.place.begin + use.place.count);
    }
  }
}

}  // namespace

std::string describe(int rank, const Plan& plan, size_t index) {
  constexpr const char* names[] = {"send", "recv", "recv_reduce", "fold", "copy"};
  const Step& step = plan.steps[index];
  std::string peer;
  if (communicates(step)) peer = format(" %s rank %d", step.action == Action::Send ? "to" : "from", step.peer);
  return format("rank %d, step %zu of %zu (round %d: %s %s%s)", rank, index, plan.steps.size(), step.round,
                names[static_cast<int>(step.action)], describe(step.place).c_str(), peer.c_str());
}

Extents extents(int rank, const Plan& plan, Collective collective, const Shape& shape) {
  const size_t all = shape.parts.total(), at_root = rank == shape.root ? all : 0;
  switch (collective) {
    case Collective::AllReduce:
    case Collective::ReduceScatter:
    case Collective::AllGather:
    case Collective::Broadcast:
    case Collective::Reduce:
      return {0, all, plan.scratch};
    case Collective::AllToAll:
      return {all, all, plan.scratch};
    case Collective::Gather:
      return {shape.parts.count(rank), at_root, plan.scratch};
    case Collective::Scatter:
      return {at_root, shape.parts.count(rank), plan.scratch};
    case Collective::AllToAllV:
      Extents extents{0, 0, plan.scratch};
      for (int peer = 0; peer < shape.size; ++peer) {
        extents.in += shape.sent(rank, peer);
        extents.out += shape.sent(peer, rank);
      }
      return extents;
  }
  ROUNDEL_CHECK(!"a collective has extents");
}

void inspect(int rank, const Plan& plan, const Algorithm& algorithm, const Shape& shape) {
  const Extents space = extents(rank, plan, algorithm.collective, shape);
  for (size_t i = 0; i < plan.steps.size(); ++i) {
    if (const char* what = flaw(plan.steps[i], rank, plan, algorithm, shape, space))
      throw Fault{describe(rank, plan, i) + ": " + what};
    if (plan.steps[i].round < (i > 0 ? plan.steps[i - 1].round : 0))
      throw Fault{describe(rank, plan, i) + ": rounds must ascend"};
  }
  if (plan.single_fold != (algorithm.single_fold || shape.size == 1))
    throw Fault{format("rank %d: single_fold is not what the row says", rank)};
  if (plan.nested != algorithm.nested && shape.size > 1) throw Fault{format("rank %d: nested is not what the row says", rank)};
  if (!plan.nested) inspect_ranges(rank, plan);
  inspect_rounds(rank, plan);
}

}  // namespace roundel::plan
