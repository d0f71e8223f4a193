// Which algorithm to run: the cheapest by the linear model  rounds * latency + bytes * (time per byte)  of Hockney, "The
// communication challenge for MPP", 1994, unless the user forces one by name.
#include <algorithm>
#include <set>

#include "base/error.h"
#include "plan/plan.h"

namespace roundel::plan {
namespace {

// Elements that the ranks of the busiest host send to other hosts. Counted in the plans themselves: exact for every algorithm.
size_t elements_leaving(const Algorithm& row, const Shape& shape) {
  if (shape.host.empty()) return 0;
  std::vector<size_t> leaving(static_cast<size_t>(1 + *std::max_element(shape.host.begin(), shape.host.end())));
  if (leaving.size() == 1) return 0;
  Shape of_rank = shape;
  for (of_rank.rank = 0; of_rank.rank < shape.size; ++of_rank.rank) {
    const auto host = static_cast<size_t>(shape.host[static_cast<size_t>(of_rank.rank)]);
    for (const Step& step : row.make(of_rank).steps)
      if (step.action == Action::Send && static_cast<size_t>(shape.host[static_cast<size_t>(step.peer)]) != host)
        leaving[host] += step.place.count;
  }
  return *std::max_element(leaving.begin(), leaving.end());
}

double seconds(const Algorithm& row, const Shape& shape, DType dtype, const LinkCost& cost) {
  // 16-bit sums that are not rounded once travel as float32.
  const size_t widening = is_half(dtype) && !row.single_fold ? 2 : 1;
  const auto wire = static_cast<double>(size_of(dtype) * widening);
  const Cost plan = row.cost(shape);
  double total = static_cast<double>(plan.rounds) * cost.seconds_per_round +
                 static_cast<double>(plan.messages) * cost.seconds_per_message +
                 static_cast<double>(plan.elements_sent) * wire * cost.seconds_per_byte +
                 static_cast<double>(plan.elements_added) * wire * cost.seconds_per_added_byte;
  if (cost.seconds_per_leaving_byte > 0)
    total += static_cast<double>(elements_leaving(row, shape)) * wire * cost.seconds_per_leaving_byte;
  return total;
}

// Throws if no collective has an algorithm of this name.
void require_known(const std::string& name) {
  std::set<std::string> known;
  for (const Algorithm& row : algorithms()) known.insert(row.name);
  if (known.contains(name)) return;
  std::string names;
  for (const std::string& each : known) names += (names.empty() ? "" : ", ") + each;
  throw InvalidArgument(format("there is no algorithm '%s'; known are: %s", name.c_str(), names.c_str()));
}

}  // namespace

const Algorithm& select(Collective collective, const Shape& shape, DType dtype, const LinkCost& cost,
                        const std::string& forced) {
  if (!forced.empty()) {
    require_known(forced);
    if (const Algorithm* row = find_algorithm(collective, forced)) return *row;
  }
  const Algorithm* best = nullptr;
  double best_seconds = 0;
  for (const Algorithm& row : algorithms()) {
    if (row.collective != collective) continue;
    const double row_seconds = seconds(row, shape, dtype, cost);
    if (best != nullptr && row_seconds >= best_seconds) continue;
    best = &row;
    best_seconds = row_seconds;
  }
  ROUNDEL_CHECK(best != nullptr);
  return *best;
}

}  // namespace roundel::plan
