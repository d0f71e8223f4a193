// A channel: an ordered, reliable byte stream to one peer. Shared-memory rings and sockets are the two kinds.
// Used by one thread at a time. Neither call ever blocks.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <span>

namespace roundel::transport {

class Channel {
 public:
  virtual ~Channel() = default;
  // Bytes taken from the front of `parts`, 0 when the channel is full. Throws PeerGone when the other end has closed.
  virtual size_t write(std::span<const iovec> parts) = 0;
  // Bytes read, 0 when there is nothing now. Throws PeerGone when the other end has closed and everything has been read.
  virtual size_t read(void* data, size_t bytes) = 0;
  // The same into several places, one after another. Fewer bytes than there is room for: there is nothing more now.
  virtual size_t read_into(std::span<const iovec> parts) {
    size_t got = 0;
    for (const iovec& part : parts) {
      const size_t n = read(part.iov_base, part.iov_len);
      got += n;
      if (n < part.iov_len) break;
    }
    return got;
  }
  // Descriptor to wait on, or -1 when the doorbell announces this channel's bytes.
  virtual int descriptor() const { return -1; }
  // The socket to hang up at the end, or -1 where bytes that were written cannot be lost.
  virtual int socket() const { return -1; }
  // Whether bytes travel over a network, where payloads are checksummed.
  virtual bool leaves_host() const = 0;
};

// Internal to transport/: caught by the stream layer, which knows the operation, and turned into PeerLost.
struct PeerGone {};

}  // namespace roundel::transport
