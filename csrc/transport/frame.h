// The frame: 64 bytes before every message on every byte stream. Parsing never allocates and trusts nothing.
#pragma once

#include <cstdint>

#include "base/signature.h"
#include "base/view.h"

namespace roundel::transport {

inline constexpr uint32_t kFrameMagic = 0x4c444e52;  // "RNDL"
inline constexpr uint16_t kFrameVersion = 5;
inline constexpr uint64_t kMaxPayload = 64u << 20;  // executors send pieces far smaller; anything above is garbage

// Flags. A frame that announces or grants has no payload: `length` is that of the message it is about. See stream.h.
inline constexpr uint16_t kHasPayloadCrc = 1;
inline constexpr uint16_t kAnnounces = 2;  // a message waits for its receive
inline constexpr uint16_t kGrants = 4;     // that receive is posted
inline constexpr uint16_t kGranted = 8;    // the payload, sent on a grant
inline constexpr uint16_t kCredits = 16;   // tells `credit` and nothing else
inline constexpr uint16_t kDiverged = 32;  // the sender knows of ranks that have called different things before

// Point-to-point messages count apart from collectives, above this.
inline constexpr uint64_t kPointToPoint = 1ull << 63;

// Which message this is: `index` counts the messages of one operation between one pair of ranks in one direction.
struct Tag {
  uint64_t sequence = 0;
  uint32_t index = 0;
  Signature signature;
};

struct FrameHeader {
  uint32_t magic = kFrameMagic;
  uint16_t version = kFrameVersion;
  uint16_t flags = 0;
  uint32_t epoch = 0;
  uint16_t source = 0;   // sending rank
  uint16_t history = 0;  // hash of all collectives that the sender has called before this one
  uint64_t sequence = 0;
  uint32_t index = 0;
  uint32_t credit = 0;  // flow control: units that the sender of this frame has consumed so far
  Signature signature;
  uint64_t length = 0;  // bytes of payload
  uint32_t payload_crc = 0;
  uint32_t header_crc = 0;  // CRC32C of the 60 bytes before
};
static_assert(sizeof(FrameHeader) == 64);

inline uint64_t payload_bytes(const FrameHeader& header) {
  return (header.flags & (kAnnounces | kGrants | kCredits)) != 0 ? 0 : header.length;
}

// A header for `length` bytes, to be completed by seal().
FrameHeader make_header(uint32_t epoch, int source, const Tag& tag, uint64_t length, uint16_t flags = 0);

// Computes the checksums, of the payload too when `with_crc`. Right before writing: the payload is then in the cache.
void seal(FrameHeader& header, ConstBytes payload, bool with_crc);

// Throws CorruptFrame naming what is wrong (magic, checksum, version, source, length).
void validate(const FrameHeader& header, int expected_source);

}  // namespace roundel::transport
