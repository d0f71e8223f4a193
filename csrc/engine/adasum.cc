// Adasum by transposition: an all-to-all gives every rank the same slice of all ranks' gradients; it goes up the tree of pairs
// on that slice alone, and an all-gather brings the slices of the result together. In each round of the tree an all-reduce sums
// the slices' dot products, three numbers per tensor and pair.
//
// P ranks, n bytes: 2(P-1)/P * n bytes sent per rank and (P-1)/P * n bytes combined, as by the paper's vector halving and
// distance doubling, and about log2 P + 2 collectives. Against halving: any P costs alike, 16-bit types stay float32 all the
// way up, and nobody waits for the next of a chain of messages; but the all-to-all sends P-1 messages where halving sends log2
// P, and n to 2n bytes of workspace are kept (2n more for 16-bit types). Small tensors are gathered whole, and every rank goes
// up the whole tree: one collective.
#include "engine/adasum.h"

#include <bit>
#include <cstdlib>

#include "base/copy.h"
#include "base/error.h"

namespace roundel::engine {
namespace {

using comm::Communicator;
using comm::Operation;

constexpr size_t kWholeBytes =
    64u << 10;  // of all ranks: below, combining everything takes less time than two more collectives
constexpr size_t kAlignment = 64;

size_t padded(size_t count, int size) {
  const auto ranks = static_cast<size_t>(size);
  return (count + ranks - 1) / ranks * ranks;
}

void validate(const std::vector<std::pair<View, View>>& tensors, int rank, const std::string& name) {
  const auto refuse = [&](const std::string& what) {
    throw InvalidArgument(format("rank %d: adasum '%s': expected %s", rank, name.c_str(), what.c_str()));
  };
  for (const auto& [in, out] : tensors) {
    if (!is_floating(in.dtype)) refuse(format("a floating dtype, got %s", name_of(in.dtype)));
    if (in.dtype != tensors.front().first.dtype || out.dtype != in.dtype)
      refuse(format("tensors of one dtype, got %s and %s", name_of(tensors.front().first.dtype),
                    name_of(out.dtype != in.dtype ? out.dtype : in.dtype)));
    if (in.count != out.count) refuse(format("an output of %zu elements, got %zu", in.count, out.count));
  }
}

}  // namespace

std::vector<std::vector<AdasumPair>> adasum_tree(int size) {
  const int power = static_cast<int>(std::bit_floor(static_cast<unsigned>(size))), extra = size - power;
  std::vector<std::vector<AdasumPair>> rounds;
  if (extra > 0) {
    rounds.emplace_back();
    for (int r = power - extra; r < power; ++r) rounds.back().push_back({r, r + extra});
  }
  for (int distance = 1; distance < power; distance *= 2) {
    rounds.emplace_back();
    for (int r = 0; r < power; r += 2 * distance) rounds.back().push_back({r, r + distance});
  }
  return rounds;
}

Workspace::~Workspace() {
  if (data_ != nullptr) comm_.release(data_);
}

std::byte* Workspace::at_least(size_t bytes) {
  if (bytes <= bytes_) return data_;
  if (data_ != nullptr) comm_.release(std::exchange(data_, nullptr));
  bytes_ = 0;
  try {
    data_ = comm_.allocate(bytes);
  } catch (const Error&) {
    data_ = static_cast<std::byte*>(std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment));
    if (data_ == nullptr) throw Error(format("no memory for a buffer of %zu bytes", bytes));
  }
  bytes_ = bytes;
  return data_;
}

// What one run() is asked for. Packed, its tensors lie one behind the other.
struct Adasum::Call {
  const std::vector<std::pair<View, View>>& tensors;
  double factor;
  const std::string& name;
  DType dtype = tensors.front().first.dtype;
  DType wide = is_half(dtype) ? DType::Float32 : dtype;  // what is combined
  size_t count = 0;                                      // elements in all

  void pack(std::byte* to) const {
    for (const auto& [in, out] : tensors) {
      copy_bytes(to, in.data, in.bytes());
      to += in.bytes();
    }
  }

  void unpack(const std::byte* from) const {
    for (const auto& [in, out] : tensors) {
      copy_bytes(out.data, from, out.bytes());
      from += out.bytes();
    }
  }

  // What [begin, begin + count) of the packed tensors has of each tensor, counted from its own beginning.
  std::vector<plan::Place> ranges_within(size_t begin, size_t count) const {
    std::vector<plan::Place> ranges;
    size_t at = 0;
    for (const auto& [in, out] : tensors) {
      const size_t first = std::clamp(at, begin, begin + count), end = std::clamp(at + in.count, begin, begin + count);
      ranges.push_back({plan::Buffer::Out, first - begin, end - first});
      at += in.count;
    }
    return ranges;
  }

  Operation operation(OpKind kind, View in, View out) const {
    Operation o;
    o.kind = kind;
    o.name = "adasum " + name;
    o.in = in;
    o.out = out;
    return o;
  }
};

