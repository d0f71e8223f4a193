// kernels/: every dtype, operator, number of inputs, finish, alias and alignment on every instruction set of this processor,
// against scalar arithmetic of this file's own: float64 rounded step by step, exact integers, slow conversions by definition.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "base/env.h"
#include "base/error.h"
#include "check.h"
#include "kernels/cuda.h"
#include "kernels/kernels.h"
#include "kernels/table.h"

using namespace roundel;
using namespace roundel::kernels;

namespace {

constexpr DType kAll[kDTypes] = {DType::Float32, DType::Float64, DType::Float16, DType::BFloat16, DType::Int8,
                                 DType::Int16,   DType::Int32,   DType::Int64,   DType::UInt8,    DType::Bool};
constexpr DType kFloating[] = {DType::Float32, DType::Float64, DType::Float16, DType::BFloat16};
constexpr ReduceOp kOps[] = {ReduceOp::Sum, ReduceOp::Min, ReduceOp::Max, ReduceOp::Product};
constexpr size_t kCounts[] = {0, 1, 7, 64, 1000, 4099};

// A binary format by its definition: `mantissa` stored bits, exponents from 1 - bias; for float16 and bfloat16.
struct Format {
  int mantissa, bias;
  int infinity() const { return (2 * bias + 1) << mantissa; }

  double value(uint16_t bits) const {
    const int exponent = (bits & 0x7fff) >> mantissa, fraction = bits & ((1 << mantissa) - 1);
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == 2 * bias + 1) return fraction ? std::nan("") : sign * std::numeric_limits<double>::infinity();
    if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - mantissa);
    return sign * std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
  }

  // To nearest even, from the exact value; counts in units of the last place, which run on from binade to binade.
  uint16_t nearest(double x) const {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return sign | infinity() | 1 << (mantissa - 1);
    if (std::isinf(x)) return sign | infinity();
    const int exponent = x == 0 ? 1 - bias : std::max(std::ilogb(x), 1 - bias);
    const double units = std::nearbyint(std::ldexp(std::fabs(x), mantissa - exponent));  // at most 2^(mantissa + 1)
    const double bits = units + std::ldexp(exponent + bias - 1, mantissa);
    return sign | static_cast<int>(std::min<double>(bits, infinity()));
  }
};

Format format_of(DType dtype) { return dtype == DType::Float16 ? Format{10, 15} : Format{7, 127}; }

template <class T>
T load(const void* data, size_t i) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + i * sizeof(T), sizeof(T));
  return value;
}

template <class T, class V>
void store(void* data, size_t i, V from) {
  const T value = static_cast<T>(from);
  std::memcpy(static_cast<char*>(data) + i * sizeof(T), &value, sizeof(T));
}

double get_floating(DType dtype, const void* data, size_t i) {
  if (dtype == DType::Float32) return load<float>(data, i);
  if (dtype == DType::Float64) return load<double>(data, i);
  return format_of(dtype).value(load<uint16_t>(data, i));
}

void set_floating(DType dtype, void* data, size_t i, double x) {
  if (dtype == DType::Float32) return store<float>(data, i, x);
  if (dtype == DType::Float64) return store<double>(data, i, x);
  store<uint16_t>(data, i, format_of(dtype).nearest(x));
}

int64_t get_integer(DType dtype, const void* data, size_t i) {
  switch (dtype) {
    case DType::Int8:
      return load<int8_t>(data, i);
    case DType::Int16:
      return load<int16_t>(data, i);
    case DType::Int32:
      return load<int32_t>(data, i);
    case DType::Int64:
      return load<int64_t>(data, i);
    default:
      return load<uint8_t>(data, i);
  }
}

void set_integer(DType dtype, void* data, size_t i, uint64_t x) {  // wraps around
  switch (size_of(dtype)) {
    case 1:
      return store<uint8_t>(data, i, x);
    case 2:
      return store<uint16_t>(data, i, x);
    case 4:
      return store<uint32_t>(data, i, x);
    default:
      return store<uint64_t>(data, i, x);
  }
}

