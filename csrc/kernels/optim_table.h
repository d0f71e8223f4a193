// What an optimizer step is told, as plain data: the same for every processor, in host and in device memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"

namespace roundel::kernels {

enum class RuleId : uint8_t { Sgd, Adam, RmsProp, Adagrad, Lion, Lamb, Lars };
inline constexpr int kRules = 7;
inline constexpr int kMaxStates = 3;
inline constexpr int kMaxHyper = 7;
inline constexpr int kMaxScalars = 10;
inline constexpr double kClipEps = 1e-6;  // as torch.nn.utils.clip_grad_norm_

// Choices that hold for the life of a plan. Each rule looks at its own.
struct RuleOptions {
  bool momentum = false, nesterov = false, amsgrad = false, centered = false;
  bool decoupled = false;  // weight decay of the weight itself, not through the gradient
  bool keras = false;      // the formulas of Keras where they differ from torch's
  bool maximize = false;
  bool average = false;     // keep an exponential moving average of the weights
  bool stochastic = false;  // 16-bit weights, moments and averages are rounded up or down by chance
};

// Some elements in memory of one type; `data` is null where a tensor has no such stream.
struct Stream {
  void* data = nullptr;
  DType dtype = DType::Float32;
};

enum StreamId { kWeight, kGradient, kState, kOutput = kState + kMaxStates, kCopy, kAverage, kStreams };

// A stretch of one tensor, all streams from its first element on.
struct Piece {
  Stream streams[kStreams];
  size_t count = 0;
  double factor = 1;          // multiplied into the gradient: sign, unscaling and clipping
  double average_weight = 0;  // 1 - decay
  const double* scalars;      // what the rule's prepare() made of hyper-parameters and step
  uint64_t random = 0;        // the tensor's key of this step
  uint64_t first = 0;         // index of the piece's first element in the tensor
};

// One tensor of a plan. `scalars` and `random` are this step's.
struct Row {
  Stream streams[kStreams];
  size_t count = 0;
  float* step = nullptr;
  uint32_t first_chunk = 0, chunks = 0;
  uint32_t scalars = 0;
  uint64_t random = 0;
};

// What a thread, or a block of a GPU, takes at once: a part of one tensor.
struct Chunk {
  uint32_t row = 0, length = 0;
  size_t begin = 0;
};

// The numbers of one step, as a GPU gets them. A pointer is one float32 in its memory, in place of the number; or null.
struct StepNumbers {
  double hyper[kMaxHyper];
  double grad_scale, clip, found_inf;
  const float *grad_scale_at, *clip_at, *found_inf_at;
  double max_norm, average_weight;
  uint64_t seed;
  uint64_t check;  // look at all gradients first
};

struct OptimizerResult {
  double norm = 0;  // of the unscaled gradients, when they were looked at
  bool skipped = false;
};

}  // namespace roundel::kernels
