// How long a wait of the start lasts: until its deadline, or until `look`, which it calls several times a second, throws.
#pragma once

#include <functional>
#include <utility>

#include "base/clock.h"
#include "base/interrupt.h"

namespace roundel::transport {

struct Patience {
  Patience(Deadline deadline, std::function<void()> look = {}) : deadline(deadline), look(std::move(look)) {}
  void check() const {
    check_interrupt();
    if (look) look();
  }

  Deadline deadline;
  std::function<void()> look;
};

}  // namespace roundel::transport