// Elements at an address that is aligned to the element and to nothing more.
class Buffer {
 public:
  Buffer(DType dtype, size_t count) : dtype_(dtype), count_(count), bytes_(count * size_of(dtype) + 64 + 16, 0x5a) {}
  char* data() {
    auto address = reinterpret_cast<uintptr_t>(bytes_.data());
    return bytes_.data() + (64 - address % 64) % 64 + size_of(dtype_);
  }
  const char* data() const { return const_cast<Buffer*>(this)->data(); }
  size_t size() const { return count_ * size_of(dtype_); }

 private:
  DType dtype_;
  size_t count_;
  std::vector<char> bytes_;
};

uint64_t random_bits() {
  static std::mt19937_64 engine(20240607);
  return engine();
}

// Ordinary numbers with a zero, an infinity, a NaN or a denormal now and then; for integers the whole range.
Buffer random_buffer(DType dtype, size_t count) {
  Buffer buffer(dtype, count);
  const double special[] = {0.0, -0.0, std::numeric_limits<double>::infinity(), std::nan(""), 3e-8, -1e-40, 70000, -65519};
  for (size_t i = 0; i < count; ++i) {
    const uint64_t bits = random_bits();
    const double ordinary = std::ldexp(static_cast<double>(static_cast<int64_t>(bits)), -62) * 3;
    if (dtype == DType::Bool)
      set_integer(dtype, buffer.data(), i, bits % 3);
    else if (!is_floating(dtype))
      set_integer(dtype, buffer.data(), i, bits);
    else
      set_floating(dtype, buffer.data(), i, bits % 61 == 0 ? special[bits / 61 % 8] : ordinary);
  }
  return buffer;
}

// float32's steps in float64: exact, then rounded once, since 53 >= 2 * 24 + 2.
double step(ReduceOp op, bool single, double a, double b) {
  if (op == ReduceOp::Min || op == ReduceOp::Max) {
    if (std::isnan(a)) return a;
    if (std::isnan(b)) return b;
    return (op == ReduceOp::Min ? a < b : a > b) ? a : b;
  }
  const double exact = op == ReduceOp::Sum ? a + b : a * b;
  return single ? static_cast<float>(exact) : exact;
}

int64_t finished(DType dtype, int64_t x, Finish finish) {
  const int bits = static_cast<int>(8 * size_of(dtype));
  const __int128 low = dtype == DType::UInt8 ? 0 : -(static_cast<__int128>(1) << (bits - 1));
  const __int128 high = dtype == DType::UInt8 ? 255 : -low - 1;
  __int128 result = static_cast<__int128>(x) / finish.divisor;
  if (finish.scale != 1)
    result = static_cast<__int128>(static_cast<double>(x) / static_cast<double>(finish.divisor) * finish.scale);
  return static_cast<int64_t>(std::clamp(result, low, high));
}

void reference_element(ReduceOp op, DType dtype, void* out, const std::vector<const void*>& in, size_t i, Finish finish) {
  if (is_floating(dtype)) {
    const bool single = dtype != DType::Float64;
    double sum = get_floating(dtype, in[0], i);
    for (size_t k = 1; k < in.size(); ++k) sum = step(op, single, sum, get_floating(dtype, in[k], i));
    const double factor = single ? static_cast<float>(finish.scale) : finish.scale;
    return set_floating(dtype, out, i, step(ReduceOp::Product, single, sum, factor));
  }
  int64_t x = get_integer(dtype, in[0], i);
  for (size_t k = 1; k < in.size(); ++k) {
    const int64_t y = get_integer(dtype, in[k], i);
    const auto a = static_cast<uint64_t>(x), b = static_cast<uint64_t>(y);
    if (dtype == DType::Bool)
      x = op == ReduceOp::Sum || op == ReduceOp::Max ? (x || y) : (x && y);
    else if (op == ReduceOp::Sum || op == ReduceOp::Product)
      set_integer(dtype, &x, 0, op == ReduceOp::Sum ? a + b : a * b);
    else
      x = op == ReduceOp::Min ? std::min(x, y) : std::max(x, y);
    x = get_integer(dtype, &x, 0);
  }
  set_integer(dtype, out, i, static_cast<uint64_t>(dtype == DType::Bool ? x : finished(dtype, x, finish)));
}

