// CRC32C (Castagnoli, RFC 3720), as hardware computes it: crc32c("123456789") == 0xe3069283.
#pragma once

#include <cstddef>
#include <cstdint>

namespace roundel {

// Checksum of `bytes` bytes, continuing from `crc` (0 to start), so that parts may be fed as they arrive.
uint32_t crc32c(const void* data, size_t bytes, uint32_t crc = 0);

// The table-driven path, for processors without the instruction and for the test that compares the two.
uint32_t crc32c_portable(const void* data, size_t bytes, uint32_t crc = 0);

}  // namespace roundel
