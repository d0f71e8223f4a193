// SHA-256 (FIPS 180-4), HMAC-SHA256 (RFC 2104) and HKDF (RFC 5869): all the cryptography that the handshake needs, without a
// library to link. What holds key material is overwritten when it goes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace roundel {

using Digest = std::array<uint8_t, 32>;

// Overwrites with zeros, also where the compiler could prove that nobody looks again.
void wipe(std::span<uint8_t> bytes);

// 32 secret bytes; every copy is wiped at its end.
struct Secret : Digest {
  ~Secret() { wipe(*this); }
};

class Sha256 {
 public:
  ~Sha256();
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

// One key per purpose out of one secret: extract once, then expand with a different `info` for each (one block: 32 bytes).
Secret hkdf_extract(std::span<const uint8_t> salt, const Secret& secret);
Secret hkdf_expand(const Secret& extracted, std::span<const uint8_t> info);

// Takes the same time wherever the first difference is.
bool equal_in_constant_time(std::span<const uint8_t> a, std::span<const uint8_t> b);

// From the kernel's generator.
void fill_random(std::span<uint8_t> out);

}  // namespace roundel
