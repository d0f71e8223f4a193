// The end of connections. A socket that is closed while input waits in it sends a reset, which may destroy what was said last
// and has not arrived yet: so what is said here ends first, and what comes meanwhile is read and dropped.
#pragma once

#include <vector>

namespace roundel::transport {

// What ends the wait: the other end's host has everything, or the other end has closed too.
enum class Until : bool { Arrived, Closed };

// Ends what this process says on connected stream sockets and waits, for at most `seconds` in all. The caller closes them.
// Does nothing in a forked child, whose copies of the connections are its parent's.
void hang_up(std::vector<int> sockets, double seconds, Until until = Until::Arrived);

}  // namespace roundel::transport
