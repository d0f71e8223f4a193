// What the optimizers' tests share: tensors of any types with a plan over them, and the list of all rules and choices.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "kernels/kernels.h"
#include "kernels/optim.h"

namespace roundel::optim_test {

using namespace kernels;

inline std::mt19937_64& engine() {
  static std::mt19937_64 random(77);
  return random;
}

inline double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine()); }

// Elements of one floating type at an address that is aligned to the element and to nothing more.
class Buffer {
 public:
  Buffer(DType dtype, size_t count) : dtype_(dtype), count_(count), bytes_(count * size_of(dtype) + 128, std::byte{0x5a}) {}
  Buffer(DType dtype, const std::vector<double>& values) : Buffer(dtype, values.size()) {
    cast(dtype, data(), DType::Float64, values.data(), count_);
  }
  Buffer(const Buffer& other) : Buffer(other.dtype_, other.count_) { std::memcpy(data(), other.data(), bytes()); }
  Buffer& operator=(const Buffer& other) {
    dtype_ = other.dtype_;
    count_ = other.count_;
    bytes_.resize(other.bytes_.size());
    std::memcpy(data(), other.data(), bytes());
    return *this;
  }

  std::byte* data() const {
    auto* start = const_cast<std::byte*>(bytes_.data());
    return start + (64 - reinterpret_cast<uintptr_t>(start) % 64) % 64 + size_of(dtype_);
  }
  size_t bytes() const { return count_ * size_of(dtype_); }
  DType dtype() const { return dtype_; }
  View view() const { return {data(), count_, dtype_}; }
  Stream stream() const { return {data(), dtype_}; }
  std::vector<double> values() const {
    std::vector<double> all(count_);
    cast(DType::Float64, all.data(), dtype_, data(), count_);
    return all;
  }
  bool operator==(const Buffer& other) const { return std::memcmp(data(), other.data(), bytes()) == 0; }

 private:
  DType dtype_;
  size_t count_;
  std::vector<std::byte> bytes_;
};

inline std::vector<double> numbers(size_t count, double low, double high) {
  std::vector<double> all(count);
  for (double& x : all) x = uniform(low, high);
  return all;
}

struct Case {
  RuleId rule;
  RuleOptions options;
  std::vector<double> hyper;
};

inline RuleOptions options(std::initializer_list<bool RuleOptions::*> chosen) {
  RuleOptions result;
  for (const auto member : chosen) result.*member = true;
  return result;
}

using O = RuleOptions;

inline std::vector<Case> all_cases() {
  const std::vector<double> sgd{0.1, 0.9, 0.3, 0.05}, adam{0.01, 0.9, 0.99, 1e-3, 0.05}, rms{0.01, 0.97, 1e-3, 0.05, 0.9},
      adagrad{0.1, 0.01, 0.05, 1e-3}, lion{0.01, 0.9, 0.99, 0.1}, lamb{0.01, 0.4, 0.99, 1e-3, 0.05},
      lars{0.1, 0.9, 0.05, 1e-8, 0.02};
  std::vector<Case> cases;
  for (const bool keras : {false, true}) {
    const size_t first = cases.size();
    cases.push_back({RuleId::Sgd, {}, sgd});
    cases.push_back({RuleId::Sgd, options({&O::momentum}), sgd});
    cases.push_back({RuleId::Sgd, options({&O::momentum, &O::nesterov, &O::maximize}), sgd});
    cases.push_back({RuleId::Adam, {}, adam});
    cases.push_back({RuleId::Adam, options({&O::decoupled}), adam});
    cases.push_back({RuleId::Adam, options({&O::decoupled, &O::amsgrad, &O::maximize}), adam});
    cases.push_back({RuleId::RmsProp, {}, rms});
    cases.push_back({RuleId::RmsProp, options({&O::centered}), rms});
    cases.push_back({RuleId::RmsProp, options({&O::centered, &O::momentum}), rms});
    cases.push_back({RuleId::RmsProp, options({&O::momentum}), rms});
    cases.push_back({RuleId::Adagrad, {}, adagrad});
    cases.push_back({RuleId::Lion, {}, lion});
    cases.push_back({RuleId::Lamb, {}, lamb});
    cases.push_back({RuleId::Lars, {}, lars});
    cases.push_back({RuleId::Lars, options({&O::momentum}), lars});
    cases.push_back({RuleId::Lars, options({&O::momentum, &O::nesterov}), lars});
    for (size_t i = first; i < cases.size(); ++i) cases[i].options.keras = keras;
  }
  return cases;
}

