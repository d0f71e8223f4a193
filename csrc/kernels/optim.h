// Optimizer steps of many tensors at once: what rules there are, the persistent plan, norms and scaling of lists of tensors.
//
// Cost of a step: one pass over the streams, two with a norm; no allocation; table rows are written only where a gradient has
// moved. Bits: the same on every ISA path and for any number of threads. One thread at a time may use a plan.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/view.h"
#include "kernels/optim_table.h"

namespace roundel::kernels {

// "sgd", "adam", "rmsprop", "adagrad", "lion", "lamb" or "lars"; throws InvalidArgument for others.
RuleId rule_named(const std::string& name);
const char* name_of(RuleId rule);

// A moment of a rule: its name in state_dict(), and its place among the rule's states.
struct StateName {
  const char* name;
  int place;
};
std::vector<StateName> state_names(RuleId rule, RuleOptions options);
std::vector<std::string> hyper_names(RuleId rule, RuleOptions options);

// Whether the formula (or stochastic rounding) needs to know the number of the step.
bool needs_steps(RuleId rule, RuleOptions options);

// What a plan works on, all on one device. Lists are empty or as long as params; masters, then, are what the rule works on.
struct OptimizerTensors {
  std::vector<View> params;
  std::vector<std::vector<View>> states;  // one list per moment, in the order of state_names()
  std::vector<View> masters, copies, averages;
  std::vector<View> steps;  // one float32 each
};

struct OptimizerCall {
  std::span<const double> hyper;  // in the order of hyper_names()
  double grad_scale = 1, clip = 1;
  bool found_inf = false;
  bool check_finite = false;  // look at all gradients first
  double max_norm = 0;        // > 0: and clip their norm
  uint64_t seed = 0;          // of stochastic rounding
  int threads = 0;            // 0: as many as the process may run on
};

struct OptimizerResult {
  double norm = 0;  // of the unscaled gradients, when they were looked at
  bool skipped = false;
};

class OptimizerPlan {
 public:
  // Throws InvalidArgument, naming list and index, where counts, dtypes or lists do not fit or memory is shared.
  OptimizerPlan(RuleId rule, RuleOptions options, const OptimizerTensors& tensors);
  ~OptimizerPlan();

  size_t tensors() const { return rows_.size(); }
  size_t count() const { return count_; }
  RuleId rule() const { return rule_; }
  RuleOptions options() const { return options_; }

  // The gradient of tensor i from now on. Throws InvalidArgument when its count is not the tensor's or its dtype not floating.
  void set_gradient(size_t i, const View& gradient) {
    const Row& row = rows_[i];
    if (gradient.data != row.streams[kGradient].data || gradient.dtype != row.streams[kGradient].dtype ||
        gradient.count != row.count)
      replace_gradient(i, gradient);
  }

  // Throws InvalidArgument before anything is changed.
  OptimizerResult step(const OptimizerCall& call);

 private:
  struct Row {
    Stream streams[kStreams];
    size_t count = 0;
    float* step = nullptr;
    uint32_t scalars = 0;  // which set of scalars is this step's
    uint64_t random = 0;
  };
  struct Chunk {
    uint32_t row, length;
    size_t begin;
  };

  void add_list(const char* what, int stream, const std::vector<View>& list);
  void refuse_shared_memory(const OptimizerTensors& tensors) const;
  void cut();
  void replace_gradient(size_t i, const View& gradient);
  void validate(const OptimizerCall& call) const;
  void prepare(const OptimizerCall& call);
  void measure(double factor, int threads);
  double gradients_squared(int threads);
  Piece piece(const Chunk& chunk) const;
  template <class F>
  void for_chunks(int threads, F f);

  RuleId rule_;
  RuleOptions options_;
  size_t count_ = 0, hypers_ = 0;
  std::vector<Row> rows_;
  std::vector<Chunk> chunks_;
  std::vector<uint32_t> batches_;  // the first chunk of each, and the end
  std::vector<double> scalars_, sums_;
};

// The sum of the squares of all elements, in float64 and in a fixed order; inf or NaN when one is not finite (or, for float64,
// the sum is not). Throws InvalidArgument for other than floating types.
double sum_of_squares(std::span<const View> list, int threads);

// Multiplies all elements in place.
void scale_all(std::span<const View> list, double factor, int threads);

}  // namespace roundel::kernels
