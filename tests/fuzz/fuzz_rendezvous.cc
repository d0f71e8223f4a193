// What a member may say at the rendezvous: cards, the table of cards, the verdict; and the text settings that start a rank.
#include <cstring>

#include "base/error.h"
#include "transport/card.h"

using namespace roundel;
using namespace roundel::transport;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  Card own;
  Verdict verdict;
  std::memcpy(&verdict, data, std::min(size, sizeof verdict));
  try {
    verdict.raise_unless_accepted({1, 8, 1});
  } catch (const Error&) {
  }
  std::vector<Card> cards(std::max<size_t>(1, std::min<size_t>(size / sizeof(Card), 8)));
  std::memcpy(static_cast<void*>(cards.data()), data, std::min(size, cards.size() * sizeof(Card)));
  const std::string why = refusal(cards[0], own);
  try {
    for (const Peer& peer : read_cards(cards))
      if (peer.host < 0 || peer.host >= static_cast<int>(cards.size())) __builtin_trap();
  } catch (const Error&) {
    if (cards.size() == 1 && why.empty()) __builtin_trap();  // rank 0 would have accepted what nobody can use
  }
  return 0;
}