inline std::string describe(const Case& c) {
  const RuleOptions o = c.options;
  return format("%s%s%s%s%s%s%s%s", name_of(c.rule), o.keras ? " keras" : "", o.momentum ? " momentum" : "",
                o.nesterov ? " nesterov" : "", o.amsgrad ? " amsgrad" : "", o.centered ? " centered" : "",
                o.decoupled ? " decoupled" : "", o.maximize ? " maximize" : "");
}

// The types of the streams; `master` says that float32 masters are behind the params.
struct Types {
  DType param, gradient, state;
  bool master = false, copy = false, average = false;
};

constexpr DType f32 = DType::Float32, f64 = DType::Float64, f16 = DType::Float16, b16 = DType::BFloat16;
inline const std::vector<Types> kTypes = {{f32, f32, f32},       {f64, f64, f64},
                                          {b16, b16, b16},       {f16, f16, f32},
                                          {f16, f16, f32, true}, {b16, b16, b16, true, true, true},
                                          {f32, b16, f32},       {f32, f32, b16, false, true, true},
                                          {f32, f64, f32}};

struct Tensors {
  std::vector<Buffer> params, masters, copies, averages, gradients;
  std::vector<std::vector<Buffer>> states;
  std::vector<float> steps;

  std::vector<Buffer>& weights() { return masters.empty() ? params : masters; }
  std::vector<const std::vector<Buffer>*> lists() const {
    std::vector<const std::vector<Buffer>*> all{&params, &masters, &copies, &averages};
    for (const auto& list : states) all.push_back(&list);
    return all;
  }
  bool operator==(const Tensors& other) const {
    const auto a = lists(), b = other.lists();
    for (size_t k = 0; k < a.size(); ++k)
      if (!(*a[k] == *b[k])) return false;
    return steps == other.steps;
  }
};

inline Tensors make(const Case& c, const Types& types, const std::vector<size_t>& counts) {
  Tensors t;
  const auto names = state_names(c.rule, c.options);
  t.states.resize(names.size());
  for (const size_t count : counts) {
    const std::vector<double> weights = numbers(count, -2, 2);
    t.params.emplace_back(types.param, weights);
    if (types.master) t.masters.emplace_back(f32, weights);
    if (types.copy) t.copies.emplace_back(f16, count);
    if (types.average) t.averages.emplace_back(types.state, weights);
    t.gradients.emplace_back(types.gradient, numbers(count, -1, 1));
    for (auto& list : t.states) list.emplace_back(types.state, numbers(count, 0.1, 1));
    t.steps.push_back(4);
  }
  for (size_t k = 0; k < names.size(); ++k)  // centered: the mean's square stays below the mean square
    if (names[k].name == std::string("grad_avg"))
      for (size_t i = 0; i < counts.size(); ++i) std::memset(t.states[k][i].data(), 0, t.states[k][i].bytes());
  return t;
}

inline std::vector<View> views(const std::vector<Buffer>& list) {
  std::vector<View> all;
  for (const Buffer& buffer : list) all.push_back(buffer.view());
  return all;
}

inline OptimizerTensors arguments(Tensors& t) {
  OptimizerTensors a;
  a.params = views(t.params);
  a.masters = views(t.masters);
  a.copies = views(t.copies);
  a.averages = views(t.averages);
  for (const auto& list : t.states) a.states.push_back(views(list));
  for (float& step : t.steps) a.steps.push_back({&step, 1, f32});
  return a;
}

inline OptimizerPlan plan_of(const Case& c, Tensors& t) {
  OptimizerPlan plan(c.rule, c.options, arguments(t));
  for (size_t i = 0; i < t.gradients.size(); ++i) plan.set_gradient(i, t.gradients[i].view());
  return plan;
}

inline double norm_of(const std::vector<double>& x) {
  double sum = 0;
  for (const double one : x) sum += one * one;
  return std::sqrt(sum);
}

}  // namespace roundel::optim_test
