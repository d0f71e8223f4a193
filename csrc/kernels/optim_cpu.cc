// The optimizers' loop over one piece of a tensor, and the norms. Compiled once per instruction set; see isa.h.
#include "kernels/map.h"
#include "kernels/random_rounding.h"
#include "kernels/rules.h"
#include "kernels/stream.h"
#include "kernels/table.h"

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

// cast_cpu.cc, dots_cpu.cc
void cast(DType to, void* out, DType from, const void* in, size_t count);
void dots(DType dtype, double* sums, const void* a, const void* b, size_t count);

namespace {

template <class T>
constexpr size_t kElements = sizeof(T) / sizeof(typename Math<T>::Scalar);

constexpr size_t element_size(DType dtype) { return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2; }

struct Iota {
  uint32_t index[kWidth];
};

constexpr Iota iota() {
  Iota result{};
  for (size_t lane = 0; lane < kWidth; ++lane) result.index[lane] = static_cast<uint32_t>(lane);
  return result;
}

constexpr Iota kIota = iota();

HOST_DEVICE Words indices(uint64_t first) { return __builtin_bit_cast(Words, kIota) + static_cast<uint32_t>(first); }

// The last elements of a piece, fewer than a register has, with zeros behind them.
struct Ending {
  Ending(const Piece& from, size_t i) : piece(from), count(from.count - i) {
    piece.first += i;
    piece.count = kWidth;
    for (int id = 0; id < kStreams; ++id) {
      Stream& stream = piece.streams[id];
      if (stream.data == nullptr) continue;
      const size_t size = element_size(stream.dtype);
      __builtin_memset(memory[id], 0, sizeof(memory[id]));
      __builtin_memcpy(memory[id], static_cast<char*>(stream.data) + i * size, count * size);
      stream.data = memory[id];
    }
  }
  void put_back(const Piece& to, size_t i) const {
    for (int id = 0; id < kStreams; ++id) {
      const Stream& stream = to.streams[id];
      if (stream.data == nullptr || id == kGradient) continue;
      const size_t size = element_size(stream.dtype);
      __builtin_memcpy(static_cast<char*>(stream.data) + i * size, memory[id], count * size);
    }
  }
  Piece piece;
  size_t count;
  alignas(64) char memory[kStreams][kWidth * sizeof(double)];
};

// What is known when compiled: that weight and moments are all of one type and rounded to nearest, with no copy and no average.
// It is worth half of the time within a cache.
enum class Known { Nothing, Float32, BFloat16 };

template <class Rule, class T, Known known>
struct Loop {
  using S = typename Math<T>::Scalar;
  using Scalars = typename Rule::template Scalars<S>;

  HOST_DEVICE static T load_own(const Stream& stream, size_t i) {
    if constexpr (known == Known::Float32)
      return load_float(stream, i);
    else if constexpr (known == Known::BFloat16)
      return load_bfloat16(stream, i);
    else
      return load<T>(stream, i);
  }

  // What is stored may be rounded by chance, what the rule has in its registers is not.
  HOST_DEVICE static void keep(const Stream& stream, uint32_t id, size_t i, T x, RuleOptions options,
                               typename Math<T>::Bits random) {
    if constexpr (known == Known::Float32) {
      store_float(stream, i, x);
    } else if constexpr (known == Known::BFloat16) {
      store_bfloat16(stream, i, x);
    } else {
      if constexpr (sizeof(S) == 4)
        if (options.stochastic && (stream.dtype == DType::Float16 || stream.dtype == DType::BFloat16))
          x = rounded_by_chance(x, stream.dtype, random_bits_of(random, id));
      store(stream, i, x);
    }
  }

  HOST_DEVICE static void load_all(const Piece& piece, size_t i, S factor, T& p, T& g, T* s) {
    p = load_own(piece.streams[kWeight], i);
    g = load<T>(piece.streams[kGradient], i) * factor;
    for (int k = 0; k < Rule::kStates; ++k)
      s[k] = piece.streams[kState + k].data != nullptr ? load_own(piece.streams[kState + k], i) : Math<T>::splat(0);
  }

  HOST_DEVICE static void update_at(const Piece& piece, size_t i, const Scalars& scalars, S factor, RuleOptions options) {
    T p, g, s[kMaxStates];
    load_all(piece, i, factor, p, g, s);
    Rule::update(p, g, s, scalars, options);
    const Stream* streams = piece.streams;
    typename Math<T>::Bits random{};
    if constexpr (known == Known::Nothing && sizeof(S) == 4)
      if (options.stochastic) random = random_bits(piece.random, indices(piece.first + i));
    keep(streams[kWeight], kWeight, i, p, options, random);
    for (int k = 0; k < Rule::kStates; ++k)
      if (streams[kState + k].data != nullptr)
        keep(streams[kState + k], static_cast<uint32_t>(kState + k), i, s[k], options, random);
    if (streams[kOutput].data != nullptr) store(streams[kOutput], i, p);
    if constexpr (known != Known::Nothing) return;
    if (streams[kCopy].data != nullptr) store(streams[kCopy], i, p);
    if (streams[kAverage].data != nullptr) {
      const T average = lerp(load<T>(streams[kAverage], i), p, static_cast<S>(piece.average_weight));
      keep(streams[kAverage], kAverage, i, average, options, random);
    }
  }

  // All but what is less than a register. Not inlined, so that the code is there once.
  [[gnu::noinline]] static size_t update_registers(const Piece& piece, RuleOptions options) {
    const Scalars scalars = scalars_from<Scalars, S>(piece.scalars);
    const S factor = static_cast<S>(piece.factor);
    const Piece local = piece;  // nothing that is stored can change it
    size_t i = 0;
    for (; i + kElements<T> <= local.count; i += kElements<T>) update_at(local, i, scalars, factor, options);
    return i;
  }

