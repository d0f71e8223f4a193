// The instruction sets of an x86-64 build.
#include "kernels/table.h"

namespace roundel::kernels {

namespace portable {
extern const Table table;
}
namespace avx2 {
extern const Table table;
}
namespace avx512 {
extern const Table table;
}

std::vector<const Table*> tables() {
  __builtin_cpu_init();  // this may run before main
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  std::vector<const Table*> found;
  if (has_avx512) found.push_back(&avx512::table);
  if (has_avx2) found.push_back(&avx2::table);
  found.push_back(&portable::table);
  return found;
}

}  // namespace roundel::kernels
