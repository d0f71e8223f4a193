// Adasum by transposition: an all-to-all gives every rank the same slice of all ranks' gradients; it goes up the tree of pairs
// on that slice alone, and an all-gather brings the slices of the result together. In each round of the tree an all-reduce sums
// the slices' dot products, three numbers per tensor and pair.
//
// P ranks, n bytes: 2(P-1)/P * n bytes sent per rank and (P-1)/P * n bytes combined, as by the paper's vector halving and
// distance doubling, and about log2 P + 2 collectives. Against halving: any P costs alike, 16-bit types stay float32 all the
// way up, and nobody waits for the next of a chain of messages; but the all-to-all sends P-1 messages where halving sends log2
// P, and n bytes of scratch are needed (3n for 16-bit types). Small tensors are gathered whole, and every rank goes up the
// whole tree: one collective.
#include "engine/adasum.h"

#include <bit>
#include <cstdlib>

#include "base/copy.h"
#include "base/error.h"
#include "kernels/kernels.h"

namespace roundel::engine {
namespace {

using comm::Communicator;
using comm::Operation;

constexpr size_t kWholeBytes =
    64u << 10;  // of all ranks: below, combining everything takes less time than two more collectives
constexpr size_t kAlignment = 64;

// Memory that peers can reach where there is room for it.
class Buffer {
 public:
  Buffer(Communicator& comm, size_t bytes) : comm_(comm) {
    try {
      data_ = comm.allocate(bytes);
    } catch (const Error&) {
      const size_t rounded = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
      data_ = static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded));
      if (data_ == nullptr) throw Error(format("no memory for a buffer of %zu bytes", bytes));
    }
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { comm_.release(data_); }
  std::byte* data() const { return data_; }

 private:
  Communicator& comm_;
  std::byte* data_;
};

size_t padded(size_t count, int size) {
  const auto ranks = static_cast<size_t>(size);
  return (count + ranks - 1) / ranks * ranks;
}

class Adasum {
 public:
  Adasum(Communicator& comm, const std::vector<std::pair<View, View>>& tensors, double factor, const std::string& name)
      : comm_(comm),
        tensors_(tensors),
        factor_(factor),
        name_(name),
        rank_(comm.world().rank),
        size_(comm.world().size),
        dtype_(tensors.front().first.dtype),
        wide_(is_half(dtype_) ? DType::Float32 : dtype_),
        tree_(adasum_tree(size_)) {
    for (const auto& [in, out] : tensors_) total_ += in.count;
  }

  void run() {
    if (total_ == 0) return;
    if (size_ == 1) return scale_own();
    const bool whole = total_ * size_of(dtype_) * static_cast<size_t>(size_) <= kWholeBytes;
    whole ? combine_whole() : combine_slices();
  }

 private:
  void scale_own() {
    for (const auto& [in, out] : tensors_) kernels::scale(dtype_, out.data, in.data, in.count, factor_);
  }

  void combine_whole() {
    const size_t count = total_ * static_cast<size_t>(size_);
    const Buffer packed(comm_, total_ * size_of(dtype_)), all(comm_, count * size_of(dtype_));
    pack(packed.data());
    Operation o = operation(OpKind::AllGather, dtype_);
    o.parts = plan::Parts::equal(total_, size_);
    o.in = {packed.data(), total_, dtype_};
    o.out = {all.data(), count, dtype_};
    comm_.run(std::move(o));
    go_up({all.data(), count, dtype_}, {packed.data(), total_, dtype_}, 0, false);
    unpack(packed.data());
  }

  void combine_slices() {
    const size_t count = padded(total_, size_), slice = count / static_cast<size_t>(size_);
    const size_t begin = slice * static_cast<size_t>(rank_);
    // A single tensor that divides evenly needs no packing.
    const bool alone = tensors_.size() == 1 && count == total_;
    const Buffer packed(comm_, alone ? 0 : count * size_of(dtype_)), slices(comm_, count * size_of(dtype_));
    if (!alone) pack(packed.data());

    Operation o = operation(OpKind::AllToAll, dtype_);
    o.parts = plan::Parts::even(count, size_);
    o.in = {alone ? tensors_.front().first.data : packed.data(), count, dtype_};
    o.out = {slices.data(), count, dtype_};
    comm_.run(std::move(o));

    const View result{alone ? tensors_.front().second.data : packed.data(), count, dtype_};
    const View part{result.at(begin), slice, dtype_};
    go_up({slices.data(), count, dtype_}, part, begin, true);

    o = operation(OpKind::AllGather, dtype_);
    o.parts = plan::Parts::even(count, size_);
    o.in = part;
    o.out = result;
    comm_.run(std::move(o));
    if (!alone) unpack(packed.data());
  }

