// The table of names: from a request as a caller or a message has it to its final form and its slot.
//
// Threads: none at a time but one; the engine's mutex sees to it.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>

#include "engine/slot.h"

namespace roundel::engine {

class Names {
 public:
  Names() = default;
  ~Names();

  // The numbered request where one is equal, else a new one.
  SharedRequest seal(Request request);
  SharedRequest seal(std::string_view encoded);  // throws CorruptFrame where that is no encoded request
  // Numbered requests stay as long as the table.
  void give_number(const SharedRequest& request, uint32_t number);

  // The numbered request of this name that was asked for last, or null.
  SharedRequest last_agreed(Kind kind, uint32_t set, std::string_view name);
  // Null where no request has this key.
  std::shared_ptr<Slot> find(std::string_view key) const;
  size_t size() const { return slots_.size(); }  // those included that are to be forgotten

 private:
  struct Hash : std::hash<std::string_view> {
    using is_transparent = void;
  };
  std::shared_ptr<Slot> slot_of(std::string_view key);

  std::unordered_map<std::string, std::weak_ptr<Slot>, Hash, std::equal_to<>> slots_;  // by key
  size_t sweep_at_ = 64;  // slots, after which those of names that nobody uses any more are let go of
  std::unordered_map<std::string_view, SharedRequest> numbered_;  // by what is encoded, which they hold
  std::string encoded_;                                           // memory that is used again
};

}  // namespace roundel::engine
