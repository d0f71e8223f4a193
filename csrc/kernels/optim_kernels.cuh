// The kernels of an optimizer step, in the order in which optim_cuda.cu queues them. All read what `decide` has decided, so
// that a skipped step changes nothing and is known to the device alone. Sums have one order: a block's threads by turns, then a
// tree.
#pragma once

#include "kernels/pack.cuh"
#include "kernels/random_rounding.h"
#include "kernels/rules.h"

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

constexpr int kThreads = 256;
constexpr int kEight = 8;  // elements of a pack, for at least 16 bytes of every type

// Of an update in T. Float64 takes twice the registers and code: 16 bytes of its own will do.
template <class T>
constexpr int kPack = sizeof(T) == 8 ? 2 : kEight;

struct Decision {
  double factor;  // of the gradients: sign, unscaling and clipping
  double norm;
  int skip;
};

__device__ double value_of(const float* where, double otherwise) {
  return where != nullptr ? static_cast<double>(*where) : otherwise;
}

// The sum over the block, for thread 0.
__device__ double block_sum(double x) {
  __shared__ double partial[kThreads];
  __syncthreads();
  partial[threadIdx.x] = x;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  return partial[0];
}

__device__ Stream moved(const Stream& stream, size_t begin) {
  if (stream.data == nullptr) return stream;
  const size_t size = stream.dtype == DType::Float64 ? 8 : stream.dtype == DType::Float32 ? 4 : 2;
  return {static_cast<char*>(stream.data) + begin * size, stream.dtype};
}

// f(place) for all packs of N of a chunk, by the threads of a block.
template <int N, class F>
__device__ void for_packs(size_t count, bool aligned, F f) {
  for (size_t i = threadIdx.x * static_cast<size_t>(N); i < count; i += kThreads * static_cast<size_t>(N))
    f(Place{i, count - i < N ? static_cast<int>(count - i) : N, aligned && count - i >= N});
}

__global__ void __launch_bounds__(kThreads) square(const Row* rows, const Chunk* chunks, size_t count, double* sums) {
  for (size_t c = blockIdx.x; c < count; c += gridDim.x) {
    const Chunk chunk = chunks[c];
    const Stream gradient = moved(rows[chunk.row].streams[kGradient], chunk.begin);
    double sum = 0;
    for_packs<kEight>(chunk.length, reinterpret_cast<uintptr_t>(gradient.data) % 16 == 0, [&](const Place& place) {
      double x[kEight];
      load(gradient, place, x);
#pragma unroll
      for (int e = 0; e < kEight; ++e) sum += x[e] * x[e];
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[c] = sum;
  }
}

// One block. `count` 0: no norm.
__global__ void __launch_bounds__(kThreads)
    decide(const StepNumbers* numbers, bool maximize, const double* sums, size_t count, Decision* decision) {
  double sum = 0;
  for (size_t c = threadIdx.x; c < count; c += kThreads) sum += sums[c];
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  const double scale = value_of(numbers->grad_scale_at, numbers->grad_scale);
  double factor = value_of(numbers->clip_at, numbers->clip) / scale;
  decision->skip = value_of(numbers->found_inf_at, numbers->found_inf) != 0;
  decision->norm = ::sqrt(sum) / scale;
  if (numbers->check != 0) {
    if (!isfinite(decision->norm)) decision->skip = 1;
    const double clip = numbers->max_norm / (decision->norm + kClipEps);
    if (numbers->max_norm > 0 && clip < 1) factor *= clip;
  }
  decision->factor = maximize ? -factor : factor;
}

template <class Rule>
__global__ void prepare(Row* rows, size_t count, const StepNumbers* numbers, const Decision* decision, RuleOptions options,
                        double* scalars) {
  const size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x;
  if (i >= count || decision->skip) return;
  float step = 1;
  if (rows[i].step != nullptr) *rows[i].step = step = *rows[i].step + 1;
  const auto prepared = Rule::prepare(numbers->hyper, static_cast<double>(step), options);
  memcpy(&scalars[i * kMaxScalars], &prepared, sizeof(prepared));
  rows[i].random = random_key(numbers->seed, static_cast<uint64_t>(step), i);
}

template <class Rule, class T>
struct Elements {
  using Scalars = typename Rule::template Scalars<T>;
  static constexpr int N = kPack<T>;
  T p[N], g[N], s[kMaxStates][N];

  __device__ void take(const Stream* streams, const Place& place, T factor) {
    load(streams[kWeight], place, p);
    load(streams[kGradient], place, g);
#pragma unroll
    for (int e = 0; e < N; ++e) g[e] *= factor;
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k)
      if (streams[kState + k].data != nullptr) load(streams[kState + k], place, s[k]);
  }
};

// The streams of a chunk from its first element on; whether all of them can be accessed as packs.
__device__ bool streams_of(const Row& row, size_t begin, Stream* streams) {
  uintptr_t bits = 0;
#pragma unroll
  for (int id = 0; id < kStreams; ++id) {
    streams[id] = moved(row.streams[id], begin);
    bits |= reinterpret_cast<uintptr_t>(streams[id].data);
  }
  return bits % 16 == 0;
}

template <class Rule, class T>
__global__ void __launch_bounds__(kThreads)
    measure(const Row* rows, const Chunk* chunks, size_t count, const Decision* decision, const double* scalars, double* sums) {
  if constexpr (Rule::kNorms) {
    if (decision->skip) return;
    const T factor = static_cast<T>(decision->factor);
    for (size_t c = blockIdx.x; c < count; c += gridDim.x) {
      const Chunk chunk = chunks[c];
      Stream streams[kStreams];
      const bool aligned = streams_of(rows[chunk.row], chunk.begin, streams);
      const auto own = scalars_from<typename Rule::template Scalars<T>, T>(&scalars[chunk.row * kMaxScalars]);
      double weight = 0, other = 0;
      for_packs<kPack<T>>(chunk.length, aligned, [&](const Place& place) {
        Elements<Rule, T> x;
        x.take(streams, place, factor);
#pragma unroll
        for (int e = 0; e < kPack<T>; ++e) {
          if (e >= place.count) break;
          T states[kMaxStates];
          for (int k = 0; k < Rule::kStates; ++k) states[k] = x.s[k][e];
          const double p = static_cast<double>(x.p[e]), d = static_cast<double>(Rule::measured(x.p[e], x.g[e], states, own));
          weight += p * p;
          other += d * d;
        }
      });
      weight = block_sum(weight);
      other = block_sum(other);
      if (threadIdx.x == 0) {
        sums[2 * c] = weight;
        sums[2 * c + 1] = other;
      }
    }
  }
}

// A block per tensor.
template <class Rule>
__global__ void __launch_bounds__(kThreads)
    adapt(const Row* rows, size_t count, const Decision* decision, const double* sums, double* scalars) {
  if constexpr (Rule::kNorms) {
    if (decision->skip) return;
    for (size_t r = blockIdx.x; r < count; r += gridDim.x) {
      double weight = 0, other = 0;
      for (size_t c = threadIdx.x; c < rows[r].chunks; c += kThreads) {
        weight += sums[2 * (rows[r].first_chunk + c)];
        other += sums[2 * (rows[r].first_chunk + c) + 1];
      }
      weight = block_sum(weight);
      other = block_sum(other);
      if (threadIdx.x != 0) continue;
      typename Rule::template Scalars<double> own;
      memcpy(&own, &scalars[r * kMaxScalars], sizeof(own));
      Rule::adapt(own, ::sqrt(weight), ::sqrt(other));
      memcpy(&scalars[r * kMaxScalars], &own, sizeof(own));
    }
  }
}

template <class T>
__device__ void keep(const Stream& stream, int id, const Place& place, T (&x)[kPack<T>], bool stochastic,
                     const uint32_t* random) {
  if constexpr (sizeof(T) == 4)
    if (stochastic && (stream.dtype == DType::Float16 || stream.dtype == DType::BFloat16)) {
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e)
        x[e] = rounded_by_chance(x[e], stream.dtype, random_bits_of(random[e], static_cast<uint32_t>(id)));
    }
  store(stream, place, x);
}