  // `slices`: one of every rank, of which the first becomes the combination of all, scaled and put into `out`. They begin at
  // element `begin` of the packed tensors. `shared`: other ranks have the rest of them.
  void go_up(View slices, View out, size_t begin, bool shared) {
    const Buffer wide(comm_, is_half(dtype_) ? slices.count * sizeof(float) : 0);
    if (is_half(dtype_)) {
      kernels::cast(wide_, wide.data(), dtype_, slices.data, slices.count);
      slices = {wide.data(), slices.count, wide_};
    }
    const std::vector<plan::Place> ranges = ranges_within(begin, out.count);
    const auto slice_of = [&](int rank, size_t at) { return slices.at(static_cast<size_t>(rank) * out.count + at); };
    std::vector<kernels::Dots> dots;
    for (const std::vector<AdasumPair>& round : tree_) {
      dots.clear();
      for (const auto [into, from] : round)
        for (const plan::Place& r : ranges)
          dots.push_back(kernels::dots(wide_, slice_of(into, r.begin), slice_of(from, r.begin), r.count));
      if (shared) sum_over_ranks(dots);
      const bool last = &round == &tree_.back();
      auto next = dots.begin();
      for (const auto [into, from] : round)
        for (const plan::Place& r : ranges) {
          const auto [aa, ab, bb] = *next++;
          const double factor = last ? factor_ : 1;
          const double x = (aa == 0 ? 1 : 1 - ab / aa / 2) * factor, y = (bb == 0 ? 1 : 1 - ab / bb / 2) * factor;
          std::byte* to = last && wide_ == dtype_ ? out.at(r.begin) : slice_of(into, r.begin);
          kernels::combine(wide_, to, slice_of(into, r.begin), slice_of(from, r.begin), r.count, x, y);
        }
    }
    if (wide_ != dtype_) kernels::cast(dtype_, out.data, wide_, slices.data, out.count);
  }

  void sum_over_ranks(std::vector<kernels::Dots>& dots) {
    static_assert(sizeof(kernels::Dots) == 3 * sizeof(double));
    Operation o = operation(OpKind::AllReduce, DType::Float64);
    o.in = o.out = {dots.data(), 3 * dots.size(), DType::Float64};
    comm_.run(std::move(o));
  }

  // What [begin, begin + count) of the packed tensors has of each tensor, counted from its own beginning.
  std::vector<plan::Place> ranges_within(size_t begin, size_t count) const {
    std::vector<plan::Place> ranges;
    size_t at = 0;
    for (const auto& [in, out] : tensors_) {
      const size_t first = std::clamp(at, begin, begin + count), end = std::clamp(at + in.count, begin, begin + count);
      ranges.push_back({plan::Buffer::Out, first - begin, end - first});
      at += in.count;
    }
    return ranges;
  }

  void pack(std::byte* to) const {
    for (const auto& [in, out] : tensors_) {
      copy_bytes(to, in.data, in.bytes());
      to += in.bytes();
    }
  }

  void unpack(const std::byte* from) const {
    for (const auto& [in, out] : tensors_) {
      copy_bytes(out.data, from, out.bytes());
      from += out.bytes();
    }
  }

  Operation operation(OpKind kind, DType dtype) const {
    Operation o;
    o.kind = kind;
    o.name = "adasum " + name_;
    o.in.dtype = o.out.dtype = dtype;
    return o;
  }

  Communicator& comm_;
  const std::vector<std::pair<View, View>>& tensors_;
  double factor_;
  const std::string& name_;
  int rank_, size_;
  DType dtype_, wide_;
  std::vector<std::vector<AdasumPair>> tree_;
  size_t total_ = 0;
};

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

void adasum(Communicator& comm, const std::vector<std::pair<View, View>>& tensors, double prescale, double postscale,
            const std::string& name) {
  validate(tensors, comm.world().rank, name);
  if (tensors.empty()) return;
  Adasum(comm, tensors, prescale * postscale, name).run();  // scaled inputs give a scaled result
}

}  // namespace roundel::engine
