#include "transport/shm.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/copy.h"
#include "base/env.h"
#include "base/error.h"
#include "base/failpoint.h"
#include "base/interrupt.h"

namespace roundel::transport {

// First page of a segment. Written by the owner before its descriptor is handed out; only the doorbell changes later.
struct SegmentHeader {
  static constexpr uint64_t kMagic = 0x31304d454d444e52;  // "RNDMEM01"
  uint64_t magic;
  uint32_t epoch;
  int32_t rank;
  uint64_t collective_bytes;
  uint64_t ring_bytes;
  uint64_t total_bytes;
  uint64_t probe_address, probe;  // peers who can read this process find `probe` at that address
  alignas(64) DoorbellState bell;
};

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kLeastArena = size_t{16} << 30, kLeastGroupArena = size_t{4} << 30;

// From the segment's owner to one peer. Head and tail count bytes since the start and never wrap in practice.
struct Ring {
  alignas(64) std::atomic<uint64_t> head;  // written by the owner
  alignas(64) std::atomic<uint64_t> tail;  // written by the peer
  alignas(64) std::byte data[kRingBytes];
};

constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

size_t rings_offset() { return kPage + kCollectiveBytes; }
size_t arena_offset(int local_size) {
  return round_up(rings_offset() + sizeof(Ring) * static_cast<size_t>(local_size), kHugePage);
}

// Every rank maps the arenas of all, for the job and for each group, into 128 TiB of address space. A rank's share of the
// memory suffices where all allocate alike; where they do not, 16 GiB are room enough and cost 4 TiB with 256 ranks. Of groups
// there may be dozens.
size_t arena_bytes(size_t local_size, bool group) {
  if (!env::text("ROUNDEL_ARENA_BYTES").empty()) return round_up(env::bytes("ROUNDEL_ARENA_BYTES"), kPage);
  const size_t memory = static_cast<size_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  rlimit limit{};
  if (::getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) return std::min(memory, size_t{64} << 20);
  const size_t share = std::max(memory / local_size, std::min(memory, kLeastArena));
  return round_up(group ? std::min(share, std::max(share / 8, kLeastGroupArena)) : share, kPage);
}

Fd make_segment(const Identity& identity, int local_size, size_t total, const uint64_t& probe) {
  Fd fd(::memfd_create("roundel", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) throw system_error("memfd_create", errno);
  ::fchmod(fd.get(), 0600);  // made open to all: whoever could look into /proc/PID/fd could open it
  if (::ftruncate(fd.get(), static_cast<off_t>(total)) != 0)
    throw system_error(format("size shared memory to %zu bytes", total), errno);
  if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    throw system_error("seal shared memory", errno);
  const Mapping page(fd.get(), kPage);
  auto* header = reinterpret_cast<SegmentHeader*>(page.data());
  header->epoch = identity.epoch;
  header->rank = identity.rank;
  header->collective_bytes = kCollectiveBytes;
  header->ring_bytes = sizeof(Ring) * static_cast<size_t>(local_size);
  header->total_bytes = total;
  header->probe_address = reinterpret_cast<uint64_t>(&probe);
  header->probe = probe;
  header->magic = SegmentHeader::kMagic;
  return fd;
}

void send_descriptors(int socket, int memory, int event) {
  char byte = 'm';
  iovec payload{&byte, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &payload;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* rights = CMSG_FIRSTHDR(&message);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(2 * sizeof(int));
  const int both[2] = {memory, event};
  std::memcpy(CMSG_DATA(rights), both, sizeof both);
  if (::sendmsg(socket, &message, MSG_NOSIGNAL) != 1) throw system_error("hand shared memory to a peer", errno);
}

std::pair<Fd, Fd> receive_descriptors(int socket, Deadline deadline) {
  char byte = 0;
  iovec payload{&byte, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))];
  for (;;) {
    msghdr message{};
    message.msg_iov = &payload;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    const ssize_t got = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    std::vector<Fd> came;  // whatever came has an owner now
    if (const cmsghdr* rights = got >= 0 ? CMSG_FIRSTHDR(&message) : nullptr;
        rights != nullptr && rights->cmsg_level == SOL_SOCKET && rights->cmsg_type == SCM_RIGHTS)
      for (size_t i = 0; i < (rights->cmsg_len - CMSG_LEN(0)) / sizeof(int); ++i) {
        int fd = -1;
        std::memcpy(&fd, CMSG_DATA(rights) + i * sizeof fd, sizeof fd);
        came.emplace_back(fd);
      }
    if (got == 1 && came.size() == 2 && (message.msg_flags & MSG_CTRUNC) == 0) return {std::move(came[0]), std::move(came[1])};
    if (got >= 0 || (errno != EAGAIN && errno != EINTR))
      throw Error("a peer closed the connection before it shared its memory, or sent something else");
    if (deadline.passed()) throw Timeout("timed out while waiting for a peer's shared memory");
    check_interrupt();
    ::usleep(200);
  }
}

// The peer's user must be ours. Returns its process, 0 where it cannot be seen.
pid_t check_peer(int socket, int rank) {
  ucred peer{};
  socklen_t length = sizeof peer;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0) throw system_error("SO_PEERCRED", errno);
  if (peer.uid != ::geteuid())
    throw HandshakeError(
        format("rank %d runs as user %u, this process as %u: they cannot share memory", rank, peer.uid, ::geteuid()));
  return peer.pid;
}

