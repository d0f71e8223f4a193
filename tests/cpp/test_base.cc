// base/: checksums and hashes against published values, settings, signatures, deadlines.
#include <cstdlib>
#include <cstring>
#include <random>

#include "base/clock.h"
#include "base/copy.h"
#include "base/crc32c.h"
#include "base/env.h"
#include "base/error.h"
#include "base/fd.h"
#include "base/sha256.h"
#include "base/signature.h"
#include "check.h"

using namespace roundel;

namespace {

std::span<const uint8_t> bytes(const std::string& text) { return {reinterpret_cast<const uint8_t*>(text.data()), text.size()}; }

std::string hex(const Digest& digest) {
  std::string text;
  for (const uint8_t byte : digest) text += format("%02x", byte);
  return text;
}

}  // namespace

TEST(crc32c_has_the_published_values) {
  CHECK_EQ(crc32c("123456789", 9), 0xe3069283u);  // RFC 3720, B.4
  const std::string zeros(32, '\0');
  CHECK_EQ(crc32c(zeros.data(), zeros.size()), 0x8a9136aau);
  CHECK_EQ(crc32c("", 0), 0u);
}

TEST(crc32c_is_the_same_on_both_paths_and_in_parts) {
  std::mt19937 random(1);
  std::vector<unsigned char> data(100'000);
  for (auto& byte : data) byte = static_cast<unsigned char>(random());
  for (const size_t n : {size_t{1}, size_t{7}, size_t{6143}, size_t{6144}, size_t{6145}, size_t{50'001}, data.size()}) {
    CHECK_EQ(crc32c(data.data(), n), crc32c_portable(data.data(), n));
    const size_t half = n / 3;
    CHECK_EQ(crc32c(data.data() + half, n - half, crc32c(data.data(), half)), crc32c(data.data(), n));
  }
}

TEST(crc32c_sees_a_flipped_bit_anywhere) {
  std::vector<unsigned char> data(20'000, 0x5a);
  const uint32_t good = crc32c(data.data(), data.size());
  for (size_t at = 0; at < data.size(); at += 997) {
    data[at] ^= 0x10;
    CHECK(crc32c(data.data(), data.size()) != good);
    data[at] ^= 0x10;
  }
}

TEST(sha256_has_the_published_values) {
  CHECK_EQ(hex(sha256(bytes("abc"))), std::string("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"));
  CHECK_EQ(hex(sha256(bytes(""))), std::string("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"));
  CHECK_EQ(hex(sha256(bytes(std::string(1'000'000, 'a')))),
           std::string("cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"));
}

TEST(hmac_has_the_values_of_rfc_4231) {
  CHECK_EQ(hex(hmac_sha256(bytes("Jefe"), bytes("what do ya want for nothing?"))),
           std::string("5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"));
  const std::string long_key(131, '\xaa');
  CHECK_EQ(hex(hmac_sha256(bytes(long_key), bytes("Test Using Larger Than Block-Size Key - Hash Key First"))),
           std::string("60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"));
}

TEST(copies_are_whole_at_every_length_and_place) {
  std::vector<unsigned char> from(10'000), to(10'000);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<unsigned char>(i * 31 + i / 256);
  for (const size_t bytes : {0, 1, 63, 64, 2047, 2048, 2049, 4096, 9000})
    for (const size_t source : {0, 1, 17, 64})
      for (const size_t target : {0, 1, 63, 100}) {
        std::fill(to.begin(), to.end(), 0xee);
        copy_bytes(to.data() + target, from.data() + source, bytes);
        CHECK(std::memcmp(to.data() + target, from.data() + source, bytes) == 0);
        CHECK(to[target + bytes] == 0xee && (target == 0 || to[target - 1] == 0xee));
      }
  copy_bytes(from.data(), from.data(), from.size());
  CHECK_EQ(from[9'999], static_cast<unsigned char>(9'999 * 31 + 9'999 / 256));
}

TEST(settings_are_parsed_or_refused_with_their_name) {
  ::setenv("ROUNDEL_BUCKET_BYTES", "3M", 1);
  CHECK_EQ(env::bytes("ROUNDEL_BUCKET_BYTES"), uint64_t{3} << 20);
  ::setenv("ROUNDEL_BUCKET_BYTES", "3X", 1);
  CHECK_THROWS(env::bytes("ROUNDEL_BUCKET_BYTES"), InvalidArgument);
  ::unsetenv("ROUNDEL_BUCKET_BYTES");
  ::setenv("ROUNDEL_TIMEOUT", "soon", 1);
  CHECK_THROWS(env::number("ROUNDEL_TIMEOUT", 0, 1e9), InvalidArgument);
  ::setenv("ROUNDEL_TIMEOUT", "-1", 1);
  CHECK_THROWS(env::number("ROUNDEL_TIMEOUT", 0, 1e9), InvalidArgument);
  ::unsetenv("ROUNDEL_TIMEOUT");
  CHECK_EQ(env::number("ROUNDEL_TIMEOUT", 0, 1e9), 600.0);
}

// `variable` holds `value` as long as this lives.
struct Variable {
  Variable(const char* variable, const char* value) : name(variable) { ::setenv(name, value, 1); }
  ~Variable() { ::unsetenv(name); }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;
  const char* name;
};

TEST(settings_under_horovods_names_are_read_in_our_units) {
  const struct {
    const char *alias, *value, *name, *expected;
  } rows[] = {
      {"HOROVOD_FUSION_THRESHOLD", "67108864", "ROUNDEL_FUSION_THRESHOLD", "67108864"},
      {"HOROVOD_GLOO_TIMEOUT_SECONDS", "45", "ROUNDEL_TIMEOUT", "45"},
      {"HOROVOD_START_TIMEOUT", "20", "ROUNDEL_START_TIMEOUT", "20"},
      {"HOROVOD_GLOO_IFACE", "eth1", "ROUNDEL_INTERFACE", "eth1"},
      {"HOROVOD_STALL_CHECK_DISABLE", "1", "ROUNDEL_STALL_CHECK_SECONDS", "0"},
      {"HOROVOD_STALL_CHECK_DISABLE", "0", "ROUNDEL_STALL_CHECK_SECONDS", "60"},
      {"HOROVOD_STALL_CHECK_TIME_SECONDS", "15", "ROUNDEL_STALL_CHECK_SECONDS", "15"},
      {"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "90", "ROUNDEL_STALL_SHUTDOWN_SECONDS", "90"},
      {"HOROVOD_TIMELINE", "/tmp/run.json", "ROUNDEL_TIMELINE", "/tmp/run"},
      {"HOROVOD_TIMELINE", "/tmp/run", "ROUNDEL_TIMELINE", "/tmp/run"},
      {"HOROVOD_TIMELINE", "DYNAMIC", "ROUNDEL_TIMELINE", ""},
      {"HOROVOD_TIMELINE_MARK_CYCLES", "1", "ROUNDEL_TIMELINE_MARK_CYCLES", "1"},
      {"HOROVOD_LOG_LEVEL", "TRACE", "ROUNDEL_LOG_LEVEL", "debug"},
      {"HOROVOD_LOG_LEVEL", "Fatal", "ROUNDEL_LOG_LEVEL", "error"},
      {"HOROVOD_LOG_LEVEL", "INFO", "ROUNDEL_LOG_LEVEL", "info"},
  };
  for (const auto& row : rows) {
    const Variable theirs(row.alias, row.value);
    CHECK_EQ(env::text(row.name), std::string(row.expected));
  }
}

TEST(our_name_goes_before_horovods_and_only_what_came_from_theirs_is_told) {
  const Variable theirs("HOROVOD_START_TIMEOUT", "20"), more("HOROVOD_STALL_CHECK_TIME_SECONDS", "15");
  CHECK_EQ(env::borrowed().size(), size_t{2});
  CHECK_EQ(env::borrowed()[0], std::string("HOROVOD_START_TIMEOUT as ROUNDEL_START_TIMEOUT=20"));
  {
    const Variable ours("ROUNDEL_START_TIMEOUT", "7"), off("HOROVOD_STALL_CHECK_DISABLE", "1");
    CHECK_EQ(env::number("ROUNDEL_START_TIMEOUT", 0, 1e9), 7.0);
    CHECK_EQ(env::number("ROUNDEL_STALL_CHECK_SECONDS", 0, 1e9), 0.0);
    CHECK_EQ(env::borrowed().size(), size_t{1});
  }
  const Variable wrong("HOROVOD_START_TIMEOUT", "soon");
  try {
    env::number("ROUNDEL_START_TIMEOUT", 0, 1e9);
    CHECK(false);
  } catch (const InvalidArgument& error) {
    CHECK(std::string(error.what()).starts_with("HOROVOD_START_TIMEOUT: "));
  }
}

TEST(signatures_say_what_was_called) {
  Signature s;
  s.kind = OpKind::AllReduce;
  s.dtype = DType::BFloat16;
  s.op = ReduceOp::Max;
  s.count = 12;
  CHECK(s.describe().find("all-reduce of 12 bfloat16, max") == 0);
  std::memset(static_cast<void*>(&s), 0xff, sizeof s);  // garbage from a peer must not crash the text
  CHECK(s.describe().find("unknown") != std::string::npos);
}

TEST(ranks_are_joined_as_a_sentence) {
  CHECK_EQ(join_ranks({}), std::string());
  CHECK_EQ(join_ranks({3}), std::string("3"));
  CHECK_EQ(join_ranks({1, 4, 7}), std::string("1, 4 and 7"));
}

TEST(deadlines_pass) {
  CHECK(Deadline::after(-1).passed());
  CHECK(!Deadline::after(60).passed());
  CHECK_EQ(Deadline::after(60).milliseconds_left(100), 100);
  CHECK(!Deadline::after(1e300).passed());
}
