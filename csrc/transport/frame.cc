#include "transport/frame.h"

#include <cstddef>

#include "base/crc32c.h"
#include "base/error.h"

namespace roundel::transport {
namespace {
uint32_t crc_of(const FrameHeader& header) { return crc32c(&header, offsetof(FrameHeader, header_crc)); }
}  // namespace

FrameHeader make_header(uint32_t epoch, int source, const Tag& tag, uint64_t length, uint16_t flags) {
  FrameHeader header;
  header.flags = flags;
  header.epoch = epoch;
  header.source = static_cast<uint16_t>(source);
  header.sequence = tag.sequence;
  header.index = tag.index;
  header.signature = tag.signature;
  header.length = length;
  return header;
}

void seal(FrameHeader& header, ConstBytes payload, bool with_crc) {
  if (with_crc && !payload.empty()) {
    header.flags |= kHasPayloadCrc;
    header.payload_crc = crc32c(payload.data(), payload.size());
  }
  header.header_crc = crc_of(header);
}

void validate(const FrameHeader& header, int expected_source) {
  const char* wrong = nullptr;
  if (header.magic != kFrameMagic)
    wrong = "its magic number is wrong";
  else if (header.header_crc != crc_of(header))
    wrong = "its header's checksum does not match";
  else if (header.version != kFrameVersion)
    wrong = "it has another protocol version";
  else if (header.source != static_cast<uint16_t>(expected_source))
    wrong = "it names another sender";
  else if (header.length > kMaxPayload)
    wrong = "its length is above the limit";
  if (wrong != nullptr) throw CorruptFrame(format("a frame from rank %d was refused: %s", expected_source, wrong));
}

}  // namespace roundel::transport
