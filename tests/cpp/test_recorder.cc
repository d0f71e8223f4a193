#include "base/recorder.h"

#include "base/text.h"
#include "check.h"

using namespace roundel;

TEST(a_name_is_cut_between_characters) {
  for (const char* start : {"", "x", "xx"}) {
    const std::string name = start + std::string("層の重み:層の重み:層の重み:層の重み:層の重み");
    recorder::begin(1, 1, {}, 0, name, recorder::State::Done);
    const std::string kept = recorder::entries().back().name;
    CHECK(kept.size() < recorder::kNameBytes && kept.size() > recorder::kNameBytes - 4);
    CHECK(name.starts_with(kept));
    CHECK((static_cast<unsigned char>(name[kept.size()]) & 0xc0) != 0x80);
  }
  CHECK_EQ(cut_text("äöü", 3), "ä");
  CHECK_EQ(cut_text("äöü", 6), "äöü");
  CHECK_EQ(cut_text("abc", 2), "ab");
}

TEST(recorder_keeps_the_last_entries_in_order) {
  Signature s;
  s.kind = OpKind::AllReduce;
  s.count = 7;
  uint64_t last = 0;
  for (uint64_t i = 1; i <= 1000; ++i) {
    last = recorder::begin(i, 1, s, 28, "a name that is far longer than the recorder keeps, as names of layers are",
                           recorder::State::Running);
    if (i < 1000) recorder::finished(last, recorder::State::Done);
  }
  recorder::waiting(last, {1, 3});
  const auto all = recorder::entries();
  CHECK_EQ(all.size(), recorder::kEntries);
  for (size_t i = 0; i < all.size(); ++i) {
    CHECK_EQ(all[i].sequence, 1000 - recorder::kEntries + 1 + i);
    CHECK(all[i].queued > 1.6e9 && all[i].started >= all[i].queued);
    CHECK(i == 0 || all[i].queued >= all[i - 1].queued);
  }
  CHECK_EQ(all.back().name.size(), recorder::kNameBytes - 1);
  CHECK_EQ(all.back().finished, 0.0);
  CHECK_EQ(all.back().waiting_for.size(), 2u);
  CHECK(recorder::doing().find("(operation 1000)") != std::string::npos);
  CHECK(recorder::doing().find("waiting for rank 1 and 3") != std::string::npos);
  recorder::finished(last, recorder::State::Failed);
  CHECK(recorder::entries().back().state == recorder::State::Failed);
  recorder::finished(last - recorder::kEntries, recorder::State::Failed);  // long overwritten: nothing happens
  CHECK(recorder::entries().front().state == recorder::State::Done);
}