// Equal bits, but any NaN equals any other: which one a sum hands on is not promised.
bool same(DType dtype, const Buffer& a, const Buffer& b, size_t count) {
  if (std::memcmp(a.data(), b.data(), a.size()) == 0) return true;
  if (!is_floating(dtype)) return false;
  for (size_t i = 0; i < count; ++i) {
    if (std::isnan(get_floating(dtype, a.data(), i)) && std::isnan(get_floating(dtype, b.data(), i))) continue;
    if (std::memcmp(a.data() + i * size_of(dtype), b.data() + i * size_of(dtype), size_of(dtype)) != 0) return false;
  }
  return true;
}

void check_same(const Table& table, ReduceOp op, DType dtype, size_t n, size_t count, Finish finish, int alias, bool equal) {
  const auto divisor = static_cast<long long>(finish.divisor);
  if (!equal)
    test::fail(__FILE__, __LINE__,
               format("%s: %s of %zu x %zu %s, scale %g, divisor %lld, out is input %d", table.isa, name_of(op), n, count,
                      name_of(dtype), finish.scale, divisor, alias));
}

void check_reduce(DType dtype, ReduceOp op, size_t n, size_t count, Finish finish) {
  std::vector<Buffer> buffers;
  for (size_t k = 0; k < n; ++k) buffers.push_back(random_buffer(dtype, count));
  std::vector<const void*> in;
  for (Buffer& buffer : buffers) in.push_back(buffer.data());
  Buffer expected(dtype, count);
  for (size_t i = 0; i < count; ++i) reference_element(op, dtype, expected.data(), in, i, finish);

  for (const Table* table : tables()) {
    Buffer out(dtype, count);
    table->reduce(op, dtype, out.data(), in.data(), n, count, finish);
    check_same(*table, op, dtype, n, count, finish, -1, same(dtype, expected, out, count));
    for (size_t alias = 0; alias < n; ++alias) {
      Buffer copy = buffers[alias];
      std::memcpy(copy.data(), buffers[alias].data(), copy.size());  // a copied vector may lie at another alignment
      std::vector<const void*> aliased = in;
      aliased[alias] = copy.data();
      table->reduce(op, dtype, copy.data(), aliased.data(), n, count, finish);
      check_same(*table, op, dtype, n, count, finish, static_cast<int>(alias), same(dtype, expected, copy, count));
    }
  }
}

}  // namespace

TEST(kernels_reduce_matches_scalar_reference) {
  for (DType dtype : kAll)
    for (ReduceOp op : kOps)
      for (size_t n : {1, 2, 3, 4, 5, 6, 7, 8})
        for (size_t count : kCounts) check_reduce(dtype, op, n, count, {});
}

TEST(kernels_finish_matches_scalar_reference) {
  for (DType dtype : kAll)
    for (ReduceOp op : kOps)
      for (size_t n : {1, 2, 3, 8})
        for (Finish finish : {Finish{1.0 / static_cast<double>(n), 2}, Finish{1, 3}, Finish{1, -1}, Finish{-0.37, 7}})
          for (size_t count : {7, 1000}) check_reduce(dtype, op, n, count, finish);
}

TEST(kernels_integer_division_truncates) {
  for (const Table* table : tables())
    for (DType dtype : {DType::Int8, DType::Int16, DType::Int32, DType::Int64}) {
      std::vector<int64_t> ones(49, 0);
      for (int64_t& one : ones) set_integer(dtype, &one, 0, 1);
      std::vector<const void*> in;
      for (int64_t& one : ones) in.push_back(&one);
      int64_t out = 0, minus_seven = 0;
      table->reduce(ReduceOp::Sum, dtype, &out, in.data(), 49, 1, Finish{1, 49});
      CHECK_EQ(get_integer(dtype, &out, 0), 1);
      set_integer(dtype, &minus_seven, 0, static_cast<uint64_t>(-7));
      const void* one_input = &minus_seven;
      table->reduce(ReduceOp::Sum, dtype, &out, &one_input, 1, 1, Finish{1, 2});
      CHECK_EQ(get_integer(dtype, &out, 0), -3);
    }
}