Adasum::Adasum(Communicator& comm)
    : comm_(comm), tree_(adasum_tree(comm.world().size)), packed_(comm), slices_(comm), wide_(comm) {}

void Adasum::run(const std::vector<std::pair<View, View>>& tensors, double prescale, double postscale,
                 const std::string& name) {
  validate(tensors, comm_.world().rank, name);
  if (tensors.empty()) return;
  const int size = comm_.world().size;
  Call call{tensors, prescale * postscale, name};  // scaled inputs give a scaled result
  for (const auto& [in, out] : tensors) {
    call.count += in.count;
    if (size == 1) kernels::scale(call.dtype, out.data, in.data, in.count, call.factor);
  }
  if (call.count == 0 || size == 1) return;
  const bool whole = call.count * size_of(call.dtype) * static_cast<size_t>(size) <= kWholeBytes;
  whole ? combine_whole(call) : combine_slices(call);
}

void Adasum::combine_whole(const Call& call) {
  const size_t count = call.count * static_cast<size_t>(comm_.world().size), element = size_of(call.dtype);
  const View packed{packed_.at_least(call.count * element), call.count, call.dtype};
  const View all{slices_.at_least(count * element), count, call.dtype};
  call.pack(packed.at(0));
  Operation gather = call.operation(OpKind::AllGather, packed, all);
  gather.parts = plan::Parts::equal(call.count, comm_.world().size);
  comm_.run(std::move(gather));
  go_up(call, all, packed, 0, false);
  call.unpack(packed.at(0));
}

void Adasum::combine_slices(const Call& call) {
  const size_t count = padded(call.count, comm_.world().size), slice = count / static_cast<size_t>(comm_.world().size);
  const size_t begin = slice * static_cast<size_t>(comm_.world().rank), bytes = count * size_of(call.dtype);
  // A single tensor that divides evenly needs no packing.
  const bool alone = call.tensors.size() == 1 && count == call.count;
  const View packed{alone ? nullptr : packed_.at_least(bytes), count, call.dtype};
  const View slices{slices_.at_least(bytes), count, call.dtype};
  if (!alone) call.pack(packed.at(0));

  Operation exchange = call.operation(OpKind::AllToAll, alone ? call.tensors.front().first : packed, slices);
  exchange.parts = plan::Parts::even(count, comm_.world().size);
  comm_.run(std::move(exchange));

  const View result = alone ? call.tensors.front().second : packed;
  const View part{result.at(begin), slice, call.dtype};
  go_up(call, slices, part, begin, true);

  Operation gather = call.operation(OpKind::AllGather, part, result);
  gather.parts = plan::Parts::even(count, comm_.world().size);
  comm_.run(std::move(gather));
  if (!alone) call.unpack(packed.at(0));
}

// `slices`: one of every rank, of which the first becomes the combination of all, scaled and put into `out`. They begin at
// element `begin` of the packed tensors. `shared`: other ranks have the rest of them.
void Adasum::go_up(const Call& call, View slices, View out, size_t begin, bool shared) {
  if (call.wide != call.dtype) {
    const View wide{wide_.at_least(slices.count * size_of(call.wide)), slices.count, call.wide};
    kernels::cast(wide.dtype, wide.data, slices.dtype, slices.data, slices.count);
    slices = wide;
  }
  const std::vector<plan::Place> ranges = call.ranges_within(begin, out.count);
  const auto slice_of = [&](int rank, size_t at) { return slices.at(static_cast<size_t>(rank) * out.count + at); };
  std::vector<kernels::Dots> dots;
  for (const std::vector<AdasumPair>& round : tree_) {
    dots.clear();
    for (const auto [into, from] : round)
      for (const plan::Place& r : ranges)
        dots.push_back(kernels::dots(call.wide, slice_of(into, r.begin), slice_of(from, r.begin), r.count));
    if (shared) sum_over_ranks(call, dots);
    const bool last = &round == &tree_.back();
    auto next = dots.begin();
    for (const auto [into, from] : round)
      for (const plan::Place& r : ranges) {
        const auto [aa, ab, bb] = *next++;
        const double factor = last ? call.factor : 1;
        const double x = (aa == 0 ? 1 : 1 - ab / aa / 2) * factor, y = (bb == 0 ? 1 : 1 - ab / bb / 2) * factor;
        std::byte* to = last && call.wide == call.dtype ? out.at(r.begin) : slice_of(into, r.begin);
        kernels::combine(call.wide, to, slice_of(into, r.begin), slice_of(from, r.begin), r.count, x, y);
      }
  }
  if (call.wide != call.dtype) kernels::cast(out.dtype, out.data, slices.dtype, slices.data, out.count);
}

void Adasum::sum_over_ranks(const Call& call, std::vector<kernels::Dots>& dots) {
  static_assert(sizeof(kernels::Dots) == 3 * sizeof(double));
  const View sums{dots.data(), 3 * dots.size(), DType::Float64};
  comm_.run(call.operation(OpKind::AllReduce, sums, sums));
}

}  // namespace roundel::engine
