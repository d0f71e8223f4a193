// The instruction sets of a build for anything but x86-64: what the compiler makes of the portable code.
#include "kernels/table.h"

namespace roundel::kernels {

namespace portable {
extern const Table table;
}

std::vector<const Table*> tables() { return {&portable::table}; }

}  // namespace roundel::kernels