// With a rounding at every hop 2048 + 1 + 1 stays 2048 in float16, and 256 + 1 + 1 stays 256 in bfloat16.
TEST(kernels_half_sums_round_once) {
  for (const Table* table : tables())
    for (DType dtype : {DType::Float16, DType::BFloat16}) {
      const double large = dtype == DType::Float16 ? 2048 : 256;
      uint16_t big[33], one[33], out[33];
      for (size_t i = 0; i < 33; ++i) set_floating(dtype, big, i, large), set_floating(dtype, one, i, 1);
      const void* in[] = {big, one, one};
      table->reduce(ReduceOp::Sum, dtype, out, in, 3, 33, {});
      for (size_t i = 0; i < 33; ++i) CHECK_EQ(get_floating(dtype, out, i), large + 2);
    }
}

// Any bits at all, signalling NaNs among them, but at most one NaN per element, as two leave the choice to the processor.
TEST(kernels_same_bits_on_every_isa) {
  constexpr size_t count = 4099, n = 5;
  for (DType dtype : kFloating) {
    std::vector<Buffer> buffers(n, Buffer(dtype, count));
    std::vector<const void*> in;
    for (Buffer& buffer : buffers) {
      for (size_t i = 0; i < buffer.size(); ++i) buffer.data()[i] = static_cast<char>(random_bits());
      for (size_t i = 0; i < count && &buffer != &buffers[0]; ++i)
        if (std::isnan(get_floating(dtype, buffer.data(), i))) set_floating(dtype, buffer.data(), i, 1.5);
      in.push_back(buffer.data());
    }
    for (ReduceOp op : kOps)
      for (Finish finish : {Finish{}, Finish{0.3, 1}})
        for (size_t inputs : {1, 2, 4, 5}) {
          Buffer expected(dtype, count), out(dtype, count);
          table_for("portable")->reduce(op, dtype, expected.data(), in.data(), inputs, count, finish);
          for (const Table* table : tables()) {
            table->reduce(op, dtype, out.data(), in.data(), inputs, count, finish);
            const bool equal = std::memcmp(out.data(), expected.data(), out.size()) == 0;
            check_same(*table, op, dtype, inputs, count, finish, -1, equal);
          }
        }
  }
}

TEST(kernels_every_half_pattern_casts_both_ways) {
  std::vector<uint16_t> halves(65536), back(65536);
  std::vector<float> floats(65536);
  std::vector<double> doubles(65536);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  for (const Table* table : tables())
    for (DType dtype : {DType::Float16, DType::BFloat16}) {
      const Format format = format_of(dtype);
      table->cast(DType::Float32, floats.data(), dtype, halves.data(), halves.size());
      table->cast(DType::Float64, doubles.data(), dtype, halves.data(), halves.size());
      table->cast(dtype, back.data(), DType::Float32, floats.data(), halves.size());
      size_t wrong = 0;
      for (size_t i = 0; i < halves.size(); ++i) {
        const double value = format.value(halves[i]);
        if (std::isnan(value)) {
          const int quiet = halves[i] | 1 << (format.mantissa - 1);  // the payload is kept
          wrong += !std::isnan(floats[i]) || !std::isnan(doubles[i]) || back[i] != quiet;
        } else {
          wrong += floats[i] != value || doubles[i] != value || back[i] != halves[i];
        }
      }
      CHECK_EQ(wrong, 0u);
    }
}

