#include "base/copy.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace roundel {

void copy_bytes(void* to, const void* from, size_t bytes) {
  if (bytes == 0 || to == from) return;
  std::memcpy(to, from, bytes);
}

void copy_bytes_streaming(void* to, const void* from, size_t bytes) {
#if defined(__x86_64__)
  auto* target = static_cast<uint8_t*>(to);
  const auto* source = static_cast<const uint8_t*>(from);
  const size_t head = std::min<size_t>(bytes, -reinterpret_cast<uintptr_t>(target) % 64);
  copy_bytes(target, source, head);
  size_t at = head;
  for (; at + 64 <= bytes; at += 64)  // whole cache lines: parts of one would be written to memory one by one
    for (size_t i = at; i < at + 64; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
  copy_bytes(target + at, source + at, bytes - at);
  _mm_sfence();
#else
  copy_bytes(to, from, bytes);
#endif
}

}  // namespace roundel
