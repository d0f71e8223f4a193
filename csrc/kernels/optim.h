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

  // Of a plan on a GPU: one float32 each in its memory, looked at there in place of the number above; null for none. `stream`
  // is a cudaStream_t.
  const float *grad_scale_at = nullptr, *clip_at = nullptr, *found_inf_at = nullptr;
  void* stream = nullptr;
};

class CudaOptimizer;

class OptimizerPlan {
 public:
  // Throws InvalidArgument, naming list and index, where counts, dtypes or lists do not fit or memory is shared.
  // `device`: the GPU that all memory is on, -1 for the CPU; throws Error when there is none.
  OptimizerPlan(RuleId rule, RuleOptions options, const OptimizerTensors& tensors, int device = -1);
  OptimizerPlan(OptimizerPlan&&) noexcept;
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

  // Throws InvalidArgument before anything is changed. On a GPU it returns when the work is queued, and the result is empty.
  OptimizerResult step(const OptimizerCall& call);

  // Of the last step; on a GPU this waits for it.
  OptimizerResult result() const;
  int device() const { return device_; }

 private:
  void add_list(const char* what, int stream, const std::vector<View>& list);
  void refuse_shared_memory(const OptimizerTensors& tensors) const;
  void cut();
  void replace_gradient(size_t i, const View& gradient);
  void validate(const OptimizerCall& call) const;
  double average_weight(const OptimizerCall& call) const;
  OptimizerResult step_here(const OptimizerCall& call);
  void prepare(const OptimizerCall& call);
  void measure(double factor, int threads);
  double gradients_squared(int threads);
  void prefetch(uint32_t c, int first, int last) const;
  Piece piece(const Chunk& chunk) const;
  template <class F>
  void for_chunks(int threads, F f);

  RuleId rule_;
  RuleOptions options_;
  int device_;
  size_t count_ = 0, hypers_ = 0;
  size_t changed_from_ = 0, changed_to_ = 0;  // rows whose gradients are news to the GPU
  std::vector<Row> rows_;
  std::vector<Chunk> chunks_;
  std::vector<uint32_t> batches_;  // the first chunk of each, and the end
  std::vector<double> scalars_, sums_;
  OptimizerResult last_;
  std::unique_ptr<CudaOptimizer> cuda_;
};

// The sum of the squares of all elements, in float64 and in a fixed order; inf or NaN when one is not finite (or, for float64,
// the sum is not). Throws InvalidArgument for other than floating types. All tensors are on one device; on a GPU this waits.
double sum_of_squares(std::span<const View> list, int threads, int device = -1, void* stream = nullptr);

// Multiplies all elements in place.
void scale_all(std::span<const View> list, double factor, int threads, int device = -1, void* stream = nullptr);

}  // namespace roundel::kernels
