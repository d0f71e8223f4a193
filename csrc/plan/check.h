// The checker's own door: plans as given, so that tests can hand it broken ones.
#pragma once

#include <string>
#include <vector>

#include "plan/plan.h"

namespace roundel::plan {

// plans[r] is rank r's. Says what is wrong first, or "".
std::string check(const Algorithm& algorithm, const Shape& shape, const std::vector<Plan>& plans);

}  // namespace roundel::plan
