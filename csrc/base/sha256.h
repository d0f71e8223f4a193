// SHA-256 (FIPS 180-4) and HMAC-SHA256 (RFC 2104): all the cryptography that the handshake needs, without a library to link.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace roundel {

using Digest = std::array<uint8_t, 32>;

class Sha256 {
 public:
  void update(std::span<const uint8_t> data);
  Digest finish();

 private:
  void block(const uint8_t* p);
  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint8_t buffer_[64] = {};
  uint64_t length_ = 0;
};

Digest sha256(std::span<const uint8_t> data);
Digest hmac_sha256(std::span<const uint8_t> key, std::span<const uint8_t> data);

// Takes the same time wherever the first difference is.
bool equal_in_constant_time(std::span<const uint8_t> a, std::span<const uint8_t> b);

// From the kernel's generator.
void fill_random(std::span<uint8_t> out);

}  // namespace roundel
