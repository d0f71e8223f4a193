// transport/frame: what is sent is accepted, and nothing else: every flipped bit of a header and random garbage are refused.
#include "transport/frame.h"

#include <cstring>
#include <random>

#include "base/crc32c.h"
#include "base/error.h"
#include "check.h"

using namespace roundel;
using namespace roundel::transport;

namespace {

FrameHeader sample() {
  static const char payload[] = "payload";
  Tag tag{17, 3, {}};
  tag.signature.kind = OpKind::AllReduce;
  tag.signature.count = 1000;
  FrameHeader header = make_header(5, 2, tag, sizeof payload);
  seal(header, std::as_bytes(std::span(payload)), true);
  return header;
}

void reseal(FrameHeader& header) { header.header_crc = crc32c(&header, offsetof(FrameHeader, header_crc)); }

}  // namespace

TEST(a_header_carries_what_it_was_given) {
  const FrameHeader header = sample();
  validate(header, 2);
  CHECK_EQ(header.epoch, 5u);
  CHECK_EQ(header.sequence, 17u);
  CHECK_EQ(header.index, 3u);
  CHECK_EQ(header.length, 8u);
  CHECK_EQ(header.signature.count, 1000u);
  CHECK_EQ(header.payload_crc, crc32c("payload", 8));
}

TEST(every_flipped_bit_of_a_header_is_refused) {
  for (size_t bit = 0; bit < 8 * sizeof(FrameHeader); ++bit) {
    FrameHeader header = sample();
    reinterpret_cast<unsigned char*>(&header)[bit / 8] ^= static_cast<unsigned char>(1u << bit % 8);
    CHECK_THROWS(validate(header, 2), CorruptFrame);
  }
}

TEST(a_sealed_lie_is_refused) {
  FrameHeader header = sample();
  header.length = kMaxPayload + 1;
  reseal(header);
  CHECK_THROWS(validate(header, 2), CorruptFrame);
  header = sample();
  header.version += 1;
  reseal(header);
  CHECK_THROWS(validate(header, 2), CorruptFrame);
  CHECK_THROWS(validate(sample(), 3), CorruptFrame);  // another sender
}

TEST(garbage_is_refused) {
  std::mt19937 random(7);
  for (int i = 0; i < 100'000; ++i) {
    FrameHeader header;
    auto* words = reinterpret_cast<uint32_t*>(&header);
    for (size_t w = 0; w < sizeof header / 4; ++w) words[w] = random();
    CHECK_THROWS(validate(header, 2), CorruptFrame);
  }
}