template <class Rule, class T>
__global__ void __launch_bounds__(kThreads) update(const Row* rows, const Chunk* chunks, size_t count, const Decision* decision,
                                                   const StepNumbers* numbers, RuleOptions options, const double* scalars) {
  if (decision->skip) return;
  const T factor = static_cast<T>(decision->factor), average_weight = static_cast<T>(numbers->average_weight);
  for (size_t c = blockIdx.x; c < count; c += gridDim.x) {
    const Chunk chunk = chunks[c];
    const Row& row = rows[chunk.row];
    Stream streams[kStreams];
    const bool aligned = streams_of(row, chunk.begin, streams);
    const auto own = scalars_from<typename Rule::template Scalars<T>, T>(&scalars[chunk.row * kMaxScalars]);
    const uint64_t key = random_key_at(row.random, chunk.begin);
    for_packs<kPack<T>>(chunk.length, aligned, [&](const Place& place) {
      Elements<Rule, T> x;
      x.take(streams, place, factor);
      uint32_t random[kPack<T>];
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) {
        T states[kMaxStates] = {};
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k)
          if (streams[kState + k].data != nullptr) states[k] = x.s[k][e];
        Rule::update(x.p[e], x.g[e], states, own, options);
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) x.s[k][e] = states[k];
        random[e] = options.stochastic ? random_bits(key, static_cast<uint32_t>(chunk.begin + place.first + e)) : 0;
      }
      if (streams[kOutput].data != nullptr) store(streams[kOutput], place, x.p);
      if (streams[kCopy].data != nullptr) store(streams[kCopy], place, x.p);
      if (streams[kAverage].data != nullptr) {
        T average[kPack<T>];
        load(streams[kAverage], place, average);
#pragma unroll
        for (int e = 0; e < kPack<T>; ++e) average[e] = lerp(average[e], x.p[e], average_weight);
        keep(streams[kAverage], kAverage, place, average, options.stochastic, random);
      }
      keep(streams[kWeight], kWeight, place, x.p, options.stochastic, random);
#pragma unroll
      for (int k = 0; k < Rule::kStates; ++k)
        if (streams[kState + k].data != nullptr)
          keep(streams[kState + k], kState + k, place, x.s[k], options.stochastic, random);
    });
  }
}

// Float32 and the 16-bit types are multiplied in float32.
__global__ void __launch_bounds__(kThreads) scale(const Row* rows, const Chunk* chunks, size_t count, double factor) {
  for (size_t c = blockIdx.x; c < count; c += gridDim.x) {
    const Chunk chunk = chunks[c];
    const Stream stream = moved(rows[chunk.row].streams[kGradient], chunk.begin);
    const bool aligned = reinterpret_cast<uintptr_t>(stream.data) % 16 == 0;
    for_packs<kEight>(chunk.length, aligned, [&](const Place& place) {
      double x[kEight];
      load(stream, place, x);
      const bool wide = stream.dtype == DType::Float64;
#pragma unroll
      for (int e = 0; e < kEight; ++e)
        x[e] = wide ? x[e] * factor : static_cast<double>(static_cast<float>(x[e]) * static_cast<float>(factor));
      store(stream, place, x);
    });
  }
}

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels
