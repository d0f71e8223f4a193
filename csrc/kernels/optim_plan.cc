// The persistent plan: a table of tensors, cut into chunks of bounded size, that threads take in batches.
//
// Chunks and batches depend on the tensors alone, never on the number of threads: so every sum has one order.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "kernels/optim.h"
#include "kernels/optim_cuda.h"
#include "kernels/pool.h"
#include "kernels/random_rounding.h"
#include "kernels/rules.h"
#include "kernels/table.h"

namespace roundel::kernels {
namespace {

constexpr size_t kChunk = 32768;     // elements: a MiB of Adam's streams; longer ones share the work less evenly
constexpr size_t kPrefetched = 256;  // bytes of a stream
constexpr size_t kCudaChunk = 8192;  // four packs of eight for each of a block's 256 threads

constexpr const char* kStreamNames[kStreams] = {"params", "grads",  "states", "states",
                                                "states", "params", "copies", "averages"};

[[noreturn]] void refuse(const char* what, size_t i, const std::string& expected, const std::string& got) {
  throw InvalidArgument(format("%s[%zu]: expected %s, got %s", what, i, expected.c_str(), got.c_str()));
}

template <class F>
bool with_norms(RuleId rule, F f) {
  bool norms = false;
  with_rule(rule, [&](auto functor) {
    using Rule = decltype(functor);
    if constexpr (Rule::kNorms) {
      norms = true;
      f(functor);
    }
  });
  return norms;
}

}  // namespace

OptimizerPlan::OptimizerPlan(RuleId rule, RuleOptions options, const OptimizerTensors& tensors, int device)
    : rule_(rule),
      options_(options),
      device_(device),
      hypers_(hyper_names(rule, options).size()),
      rows_(tensors.params.size()) {
  for (size_t i = 0; i < rows_.size(); ++i) count_ += rows_[i].count = tensors.params[i].count;
  const bool masters = !tensors.masters.empty();
  add_list("params", masters ? kOutput : kWeight, tensors.params);
  if (masters) add_list("masters", kWeight, tensors.masters);
  const std::vector<StateName> names = state_names(rule, options);
  if (tensors.states.size() != names.size())
    throw InvalidArgument(
        format("states: expected %zu lists for %s, got %zu", names.size(), name_of(rule), tensors.states.size()));
  for (size_t k = 0; k < names.size(); ++k) add_list(names[k].name, kState + names[k].place, tensors.states[k]);
  if (!tensors.copies.empty()) add_list("copies", kCopy, tensors.copies);
  if (options.average != !tensors.averages.empty() && !rows_.empty())
    throw InvalidArgument("averages: expected exactly when the option average is set");
  if (options.average) add_list("averages", kAverage, tensors.averages);

  if (masters)
    for (size_t i = 0; i < rows_.size(); ++i)
      if (tensors.masters[i].dtype != DType::Float32) refuse("masters", i, "float32", name_of(tensors.masters[i].dtype));
  if (tensors.steps.empty() ? needs_steps(rule, options) && !rows_.empty() : tensors.steps.size() != rows_.size())
    throw InvalidArgument(
        format("steps: expected %zu tensors for %s, got %zu", rows_.size(), name_of(rule), tensors.steps.size()));
  for (size_t i = 0; i < tensors.steps.size(); ++i) {
    const View& step = tensors.steps[i];
    if (step.dtype != DType::Float32 || step.count != 1)
      refuse("steps", i, "one float32", format("%zu %s", step.count, name_of(step.dtype)));
    rows_[i].step = static_cast<float*>(step.data);
  }
  if (options.stochastic && !rows_.empty() && rows_[0].streams[kWeight].dtype == DType::Float64)
    throw InvalidArgument("rounding: stochastic is for float32 arithmetic, got float64 weights");
  refuse_shared_memory(tensors);
  cut();
  if (device_ >= 0) cuda_ = make_cuda_optimizer(rule_, options_, rows_, chunks_, device_);
}

OptimizerPlan::OptimizerPlan(OptimizerPlan&&) noexcept = default;
OptimizerPlan::~OptimizerPlan() = default;

void OptimizerPlan::add_list(const char* what, int stream, const std::vector<View>& list) {
  if (list.size() != rows_.size())
    throw InvalidArgument(format("%s: expected %zu tensors, as params, got %zu", what, rows_.size(), list.size()));
  for (size_t i = 0; i < list.size(); ++i) {
    const View& view = list[i];
    if (!is_floating(view.dtype)) refuse(what, i, "float32, float64, float16 or bfloat16", name_of(view.dtype));
    if (view.dtype != list[0].dtype) refuse(what, i, format("%s, as the first", name_of(list[0].dtype)), name_of(view.dtype));
    if (view.count != rows_[i].count)
      refuse(what, i, format("%zu elements, as params[%zu]", rows_[i].count, i), format("%zu", view.count));
    rows_[i].streams[stream] = {view.data, view.dtype};
  }
}

// All that is written must be its own: two threads, or two tensors, may not write to the same place.
void OptimizerPlan::refuse_shared_memory(const OptimizerTensors& tensors) const {
  struct Range {
    const std::byte *begin, *end;
    const char* what;
    size_t i;
  };
  std::vector<Range> ranges;
  const auto add = [&](const char* what, const std::vector<View>& list) {
    for (size_t i = 0; i < list.size(); ++i)
      if (list[i].count > 0) ranges.push_back({list[i].at(0), list[i].at(list[i].count), what, i});
  };
  add("params", tensors.params);
  add("masters", tensors.masters);
  add("copies", tensors.copies);
  add("averages", tensors.averages);
  add("steps", tensors.steps);
  const std::vector<StateName> names = state_names(rule_, options_);
  for (size_t k = 0; k < names.size(); ++k) add(names[k].name, tensors.states[k]);
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t r = 1; r < ranges.size(); ++r) {
    const Range &a = ranges[r - 1], &b = ranges[r];
    if (b.begin < a.end)
      throw InvalidArgument(
          format("%s[%zu] and %s[%zu]: expected memory of their own, got memory that overlaps", a.what, a.i, b.what, b.i));
  }
}

void OptimizerPlan::cut() {
  const size_t most = device_ < 0 ? kChunk : kCudaChunk;
  batches_.push_back(0);
  size_t in_batch = 0;
  for (uint32_t r = 0; r < rows_.size(); ++r) {
    Row& row = rows_[r];
    row.first_chunk = static_cast<uint32_t>(chunks_.size());
    for (size_t begin = 0; begin < row.count; begin += most) {
      const size_t length = std::min(most, row.count - begin);
      chunks_.push_back({r, static_cast<uint32_t>(length), begin});
      in_batch += length;
      if (in_batch < kChunk) continue;
      batches_.push_back(static_cast<uint32_t>(chunks_.size()));
      in_batch = 0;
    }
    row.chunks = static_cast<uint32_t>(chunks_.size()) - row.first_chunk;
  }
  if (in_batch > 0) batches_.push_back(static_cast<uint32_t>(chunks_.size()));
}

void OptimizerPlan::replace_gradient(size_t i, const View& gradient) {
  Row& row = rows_[i];
  if (!is_floating(gradient.dtype)) refuse("grads", i, "float32, float64, float16 or bfloat16", name_of(gradient.dtype));
  if (gradient.count != row.count)
    refuse("grads", i, format("%zu elements, as params[%zu]", row.count, i), format("%zu", gradient.count));
  for (int id = 0; id < kStreams && row.count > 0; ++id) {
    const Stream& other = row.streams[id];
    if (id == kGradient || other.data == nullptr) continue;
    const View written{other.data, row.count, other.dtype};
    if (gradient.at(0) < written.at(row.count) && written.at(0) < gradient.at(row.count))
      refuse("grads", i, "memory of its own", format("memory that overlaps %s[%zu]", kStreamNames[id], i));
  }
  row.streams[kGradient] = {gradient.data, gradient.dtype};
  changed_from_ = changed_to_ == 0 ? i : std::min(changed_from_, i);
  changed_to_ = std::max(changed_to_, i + 1);
}