  static void update(const Piece& piece, RuleOptions options) {
    const size_t i = update_registers(piece, options);
    if constexpr (kElements<T> > 1) {
      if (i == piece.count) return;
      Ending ending(piece, i);
      update_registers(ending.piece, options);
      ending.put_back(piece, i);
    }
  }

  // The sums of squares of the weight and of what the rule measures.
  static void measure(const Piece& piece, double* sums) {
    const Scalars scalars = scalars_from<Scalars, S>(piece.scalars);
    const S factor = static_cast<S>(piece.factor);
    alignas(64) S weights[kBlock], measured[kBlock];
    sums[0] = sums[1] = 0;
    for (size_t at = 0; at < piece.count; at += kBlock) {
      const size_t length = piece.count - at < kBlock ? piece.count - at : kBlock;
      size_t i = 0;
      for (; i + kElements<T> <= length; i += kElements<T>)
        measure_at(piece, at + i, scalars, factor, weights + i, measured + i);
      if (i < length) {
        const Ending ending(piece, at + i);
        measure_at(ending.piece, 0, scalars, factor, weights + i, measured + i);  // kBlock is a multiple of kElements
      }
      double three[3];
      dots(sizeof(S) == 4 ? DType::Float32 : DType::Float64, three, weights, measured, length);
      sums[0] += three[0];
      sums[1] += three[2];
    }
  }

  HOST_DEVICE static void measure_at(const Piece& piece, size_t i, const Scalars& scalars, S factor, S* weights, S* measured) {
    T p, g, s[kMaxStates];
    load_all(piece, i, factor, p, g, s);
    const T value = Rule::measured(p, g, s, scalars);
    __builtin_memcpy(weights, &p, sizeof(T));
    __builtin_memcpy(measured, &value, sizeof(T));
  }
};

// Sums of squares in float64. For the same bits on every path, and enough sums at a time for the processor, element i is added
// to lane i % 32. The square of a float32 is exact in float64: fused with the sum or not, the result is the same.
template <class In>
double narrow_squares(const typename In::Storage* from, size_t count) {
  constexpr size_t width = sizeof(Doubles) / sizeof(double);
  Doubles sums[32 / width] = {};
  size_t i = 0;
  for (; i + 32 <= count; i += 32)
    for (size_t k = 0; k < 32 / width; ++k) {
      const Doubles x = In::load_doubles(from + i + k * width);
      sums[k] = fused(x, x, sums[k]);
    }
  double lanes[32];
  __builtin_memcpy(lanes, sums, sizeof(lanes));
  for (size_t lane = 0; i < count; ++i, ++lane) {
    const double x = static_cast<double>(In::One::load(from + i));
    lanes[lane] += x * x;
  }
  for (size_t half = 16; half > 0; half /= 2)
    for (size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// Element i is added to lane i % 8.
double double_squares(const double* x, size_t count) {
  double lanes[8] = {};
  size_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (size_t lane = 0; lane < 8; ++lane) lanes[lane] += x[i + lane] * x[i + lane];
  for (size_t lane = 0; i < count; ++i, ++lane) lanes[lane] += x[i] * x[i];
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

Known known_of(RuleOptions options, const Piece& piece) {
  const DType dtype = piece.streams[kWeight].dtype;
  bool simple = !options.stochastic && piece.streams[kCopy].data == nullptr && piece.streams[kAverage].data == nullptr;
  for (int k = kState; k < kState + kMaxStates; ++k)
    simple &= piece.streams[k].data == nullptr || piece.streams[k].dtype == dtype;
  if (!simple) return Known::Nothing;
  return dtype == DType::Float32 ? Known::Float32 : dtype == DType::BFloat16 ? Known::BFloat16 : Known::Nothing;
}

}  // namespace

void update(RuleId id, RuleOptions options, const Piece& piece) {
  with_rule(id, [&](auto rule) {
    using Rule = decltype(rule);
    const Known known = known_of(options, piece);
    if (known == Known::Float32)
      Loop<Rule, Floats, Known::Float32>::update(piece, options);
    else if (known == Known::BFloat16)
      Loop<Rule, Floats, Known::BFloat16>::update(piece, options);
    else if (piece.streams[kWeight].dtype == DType::Float64)
      Loop<Rule, double, Known::Nothing>::update(piece, options);
    else
      Loop<Rule, Floats, Known::Nothing>::update(piece, options);
  });
}

void measure(RuleId id, const Piece& piece, double* sums) {
  const bool wide = piece.streams[kWeight].dtype == DType::Float64;
  with_rule(id, [&](auto rule) {
    if constexpr (decltype(rule)::kNorms) {
      if (wide)
        Loop<decltype(rule), double, Known::Nothing>::measure(piece, sums);
      else
        Loop<decltype(rule), Floats, Known::Nothing>::measure(piece, sums);
    }
  });
}

double squares(DType dtype, const void* data, size_t count) {
  const auto* halves = static_cast<const uint16_t*>(data);
  switch (dtype) {
    case DType::Float32:
      return narrow_squares<SingleDoubles>(static_cast<const float*>(data), count);
    case DType::Float16:
      return narrow_squares<Float16Doubles>(halves, count);
    case DType::BFloat16:
      return narrow_squares<BFloat16Doubles>(halves, count);
    default:
      return double_squares(static_cast<const double*>(data), count);
  }
}

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels
