// The checker's first half: one plan by itself.
#include "plan/inspect.h"

#include <algorithm>
#include <cstdint>
#include <tuple>

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
const char* flaw(const Place& place, const Plan& plan, const Algorithm& algorithm, const Shape& shape) {
  size_t extent = shape.parts.total();
  if (place.buffer == Buffer::Scratch) extent = plan.scratch;
  if (place.buffer == Buffer::In && algorithm.collective != Collective::AllToAll) return "this collective has no In";
  if (place.count == 0) return "an empty range";
  if (place.begin > extent || place.count > extent - place.begin) return "outside the buffer";
  return nullptr;
}

// What is wrong with a step by itself, or nullptr.
const char* flaw(const Step& step, int rank, const Plan& plan, const Algorithm& algorithm, const Shape& shape) {
  const bool adds = step.action == Action::RecvReduce || step.action == Action::Fold;
  if (communicates(step) && (step.peer < 0 || step.peer >= shape.size || step.peer == rank)) return "no such peer";
  if (communicates(step) && !step.from.empty()) return "`from` is for Fold and Copy";
  if (step.action == Action::Fold && step.from.empty()) return "nothing to fold";
  if (step.action == Action::Copy && step.from.size() != 1) return "a copy is from one place";
  if (step.action != Action::Send && step.place.buffer == Buffer::In) return "In is never written";
  if (adds && !reduces(algorithm.collective)) return "this collective reduces nothing";
  if (step.last && !adds) return "`last` on a step that adds nothing";
  if (plan.single_fold && step.action == Action::RecvReduce) return "single_fold, yet it reduces what it receives";
  if (const char* what = flaw(step.place, plan, algorithm, shape)) return what;
  for (const Place& place : step.from) {
    if (place.count != step.place.count) return "places of different length";
    if (const char* what = flaw(place, plan, algorithm, shape)) return what;
  }
  return nullptr;
}

// Steps of one round run concurrently: what one writes, no other may touch.
void inspect_rounds(int rank, const Plan& plan, const Ranges& ranges) {
  struct Use {
    int read_in = -1, written_in = -1;  // rounds
  };
  std::vector<Use> uses(ranges.size());
  for (size_t i = 0; i < plan.steps.size(); ++i) {
    const Step& step = plan.steps[i];
    const auto conflict = [&] { throw Fault{describe(rank, plan, i) + ": another step of the round uses the same range"}; };
    const auto read = [&](const Place& place) {
      Use& use = uses[ranges.find(place)];
      if (use.written_in == step.round) conflict();
      use.read_in = step.round;
    };
    for (const Place& place : step.from)
      if (!equal(place, step.place)) read(place);
    if (step.action == Action::Send) {
      read(step.place);
      continue;
    }
    Use& use = uses[ranges.find(step.place)];
    if (use.written_in == step.round || use.read_in == step.round) conflict();
    use.written_in = step.round;
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

Ranges::Ranges(int rank, const Plan& plan, const Shape& shape) {
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

  size_t covered = 0;
  const auto cover = [&](size_t begin) {
    if (covered < begin) ranges_.push_back({Buffer::Out, covered, begin - covered});
  };
  for (const Place& place : named) {
    if (place.buffer == Buffer::Scratch) {
      cover(shape.parts.total());
      covered = shape.parts.total();
    }
    if (place.buffer == Buffer::Out) {
      cover(place.begin);
      covered = place.begin + place.count;
    }
    ranges_.push_back(place);
  }
  cover(shape.parts.total());
}

size_t Ranges::find(const Place& place) const {
  return static_cast<size_t>(std::lower_bound(ranges_.begin(), ranges_.end(), place, before) - ranges_.begin());
}

size_t Ranges::first(Buffer buffer, size_t element) const {
  const Place beyond{buffer, element, SIZE_MAX};
  return static_cast<size_t>(std::upper_bound(ranges_.begin(), ranges_.end(), beyond, before) - ranges_.begin()) - 1;
}

Ranges inspect(int rank, const Plan& plan, const Algorithm& algorithm, const Shape& shape) {
  for (size_t i = 0; i < plan.steps.size(); ++i) {
    if (const char* what = flaw(plan.steps[i], rank, plan, algorithm, shape))
      throw Fault{describe(rank, plan, i) + ": " + what};
    if (plan.steps[i].round < (i > 0 ? plan.steps[i - 1].round : 0))
      throw Fault{describe(rank, plan, i) + ": rounds must ascend"};
  }
  if (plan.single_fold != (algorithm.single_fold || shape.size == 1))
    throw Fault{format("rank %d: single_fold is not what the row says", rank)};
  Ranges ranges(rank, plan, shape);
  inspect_rounds(rank, plan, ranges);
  return ranges;
}

}  // namespace roundel::plan