template <class F>
void OptimizerPlan::for_chunks(int threads, F f) {
  if (chunks_.empty()) return;
  parallel_for(batches_.size() - 1, threads, [&](size_t batch) {
    for (uint32_t c = batches_[batch]; c < batches_[batch + 1]; ++c) f(c);
  });
}

// For the chunk after the one at work, if that is another tensor's: of short tensors a loop mostly waits for the first lines,
// until the processor sees where it goes.
void OptimizerPlan::prefetch(uint32_t c, int first, int last) const {
  if (c == chunks_.size() || chunks_[c].begin > 0) return;
  const Row& row = rows_[chunks_[c].row];
  for (int id = first; id <= last; ++id) {
    const Stream& stream = row.streams[id];
    const size_t bytes = stream.data == nullptr ? 0 : std::min(row.count * size_of(stream.dtype), kPrefetched);
    for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(stream.data) + at, 0, 2);
  }
}

Piece OptimizerPlan::piece(const Chunk& chunk) const {
  const Row& row = rows_[chunk.row];
  Piece piece;
  std::copy(std::begin(row.streams), std::end(row.streams), piece.streams);
  if (chunk.begin > 0)
    for (Stream& stream : piece.streams)
      if (stream.data != nullptr) stream.data = View{stream.data, row.count, stream.dtype}.at(chunk.begin);
  piece.count = chunk.length;
  piece.scalars = &scalars_[row.scalars * kMaxScalars];
  piece.random = random_key_at(row.random, chunk.begin);
  piece.first = chunk.begin;
  return piece;
}

void OptimizerPlan::validate(const OptimizerCall& call) const {
  if (call.hyper.size() != hypers_)
    throw InvalidArgument(format("hyper: expected %zu numbers for %s, got %zu", hypers_, name_of(rule_), call.hyper.size()));
  if (!(call.grad_scale > 0)) throw InvalidArgument(format("grad_scale: expected a positive number, got %g", call.grad_scale));
  for (size_t i = 0; i < rows_.size(); ++i)
    if (rows_[i].streams[kGradient].data == nullptr && rows_[i].count > 0) refuse("grads", i, "a tensor", "none");
}

// The number of each tensor's step, and the scalars of each number that occurs; with norms each tensor has its own.
void OptimizerPlan::prepare(const OptimizerCall& call) {
  scalars_.clear();
  with_rule(rule_, [&](auto functor) {
    using Rule = decltype(functor);
    float last = -1;
    for (size_t i = 0; i < rows_.size(); ++i) {
      Row& row = rows_[i];
      const float step = row.step != nullptr ? *row.step + 1 : 1;
      if (options_.stochastic) row.random = random_key(call.seed, static_cast<uint64_t>(step), i);
      if (step != last || Rule::kNorms) {
        const auto scalars = Rule::prepare(call.hyper.data(), static_cast<double>(step), options_);
        scalars_.resize(scalars_.size() + kMaxScalars);
        std::memcpy(&scalars_[scalars_.size() - kMaxScalars], &scalars, sizeof(scalars));
        last = step;
      }
      row.scalars = static_cast<uint32_t>(scalars_.size() / kMaxScalars - 1);
    }
  });
}

