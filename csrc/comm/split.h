// Communicators of some of a communicator's ranks.
#pragma once

#include <memory>

#include "comm/communicator.h"

namespace roundel::comm {

// Ranks that give the same color form a communicator, in the order of key, then rank; a negative color gets none. Blocks until
// all ranks of `parent` have called it. Each new communicator has a world of its own: memory, connections, a failure detector
// and a token that only its members' job can derive, so that groups cannot disturb one another. Costs what a start costs, some
// milliseconds. Throws on all ranks when it fails on one.
std::shared_ptr<Communicator> split(Communicator& parent, int color, int key);

}  // namespace roundel::comm