TEST(kernels_casts_round_to_nearest_even) {
  constexpr size_t count = 1000003;
  std::vector<float> floats(count);
  std::vector<double> doubles(count);
  std::vector<uint16_t> from_float(count), from_double(count);
  for (DType dtype : {DType::Float16, DType::BFloat16}) {
    const Format format = format_of(dtype);
    for (size_t i = 0; i < count; ++i) {
      const uint64_t bits = random_bits();
      const double low = format.value(static_cast<uint16_t>(bits % format.infinity()));
      const double high = format.value(static_cast<uint16_t>(bits % format.infinity() + 1));
      const double tie = std::isinf(high) ? low : (low + high) / 2;  // exact in float32
      floats[i] = i % 4 == 0 ? static_cast<float>(tie) : std::bit_cast<float>(static_cast<uint32_t>(bits >> 32));
      doubles[i] = tie * (1 + static_cast<double>(static_cast<int>(i % 3) - 1) * 0x1p-50);  // a hair beside, or on, the tie
    }
    for (const Table* table : tables()) {
      table->cast(dtype, from_float.data(), DType::Float32, floats.data(), count);
      table->cast(dtype, from_double.data(), DType::Float64, doubles.data(), count);
      size_t wrong = 0;
      for (size_t i = 0; i < count; ++i) {
        const uint32_t bits = std::bit_cast<uint32_t>(floats[i]);
        const int payload = (dtype == DType::Float16 ? bits >> 13 & 0x3ff : bits >> 16 & 0x7f);
        const int expected = format.nearest(floats[i]) | (std::isnan(floats[i]) ? payload : 0);
        wrong += from_float[i] != expected || from_double[i] != format.nearest(doubles[i]);
      }
      CHECK_EQ(wrong, 0u);
    }
  }
}

TEST(kernels_casts_between_all_floating_types) {
  for (DType from : kFloating)
    for (DType to : kFloating)
      for (size_t count : {0, 1, 7, 1000, 2049}) {
        const Buffer in = random_buffer(from, count);
        Buffer expected(to, count);
        for (size_t i = 0; i < count; ++i) set_floating(to, expected.data(), i, get_floating(from, in.data(), i));
        for (const Table* table : tables()) {
          Buffer out(to, count);
          table->cast(to, out.data(), from, in.data(), count);
          CHECK(same(to, expected, out, count));
          Buffer in_place = in;
          std::memcpy(in_place.data(), in.data(), in.size());
          if (size_of(to) != size_of(from)) continue;
          table->cast(to, in_place.data(), from, in_place.data(), count);
          CHECK(same(to, expected, in_place, count));
        }
      }
}

TEST(kernels_public_functions) {
  const float a[3] = {1, 2, 3}, b[3] = {4, 5, 6};
  float out[3];
  const void* const in[] = {a, b};
  reduce(ReduceOp::Sum, DType::Float32, out, in, 3, Finish{0.5, 2});  // floating types do not look at the divisor
  CHECK_EQ(out[2], 4.5f);
  scale(DType::Float32, out, a, 3, 2);
  CHECK_EQ(out[2], 6.0f);
  const int8_t bytes[2] = {100, -100};
  int8_t saturated[2];
  scale(DType::Int8, saturated, bytes, 2, 1.5);
  CHECK_EQ(int{saturated[0]}, 127);
  CHECK_EQ(int{saturated[1]}, -128);
  double wide[3];
  cast(DType::Float64, wide, DType::Float32, a, 3);
  CHECK_EQ(wide[2], 3.0);
  CHECK_THROWS(reduce(ReduceOp::Average, DType::Float32, out, in, 3), InvalidArgument);
  CHECK_THROWS(reduce(ReduceOp::Sum, DType::Int32, out, in, 3, Finish{1, 0}), InvalidArgument);
  CHECK_THROWS(reduce(ReduceOp::Sum, DType::Float32, out, {}, 3), InvalidArgument);
  CHECK_THROWS(cast(DType::Int8, out, DType::Float32, a, 3), InvalidArgument);
}

TEST(kernels_isa_is_chosen_or_refused) {
  const std::string wanted = env::text("ROUNDEL_ISA");
  CHECK_EQ(std::string(isa()), wanted.empty() ? std::string(tables().front()->isa) : wanted);
  CHECK(&choose("") == tables().front());
  CHECK(&choose("portable") == table_for("portable"));
  CHECK(table_for("sse9") == nullptr);
  std::string refusal;
  try {
    choose("sse9");
  } catch (const InvalidArgument& error) {
    refusal = error.what();
  }
  CHECK(refusal.find("portable") != std::string::npos);
}

TEST(kernels_cuda_status_never_throws) {
  const std::string status = cuda_status();
  CHECK(status.find(cuda_compiled() ? "compiled for sm_" : "built without CUDA: ") == 0);
  char byte[8] = {};
  if (!cuda_compiled()) CHECK_THROWS(cuda_scale_cast(DType::Float16, byte, DType::Float32, byte, 1, 1, nullptr), Error);
}
