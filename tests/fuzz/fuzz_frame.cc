// What a peer's byte stream may hold: the whole receive path (headers, matching, early messages, checksums, back-pressure) on
// arbitrary bytes in arbitrary pieces. The first byte chooses the pieces and whether headers are given valid checksums, without
// which few inputs would get past the first check.
#include <sys/eventfd.h>

#include <cstring>
#include <memory>

#include "base/crc32c.h"
#include "base/error.h"
#include "transport/stream.h"

using namespace roundel;
using namespace roundel::transport;

namespace {

struct FakeChannel final : Channel {
  FakeChannel(std::vector<uint8_t> bytes, size_t piece) : bytes(std::move(bytes)), piece(piece) {}
  size_t write(std::span<const iovec> parts) override { return parts[0].iov_len; }
  size_t read(void* data, size_t wanted) override {
    if (at == bytes.size()) throw PeerGone{};
    if (++calls % 3 == 0) return 0;
    const size_t n = std::min({wanted, piece, bytes.size() - at});
    std::memcpy(data, bytes.data() + at, n);
    at += n;
    return n;
  }
  bool leaves_host() const override { return true; }
  std::vector<uint8_t> bytes;
  size_t piece, at = 0, calls = 0;
};

// Headers one after another, each followed by the payload that it announces: gives them checksums.
void seal(std::vector<uint8_t>& bytes) {
  for (size_t at = 0; at + sizeof(FrameHeader) <= bytes.size();) {
    FrameHeader header;
    std::memcpy(&header, bytes.data() + at, sizeof header);
    const FrameHeader usual;
    header.magic = usual.magic;
    header.version = usual.version;
    header.source = 1;
    header.epoch &= 1;
    header.sequence &= 3;
    header.index &= 3;
    header.length %= 256;
    header.header_crc = crc32c(&header, offsetof(FrameHeader, header_crc));
    std::memcpy(bytes.data() + at, &header, sizeof header);
    at += sizeof header + payload_bytes(header);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  std::vector<uint8_t> bytes(data + 1, data + size);
  if ((data[0] & 1) != 0) seal(bytes);
  static DoorbellState state;
  Doorbell bell(&state, Fd(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)));
  std::vector<StreamTransport::Channels> channels(2);
  channels[1].push_back(std::make_unique<FakeChannel>(std::move(bytes), 1 + data[0] / 2));
  StreamTransport transport(Identity(Token{}, 0, 2, 1), std::move(channels), &bell, 0);
  std::byte into[3][16];
  try {
    for (uint32_t i = 0; i < 3; ++i) transport.recv(1, Tag{i / 2 + 1, i % 2, {}}, into[i]);
    for (size_t i = 0; i < 2 * size + 8; ++i) transport.poll();
    transport.retire(Tag{1, 0, {}});
  } catch (const Error&) {
  }
  return 0;
}