// The norms of LAMB and LARS.
void OptimizerPlan::measure(double factor, int threads) {
  with_norms(rule_, [&](auto functor) {
    using Rule = decltype(functor);
    const Table& table = chosen();
    sums_.resize(2 * chunks_.size());
    for_chunks(threads, [&](uint32_t c) {
      Piece one = piece(chunks_[c]);
      one.factor = factor;
      table.measure(rule_, one, &sums_[2 * c]);
    });
    for (const Row& row : rows_) {
      double weight = 0, other = 0;
      for (size_t c = row.first_chunk; c < row.first_chunk + row.chunks; ++c) {
        weight += sums_[2 * c];
        other += sums_[2 * c + 1];
      }
      typename Rule::template Scalars<double> scalars;
      double* place = &scalars_[row.scalars * kMaxScalars];
      std::memcpy(&scalars, place, sizeof(scalars));
      Rule::adapt(scalars, std::sqrt(weight), std::sqrt(other));
      std::memcpy(place, &scalars, sizeof(scalars));
    }
  });
}

double OptimizerPlan::gradients_squared(int threads) {
  const Table& table = chosen();
  sums_.resize(2 * chunks_.size());
  for_chunks(threads, [&](uint32_t c) {
    const Chunk& chunk = chunks_[c];
    const Stream& gradient = rows_[chunk.row].streams[kGradient];
    const View view{gradient.data, rows_[chunk.row].count, gradient.dtype};
    prefetch(c + 1, kGradient, kGradient);
    sums_[c] = table.squares(gradient.dtype, view.at(chunk.begin), chunk.length);
  });
  double sum = 0;
  for (size_t c = 0; c < chunks_.size(); ++c) sum += sums_[c];
  return sum;
}

OptimizerResult OptimizerPlan::step(const OptimizerCall& call) {
  validate(call);
  if (cuda_) {
    StepNumbers numbers{};  // padding and all: it is compared as bytes
    std::copy(call.hyper.begin(), call.hyper.end(), numbers.hyper);
    numbers.grad_scale = call.grad_scale;
    numbers.clip = call.clip;
    numbers.found_inf = call.found_inf;
    numbers.grad_scale_at = call.grad_scale_at;
    numbers.clip_at = call.clip_at;
    numbers.found_inf_at = call.found_inf_at;
    numbers.max_norm = call.max_norm;
    numbers.average_weight = average_weight(call);
    numbers.seed = call.seed;
    numbers.check = call.check_finite || call.max_norm > 0;
    cuda_->step(numbers, rows_, changed_from_, changed_to_, call.stream);
    changed_from_ = changed_to_ = 0;
    return {};
  }
  return last_ = step_here(call);
}

double OptimizerPlan::average_weight(const OptimizerCall& call) const {
  return options_.average ? 1 - call.hyper[hypers_ - 1] : 0;
}

OptimizerResult OptimizerPlan::result() const { return cuda_ ? cuda_->result() : last_; }

OptimizerResult OptimizerPlan::step_here(const OptimizerCall& call) {
  OptimizerResult result;
  result.skipped = call.found_inf;
  const int threads = call.threads > 0 ? call.threads : default_threads();
  double clip = call.clip;
  if (call.check_finite || call.max_norm > 0) {
    result.norm = std::sqrt(gradients_squared(threads)) / call.grad_scale;
    result.skipped |= !std::isfinite(result.norm);
    if (call.max_norm > 0) clip *= std::min(1.0, call.max_norm / (result.norm + kClipEps));
  }
  if (result.skipped) return result;

  prepare(call);
  const double factor = (options_.maximize ? -clip : clip) / call.grad_scale;
  measure(factor, threads);
  const Table& table = chosen();
  const double weight = average_weight(call);
  for_chunks(threads, [&](uint32_t c) {
    Piece one = piece(chunks_[c]);
    one.factor = factor;
    one.average_weight = weight;
    prefetch(c + 1, kWeight, kStreams - 1);
    table.update(rule_, options_, one);
  });
  for (Row& row : rows_)
    if (row.step != nullptr) *row.step += 1;
  return result;
}

}  // namespace roundel::kernels