class RingChannel final : public Channel {
 public:
  RingChannel(Ring* out, Ring* in, const Doorbell* peer_bell) : out_(out), in_(in), bell_(peer_bell) {}

  size_t write(std::span<const iovec> parts) override {
    const uint64_t start = out_->head.load(std::memory_order_relaxed);
    const uint64_t used = start - out_->tail.load(std::memory_order_acquire);
    if (used > kRingBytes) throw CorruptFrame("a shared-memory ring's counters are inconsistent");
    uint64_t room = kRingBytes - used, head = start;
    for (const iovec& part : parts) {
      const size_t take = std::min<size_t>(part.iov_len, room);
      copy(
          head, take,
          [&](std::byte* ring, size_t at, size_t n) { copy_bytes(ring, static_cast<const std::byte*>(part.iov_base) + at, n); },
          out_);
      head += take;
      room -= take;
    }
    if (head == start) return 0;
    out_->head.store(head, std::memory_order_release);
    bell_->ring();
    return static_cast<size_t>(head - start);
  }

  size_t read(void* data, size_t bytes) override {
    const uint64_t tail = in_->tail.load(std::memory_order_relaxed);
    const uint64_t ready = in_->head.load(std::memory_order_acquire) - tail;
    if (ready == 0) return 0;
    if (ready > kRingBytes) throw CorruptFrame("a shared-memory ring's counters are inconsistent");
    const size_t take = std::min<size_t>(bytes, ready);
    copy(
        tail, take,
        [&](const std::byte* ring, size_t at, size_t n) { copy_bytes(static_cast<std::byte*>(data) + at, ring, n); }, in_);
    in_->tail.store(tail + take, std::memory_order_release);
    bell_->ring();
    return take;
  }

  bool leaves_host() const override { return false; }

 private:
  // The range [position, position + bytes) of the ring is one or two runs of memory.
  template <class Move>
  static void copy(uint64_t position, size_t bytes, Move move, Ring* ring) {
    const size_t begin = position % kRingBytes;
    const size_t first = std::min(bytes, kRingBytes - begin);
    move(ring->data + begin, 0, first);
    if (bytes > first) move(ring->data, first, bytes - first);
  }

  Ring* out_;
  Ring* in_;
  const Doorbell* bell_;
};

}  // namespace

std::byte* Arena::allocate(size_t bytes) {
  const size_t want = round_up(std::max<size_t>(bytes, 1), bytes >= kPage ? kPage : 64);
  const size_t align = bytes >= kHugePage ? kHugePage : bytes >= kPage ? kPage : 64;
  std::unique_lock lock(mutex_);
  size_t at = 0;
  for (const auto& [offset, length] : used_) {  // first fit
    if (offset >= at && offset - at >= want) break;
    at = round_up(offset + length, align);
  }
  if (at + want > bytes_)
    throw Error(
        format("the shared-memory arena of %zu bytes has no room for %zu more; raise ROUNDEL_ARENA_BYTES", bytes_, bytes));
  used_[at] = want;
  lock.unlock();
  use_huge_pages(base_ + at, want);
  return base_ + at;
}

void Arena::free(std::byte* data) {
  const std::lock_guard lock(mutex_);
  const auto it = used_.find(static_cast<size_t>(data - base_));
  ROUNDEL_CHECK(it != used_.end());
  if (it->second >= kPage) ::madvise(data, it->second, MADV_REMOVE);  // hand the memory back; it reads as zero when used again
  used_.erase(it);
}

std::optional<size_t> Arena::offset_of(const void* data, size_t bytes) const {
  const auto* p = static_cast<const std::byte*>(data);
  if (p < base_ || p + bytes > base_ + bytes_) return std::nullopt;
  return static_cast<size_t>(p - base_);
}

