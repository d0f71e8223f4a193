#include "base/copy.h"

#include <cstdint>
#include <cstring>

namespace roundel {
namespace {

constexpr size_t kSmall = 2048;  // below, no memcpy uses REP MOVSB

// 64 bytes at any address; the compiler makes registers of what the processor has.
using Block = uint8_t __attribute__((vector_size(64), aligned(1), may_alias));

// The compiler would make a call of memcpy of the loop, if it were allowed to.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default"), optimize("no-tree-loop-distribute-patterns")))
#endif
void copy_blocks(uint8_t* to, const uint8_t* from, size_t blocks) {
  for (size_t i = 0; i < blocks; ++i) *reinterpret_cast<Block*>(to + 64 * i) = *reinterpret_cast<const Block*>(from + 64 * i);
}

}  // namespace

void copy_bytes(void* to, const void* from, size_t bytes) {
  if (bytes == 0 || to == from) return;
  auto* target = static_cast<uint8_t*>(to);
  const auto* source = static_cast<const uint8_t*>(from);
  if (bytes >= kSmall) {
    const size_t head = -reinterpret_cast<uintptr_t>(target) % 64;  // then whole cache lines are written
    std::memcpy(target, source, head);
    const size_t blocks = (bytes - head) / 64;
    copy_blocks(target + head, source + head, blocks);
    target += head + 64 * blocks;
    source += head + 64 * blocks;
    bytes -= head + 64 * blocks;
  }
  std::memcpy(target, source, bytes);
}

}  // namespace roundel
