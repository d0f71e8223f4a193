#include "transport/shm.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/copy.h"
#include "base/env.h"
#include "base/error.h"
#include "base/failpoint.h"
#include "base/process.h"

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

constexpr double kCauseSeconds = 0.1;  // between the end of a process's connections and its own

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

std::pair<Fd, Fd> receive_descriptors(int socket, const Patience& patience) {
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
    if (patience.deadline.passed()) throw Timeout("timed out while waiting for a peer's shared memory");
    patience.check();
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

// A step of the exchange with a peer. Should it fail because the peer's process ends, the error says so.
void while_it_lives(const Watch& peer, const Identity& self, const Patience& patience, const std::function<void()>& step) {
  try {
    step();
  } catch (const Error& error) {
    patience.check();  // it may have gone for a reason that is known
    if (error.kind() != ErrorKind::Generic || !has_ended(peer.connection.get())) throw;
    const std::string cause = how_it_ends(peer.process, kCauseSeconds);
    throw PeerLost(format("rank %d ended during the start%s%s", peer.rank, cause.empty() ? "" : ": ", cause.c_str()),
                   {peer.rank}, self.epoch);
  }
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

SharedMemory::SharedMemory(const Identity& identity, const std::vector<int>& ranks, bool group)
    : ranks_(ranks), segments_(ranks.size()), bells_(ranks.size()), processes_(ranks.size()) {
  const int count = static_cast<int>(ranks.size());
  index_ = static_cast<int>(index_of(identity.rank));
  fill_random({reinterpret_cast<uint8_t*>(&probe_), sizeof probe_});
  memory_ = make_segment(identity, count, arena_offset(count) + arena_bytes(ranks.size(), group), probe_);
  event_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!event_) throw system_error("eventfd", errno);
  adopt(index_, Fd(::fcntl(memory_.get(), F_DUPFD_CLOEXEC, 0)), Fd(::fcntl(event_.get(), F_DUPFD_CLOEXEC, 0)));
  arena_ = std::make_unique<Arena>(arena_base(index_), segments_[static_cast<size_t>(index_)].bytes() - arena_offset(count));
}

void SharedMemory::meet(const Identity& identity, const Patience& patience) {
  connect_all(identity, patience);
  failpoint::pass(failpoint::Point::StartBeforeMemory);
  for (const Watch& peer : watches_)
    while_it_lives(peer, identity, patience, [&] { send_descriptors(peer.connection.get(), memory_.get(), event_.get()); });
  failpoint::pass(failpoint::Point::StartAfterMemory);
  for (const Watch& peer : watches_) while_it_lives(peer, identity, patience, [&] { take_memory(peer, identity, patience); });
  readable_ = true;
  for (const Watch& peer : watches_)
    while_it_lives(peer, identity, patience, [&] {
      uint8_t peer_reads = 0;
      recv_all(peer.connection.get(), &peer_reads, 1, patience);
      readable_ &= peer_reads == 1;
    });
  memory_.reset();
  event_.reset();
}

size_t SharedMemory::index_of(int rank) const {
  const auto at = std::find(ranks_.begin(), ranks_.end(), rank);
  ROUNDEL_CHECK(at != ranks_.end());
  return static_cast<size_t>(at - ranks_.begin());
}

// Lower ranks listen, higher ones connect.
void SharedMemory::connect_all(const Identity& identity, const Patience& patience) {
  const Fd listener = listen_on(unix_address(identity, identity.rank));
  std::vector<int> higher;
  for (const int rank : ranks_) {
    if (rank < identity.rank)
      greet(rank, connect_to(unix_address(identity, rank), identity, rank, Role::Memory, patience));
    else if (rank > identity.rank)
      higher.push_back(rank);
  }
  const std::string obstacle = accept_each(listener.get(), identity, Role::Memory, higher, 1, patience,
                                           [this](int rank, Fd connection) { greet(rank, std::move(connection)); });
  for (const Watch& peer : watches_) std::erase(higher, peer.rank);
  if (!higher.empty())
    throw Timeout(format("rank %d: no shared memory from rank %s in time%s", identity.rank, join_ranks(higher).c_str(),
                         obstacle.c_str()));
}

void SharedMemory::greet(int rank, Fd connection) {
  const pid_t process = check_peer(connection.get(), rank);
  processes_[index_of(rank)] = process;
  watches_.push_back({rank, std::move(connection), open_process(process)});
}

void SharedMemory::take_memory(const Watch& from, const Identity& identity, const Patience& patience) {
  auto [memory, event] = receive_descriptors(from.connection.get(), patience);
  const size_t index = index_of(from.rank);
  adopt(static_cast<int>(index), std::move(memory), std::move(event));
  const auto* header = reinterpret_cast<const SegmentHeader*>(segments_[index].data());
  if (header->magic != SegmentHeader::kMagic || header->rank != from.rank || header->epoch != identity.epoch ||
      header->collective_bytes != kCollectiveBytes || header->ring_bytes != sizeof(Ring) * ranks_.size() ||
      header->total_bytes != segments_[index].bytes())
    throw HandshakeError(format("rank %d shares memory of another layout: do all ranks run the same version?", from.rank));
  const bool reads = env::flag("ROUNDEL_SINGLE_COPY") && can_read(static_cast<int>(index));
  send_all(from.connection.get(), &reads, 1, patience);
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