SharedMemory::SharedMemory(const Identity& identity, const std::vector<int>& ranks, Deadline deadline, bool group)
    : ranks_(ranks) {
  const int count = static_cast<int>(ranks.size());
  index_ = static_cast<int>(std::find(ranks.begin(), ranks.end(), identity.rank) - ranks.begin());
  ROUNDEL_CHECK(index_ < count);
  segments_.resize(ranks.size());
  bells_.resize(ranks.size());

  processes_.resize(ranks.size());
  fill_random({reinterpret_cast<uint8_t*>(&probe_), sizeof probe_});

  const Fd memory = make_segment(identity, count, arena_offset(count) + arena_bytes(ranks.size(), group), probe_);
  const Fd event(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!event) throw system_error("eventfd", errno);
  adopt(index_, Fd(::fcntl(memory.get(), F_DUPFD_CLOEXEC, 0)), Fd(::fcntl(event.get(), F_DUPFD_CLOEXEC, 0)));

  // Lower ranks listen, higher ones connect; then both hand over their descriptors.
  const Fd listener = listen_on(unix_address(identity, identity.rank));
  std::map<int, Fd> connections;
  for (int i = 0; i < index_; ++i)
    connections[ranks[static_cast<size_t>(i)]] = connect_to(unix_address(identity, ranks[static_cast<size_t>(i)]), identity,
                                                            ranks[static_cast<size_t>(i)], Role::Memory, deadline);
  const std::vector<int> higher(ranks.begin() + index_ + 1, ranks.end());
  for (auto& [rank, fd] : accept_all(listener.get(), identity, Role::Memory, higher, deadline))
    connections[rank] = std::move(fd);
  std::vector<int> missing;
  for (const int rank : higher)
    if (!connections.contains(rank)) missing.push_back(rank);
  if (!missing.empty())
    throw Timeout(format("rank %d: no shared memory from rank %s in time", identity.rank, join_ranks(missing).c_str()));

  failpoint::pass(failpoint::Point::StartBeforeMemory);
  for (auto& [rank, fd] : connections) {
    const pid_t process = check_peer(fd.get(), rank);
    processes_[static_cast<size_t>(std::find(ranks.begin(), ranks.end(), rank) - ranks.begin())] = process;
    send_descriptors(fd.get(), memory.get(), event.get());
    Fd watched = process > 0 ? Fd(static_cast<int>(::syscall(SYS_pidfd_open, process, 0))) : Fd();
    watches_.push_back({rank, std::move(fd), std::move(watched)});
  }
  failpoint::pass(failpoint::Point::StartAfterMemory);
  for (const Watch& watch : watches_) {
    auto [peer_memory, peer_event] = receive_descriptors(watch.connection.get(), deadline);
    const int index = static_cast<int>(std::find(ranks.begin(), ranks.end(), watch.rank) - ranks.begin());
    adopt(index, std::move(peer_memory), std::move(peer_event));
    const auto* header = reinterpret_cast<const SegmentHeader*>(segments_[static_cast<size_t>(index)].data());
    if (header->magic != SegmentHeader::kMagic || header->rank != watch.rank || header->epoch != identity.epoch ||
        header->collective_bytes != kCollectiveBytes || header->ring_bytes != sizeof(Ring) * ranks.size() ||
        header->total_bytes != segments_[static_cast<size_t>(index)].bytes())
      throw HandshakeError(format("rank %d shares memory of another layout: do all ranks run the same version?", watch.rank));
    const bool reads = env::flag("ROUNDEL_SINGLE_COPY") && can_read(index);
    send_all(watch.connection.get(), &reads, 1, deadline);
  }
  readable_ = true;
  for (const Watch& watch : watches_) {
    uint8_t peer_reads = 0;
    recv_all(watch.connection.get(), &peer_reads, 1, deadline);
    readable_ &= peer_reads == 1;
  }
  arena_ = std::make_unique<Arena>(arena_base(index_), segments_[static_cast<size_t>(index_)].bytes() - arena_offset(count));
}

SharedMemory::~SharedMemory() = default;

bool SharedMemory::can_read(int index) const {
  const auto* header = reinterpret_cast<const SegmentHeader*>(segments_[static_cast<size_t>(index)].data());
  uint64_t found = 0;
  return read(index, &found, header->probe_address, sizeof found) && found == header->probe;
}

bool SharedMemory::read(int index, void* to, uint64_t address, size_t bytes) const {
  const pid_t process = processes_[static_cast<size_t>(index)];
  auto* target = static_cast<std::byte*>(to);
  while (process > 0 && bytes > 0) {
    const iovec here{target, bytes}, there{reinterpret_cast<void*>(address), bytes};
    const ssize_t got = ::process_vm_readv(process, &here, 1, &there, 1, 0);
    if (got <= 0) return false;
    target += got;
    address += static_cast<uint64_t>(got);
    bytes -= static_cast<size_t>(got);
  }
  return bytes == 0;
}

void SharedMemory::adopt(int index, Fd memory, Fd event) {
  struct stat status{};
  const int seals = ::fcntl(memory.get(), F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 || ::fstat(memory.get(), &status) != 0 ||
      static_cast<size_t>(status.st_size) < arena_offset(size()))
    throw HandshakeError("a peer's shared memory is not sealed or too small");
  auto& segment = segments_[static_cast<size_t>(index)];
  segment = Mapping(memory.get(), static_cast<size_t>(status.st_size));
  bells_[static_cast<size_t>(index)] = Doorbell(&reinterpret_cast<SegmentHeader*>(segment.data())->bell, std::move(event));
}

std::byte* SharedMemory::collectives(int index) const { return segments_[static_cast<size_t>(index)].data() + kPage; }

std::byte* SharedMemory::arena_base(int index) const {
  return segments_[static_cast<size_t>(index)].data() + arena_offset(size());
}

std::unique_ptr<Channel> SharedMemory::channel(int index) {
  const auto ring = [&](int owner, int to) {
    return reinterpret_cast<Ring*>(segments_[static_cast<size_t>(owner)].data() + rings_offset()) + to;
  };
  return std::make_unique<RingChannel>(ring(index_, index), ring(index, index_), &bells_[static_cast<size_t>(index)]);
}

}  // namespace roundel::transport
