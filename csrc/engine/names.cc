#include "engine/names.h"

namespace roundel::engine {

// Numbered requests and their slots hold each other.
Names::~Names() {
  for (const auto& [encoded, request] : numbered_) request->slot->agreed = nullptr;
}

std::shared_ptr<Slot> Names::find(std::string_view key) const {
  const auto found = slots_.find(key);
  return found != slots_.end() ? found->second.lock() : nullptr;
}

std::shared_ptr<Slot> Names::slot_of(std::string_view key) {
  if (auto slot = find(key)) return slot;
  if (slots_.size() >= sweep_at_) {
    std::erase_if(slots_, [](const auto& entry) { return entry.second.expired(); });
    sweep_at_ = 64 + 2 * slots_.size();
  }
  const auto made = std::make_shared<Slot>(key);
  slots_[made->key] = made;
  return made;
}

SharedRequest Names::seal(Request request) {
  encode(request, encoded_);
  const auto known = numbered_.find(encoded_);
  if (known == numbered_.end()) return std::make_shared<Sealed>(std::move(request), encoded_, slot_of(key_of(encoded_)));
  known->second->slot->agreed = known->second;
  return known->second;
}

SharedRequest Names::seal(std::string_view encoded) {
  return std::make_shared<Sealed>(decode(encoded), std::string(encoded), slot_of(key_of(encoded)));
}

void Names::give_number(const SharedRequest& request, uint32_t number) {
  request->number = number;
  const auto [place, is_new] = numbered_.emplace(request->encoded, request);
  if (is_new) request->slot->agreed = request;
}

SharedRequest Names::last_agreed(Kind kind, uint32_t set, std::string_view name) {
  encode_key(kind, set, name, encoded_);
  const auto slot = find(encoded_);
  return slot != nullptr ? slot->agreed : nullptr;
}

}  // namespace roundel::engine
