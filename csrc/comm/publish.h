// How data get to peers: copied into shared memory through the caches, copied past them, or not copied but read by the peers
// where they are; whichever is fastest between the cores that this job has.
//
// A store to a line that a peer's cache holds has to fetch it from there first. Between threads of one core that costs nothing,
// between cores of one L3 about 7 ns a line, between sockets or L3s 30 ns: there, going through memory is up to ten times
// faster in all. Under a hypervisor the distance changes from one second to the next. So every now and then everyone times
// stores to lines that its neighbours have just read. Reading another process (process_vm_readv) costs system calls and work
// for every page, but saves a copy: of operations that could do so, the way that is not taken is tried from time to time, for
// every kind and size, by all ranks at once. docs/adr/0005, 0007.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/copy.h"
#include "base/signature.h"

namespace roundel::comm {

// Lines of one rank, which it writes and its neighbours read. All zero is a valid start.
struct Probe {
  struct alignas(64) Line {
    std::atomic<uint64_t> word;
  };
  Line lines[64];
};

class Publisher {
 public:
  static constexpr size_t kLeast = 2048;  // bytes; smaller operations fit few lines

  // `theirs`: of the ranks whose stores may have to wait for this one's cache.
  Publisher(Probe& own, std::vector<const Probe*> theirs) : own_(own), theirs_(std::move(theirs)) {
    for (Probe::Line& line : own_.lines) line.word = 0;  // memory that is touched for the first time is slow
  }

  // For every operation. `bytes`: the same on all ranks. `readable`: whether peers could read directly.
  void choose(OpKind kind, size_t bytes, bool readable = false) {
    costs_now_ = nullptr;
    direct_ = trial_ = read_ = false;
    if (bytes < kLeast) return;
    read_neighbours(bytes);
    if (!readable) return;
    costs_now_ = &costs_[static_cast<int>(kind)][std::min<int>(std::bit_width(bytes / kLeast), kSizes) - 1];
    const unsigned turn = costs_now_->uses++ % kTrialPeriod;
    const bool tries = turn >= kTrial && turn < kTrial + kTrialLength;
    direct_ = costs_now_->prefers_direct != tries;
    trial_ = (turn >= kTrial - kSampled && turn < kTrial) || (tries && turn >= kTrial + kTrialLength - kSampled);
    bytes_ = bytes;
    spent_ = {};
    begin_ = Clock::now();
  }

  bool direct() const { return direct_; }

  // Then the operation must not end here before its readers have read.
  bool timing() const { return trial_; }

  // The way that all go. Called where the choice could have been otherwise, before the data move.
  void go(bool direct) {
    if (direct != direct_) trial_ = false;
    direct_ = direct;
  }
  // What moves is none of what could be chosen.
  void go_without() { trial_ = false; }

  // Around the wait for the others to come. Late ones say nothing about copying; those who came have read this rank's lines.
  void begin_wait() {
    if (trial_) spent_ += Clock::now() - begin_;
  }
  bool measures() const { return read_; }
  void end_wait() {
    if (std::exchange(read_, false)) {
      const auto begin = Clock::now();
      for (Probe::Line& line : own_.lines) line.word.store(uses_, std::memory_order_relaxed);
      std::atomic_thread_fence(std::memory_order_seq_cst);  // until all are done
      const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
      const double least = stores_ == 0 ? seconds : std::min(stores_, seconds);  // something may have come between
      stores_ = seconds;
      far_ = least > kFar * static_cast<double>(std::size(own_.lines));
    }
    if (trial_) begin_ = Clock::now();
  }

  // Everyone has what it needs.
  void end() {
    if (!trial_) return;
    spent_ += Clock::now() - begin_;
    trial_ = false;
    costs_now_->add(direct_, std::chrono::duration<double>(spent_).count() / static_cast<double>(bytes_));
  }

  bool streams() const { return far_; }

  void copy(void* to, const void* from, size_t bytes) const {
    if (far_)
      copy_bytes_streaming(to, from, bytes);
    else
      copy_bytes(to, from, bytes);
  }

 private:
  static constexpr unsigned kPeriod = 64;     // operations between measurements of the distance
  static constexpr size_t kBytes = 4u << 20;  // or so many bytes between these
  // A trial of the way that is not taken is some operations long, since the first ones find the caches filled by the other way;
  // its last operations, and the last ones before it, are compared.
  static constexpr unsigned kTrialPeriod = 128, kTrial = 12, kTrialLength = 4, kSampled = 2;
  static constexpr int kSizes = 14;     // by powers of two from kLeast; from 16 MB on all are alike
  static constexpr double kFar = 8e-9;  // seconds for a line: 4 between cores of one L3, 16 between L3s

  // What disturbs makes samples long, never short: so the least counts.
  struct Least {
    double seconds = 0;  // for a byte
    void add(double sample) { seconds = seconds == 0 ? sample : std::min(seconds, sample); }
  };

  struct Costs {
    Least cells, direct;
    unsigned uses = 0;
    bool prefers_direct = false;
    void add(bool directly, double sample) {
      (directly ? direct : cells).add(sample);
      if (uses % kTrialPeriod != kTrial + kTrialLength) return;
      if (cells.seconds > 0 && direct.seconds > 0)
        prefers_direct = direct.seconds < (prefers_direct ? 1.05 : 0.95) * cells.seconds;
      cells = direct = {};
    }
  };

  void read_neighbours(size_t bytes) {
    moved_ += bytes;
    read_ = moved_ >= kBytes || uses_ % kPeriod == 0;
    ++uses_;
    if (!read_) return;
    for (const Probe* probe : theirs_)
      for (const Probe::Line& line : probe->lines) line.word.load(std::memory_order_relaxed);
    moved_ = 0;
  }

  Probe& own_;
  std::vector<const Probe*> theirs_;
  size_t uses_ = 0, moved_ = kBytes;
  bool read_ = false;
  double stores_ = 0;  // seconds that the last measurement took
  bool far_ = false;

  Costs costs_[kOpKinds][kSizes];
  Costs* costs_now_ = nullptr;
  bool direct_ = false, trial_ = false;
  size_t bytes_ = 0;
  Clock::time_point begin_{};
  Clock::duration spent_{};
};

}  // namespace roundel::comm
