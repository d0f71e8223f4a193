// Moves messages between this rank and its peers. All methods are called by one thread at a time (the one that executes an
// operation). A lost peer makes every pending and later call that needs it throw PeerLost; a message is received whole or not
// at all.
#pragma once

#include <functional>
#include <vector>

#include "base/clock.h"
#include "base/view.h"
#include "transport/frame.h"

namespace roundel::transport {

struct Ticket {
  uint32_t slot = 0;
  uint32_t generation = 0;
};

class Transport {
 public:
  virtual ~Transport() = default;
  // Queue a message; `bytes` must stay as it is until the ticket is done. At most kMaxPayload bytes each.
  virtual Ticket send(int peer, const Tag& tag, ConstBytes bytes) = 0;
  // Expect a message of exactly this size. At most one receive per (peer, sequence, index).
  virtual Ticket recv(int peer, const Tag& tag, Bytes bytes) = 0;
  // True once, when it is done; the ticket is void afterwards.
  virtual bool test(Ticket ticket) = 0;
  // Moves what can be moved now; true when anything did.
  virtual bool poll() = 0;
  // Sleeps until something can be moved, the doorbell rings, or the deadline; at most 100 ms. Does not begin to sleep once
  // `disturbed`, which it asks after it can be woken: who changes something and then rings is always noticed.
  using Disturbed = std::function<bool()>;
  virtual void sleep(Deadline deadline, const Disturbed& disturbed) = 0;
  // The same in three steps, for an owner whose one thread dozes while another may call all other methods. arm(): from here on
  // rings and bytes end a doze; false when something moved or disturbs. doze(): any one thread; at most 100 ms. awake():
  // whoever goes on, before anything else.
  virtual bool arm(const Disturbed& disturbed) = 0;
  virtual void doze() = 0;
  virtual void awake() = 0;
  // The collective with this tag is complete here: a message of it, or of one before it, that nobody claimed or that comes
  // later means that its sender called something else; it throws Mismatch.
  virtual void retire(const Tag& tag) = 0;
  // Ranks that pending tickets wait for, for error texts.
  virtual std::vector<int> waiting_for() const = 0;
  // Whether a peer that has said goodbye can no longer serve what waits for it, after a poll(). A goodbye overtakes bytes:
  // those in memory are all here then, but a socket is read to its end first.
  virtual bool exhausted(int peer) const = 0;
  // Forget all pending tickets: their memory is not touched any more. Every later call throws.
  virtual void abandon() = 0;
};

}  // namespace roundel::transport
