// kernels/optim: every rule and choice on every mixture of types against formulas in float64 of this file's own; the same bits
// on every instruction set and for any number of threads; rounding by chance; skipped steps; refusals.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <thread>

#include "base/error.h"
#include "check.h"
#include "kernels/cuda.h"
#include "kernels/kernels.h"
#include "kernels/optim.h"
#include "kernels/pool.h"
#include "kernels/random_rounding.h"
#include "kernels/rules.h"
#include "kernels/table.h"

using namespace roundel;
using namespace roundel::kernels;

namespace {

std::mt19937_64& engine() {
  static std::mt19937_64 random(77);
  return random;
}

double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine()); }

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

std::vector<double> numbers(size_t count, double low, double high) {
  std::vector<double> all(count);
  for (double& x : all) x = uniform(low, high);
  return all;
}

struct Case {
  RuleId rule;
  RuleOptions options;
  std::vector<double> hyper;
};

RuleOptions options(std::initializer_list<bool RuleOptions::*> chosen) {
  RuleOptions result;
  for (const auto member : chosen) result.*member = true;
  return result;
}

using O = RuleOptions;

std::vector<Case> all_cases() {
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

std::string describe(const Case& c) {
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
const std::vector<Types> kTypes = {{f32, f32, f32},       {f64, f64, f64},
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

Tensors make(const Case& c, const Types& types, const std::vector<size_t>& counts) {
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

std::vector<View> views(const std::vector<Buffer>& list) {
  std::vector<View> all;
  for (const Buffer& buffer : list) all.push_back(buffer.view());
  return all;
}

OptimizerTensors arguments(Tensors& t) {
  OptimizerTensors a;
  a.params = views(t.params);
  a.masters = views(t.masters);
  a.copies = views(t.copies);
  a.averages = views(t.averages);
  for (const auto& list : t.states) a.states.push_back(views(list));
  for (float& step : t.steps) a.steps.push_back({&step, 1, f32});
  return a;
}

OptimizerPlan plan_of(const Case& c, Tensors& t) {
  OptimizerPlan plan(c.rule, c.options, arguments(t));
  for (size_t i = 0; i < t.gradients.size(); ++i) plan.set_gradient(i, t.gradients[i].view());
  return plan;
}

double norm_of(const std::vector<double>& x) {
  double sum = 0;
  for (const double one : x) sum += one * one;
  return std::sqrt(sum);
}

// One step by the published formulas. s: the moments in the order of state_names().
void reference(const Case& c, double t, std::vector<double>& p, std::vector<double> g, std::vector<std::vector<double>>& s) {
  const auto& h = c.hyper;
  const RuleOptions o = c.options;
  const double lr = h[0];
  const size_t n = p.size();
  std::vector<double> update(n);
  double ratio = 1;
  if (o.maximize)
    for (double& x : g) x = -x;
  if (c.rule == RuleId::Lars) {
    const double pn = norm_of(p), gn = norm_of(g);
    if (pn > 0 && gn > 0) ratio = h[4] * pn / (gn + h[2] * pn + h[3]);
  }
  for (size_t i = 0; i < n; ++i) {
    const auto decay = [&](double wd, bool decoupled) {
      if (decoupled)
        p[i] -= lr * wd * p[i];
      else
        g[i] += wd * p[i];
    };
    switch (c.rule) {
      case RuleId::Sgd: {
        decay(h[3], o.keras);
        if (!o.momentum) {
          p[i] -= lr * g[i];
        } else if (o.keras) {
          s[0][i] = h[1] * s[0][i] - lr * g[i];
          p[i] += o.nesterov ? h[1] * s[0][i] - lr * g[i] : s[0][i];
        } else {
          s[0][i] = t == 1 ? g[i] : h[1] * s[0][i] + (1 - h[2]) * g[i];
          p[i] -= lr * (o.nesterov ? g[i] + h[1] * s[0][i] : s[0][i]);
        }
        break;
      }
      case RuleId::Adam: {
        decay(h[4], o.decoupled || o.keras);
        s[0][i] = h[1] * s[0][i] + (1 - h[1]) * g[i];
        s[1][i] = h[2] * s[1][i] + (1 - h[2]) * g[i] * g[i];
        double v = s[1][i];
        if (o.amsgrad) v = s[2][i] = std::max(s[2][i], v);
        const double c1 = 1 - std::pow(h[1], t), c2 = 1 - std::pow(h[2], t);
        p[i] -= o.keras ? lr * std::sqrt(c2) / c1 * s[0][i] / (std::sqrt(v) + h[3])
                        : lr * (s[0][i] / c1) / (std::sqrt(v / c2) + h[3]);
        break;
      }
      case RuleId::RmsProp: {
        decay(h[3], o.keras);
        const size_t average = o.momentum ? 2 : 1;
        s[0][i] = h[1] * s[0][i] + (1 - h[1]) * g[i] * g[i];
        double v = s[0][i];
        if (o.centered) {
          s[average][i] = h[1] * s[average][i] + (1 - h[1]) * g[i];
          v -= s[average][i] * s[average][i];
        }
        const double direction = g[i] / (o.keras ? std::sqrt(v + h[2]) : std::sqrt(v) + h[2]);
        if (!o.momentum) {
          p[i] -= lr * direction;
        } else {
          s[1][i] = h[4] * s[1][i] + (o.keras ? lr : 1) * direction;
          p[i] -= (o.keras ? 1 : lr) * s[1][i];
        }
        break;
      }
      case RuleId::Adagrad: {
        decay(h[2], o.keras);
        s[0][i] += g[i] * g[i];
        p[i] -= lr / (1 + (t - 1) * h[1]) * g[i] / (o.keras ? std::sqrt(s[0][i] + h[3]) : std::sqrt(s[0][i]) + h[3]);
        break;
      }
      case RuleId::Lion: {
        const double direction = h[1] * s[0][i] + (1 - h[1]) * g[i];
        p[i] -= lr * ((direction > 0) - (direction < 0) + h[3] * p[i]);
        s[0][i] = h[2] * s[0][i] + (1 - h[2]) * g[i];
        break;
      }
      case RuleId::Lamb: {
        s[0][i] = h[1] * s[0][i] + (1 - h[1]) * g[i];
        s[1][i] = h[2] * s[1][i] + (1 - h[2]) * g[i] * g[i];
        update[i] = s[0][i] / (1 - std::pow(h[1], t)) / (std::sqrt(s[1][i] / (1 - std::pow(h[2], t))) + h[3]);
        if (o.keras)
          decay(h[4], true);
        else
          update[i] += h[4] * p[i];
        break;
      }
      case RuleId::Lars: {
        const double step = ratio * (g[i] + h[2] * p[i]) * (o.keras ? lr : 1);
        double change = step;
        if (o.momentum) {
          s[0][i] = h[1] * s[0][i] + step;
          change = o.nesterov ? h[1] * s[0][i] + step : s[0][i];
        }
        p[i] -= change * (o.keras ? 1 : lr);
        break;
      }
    }
  }
  if (c.rule == RuleId::Lamb) {
    const double pn = norm_of(p), un = norm_of(update);
    if (pn > 0 && un > 0) ratio = pn / un;
    for (size_t i = 0; i < n; ++i) p[i] -= lr * ratio * update[i];
  }
}

double spacing(DType dtype) { return dtype == f64 ? 1e-13 : dtype == f32 ? 2e-6 : dtype == f16 ? 1.01 / 1024 : 1.01 / 128; }

// As near as the arithmetic allows: float32's rounding a few times, and one of the type that it is stored in.
void check_near(const Case& c, const Types& types, const char* what, const Buffer& got, const std::vector<double>& expected) {
  const std::vector<double> values = got.values();
  const double arithmetic = types.param == f64 ? 1e-13 : 4e-6;
  for (size_t i = 0; i < values.size(); ++i) {
    const double error = std::fabs(values[i] - expected[i]);
    if (error <= spacing(got.dtype()) * std::fabs(expected[i]) + arithmetic) continue;
    test::fail(__FILE__, __LINE__,
               format("%s, %s[%zu] of %zu as %s (gradient %s, master %d): %.9g is not %.9g", describe(c).c_str(), what, i,
                      values.size(), name_of(got.dtype()), name_of(types.gradient), types.master, values[i], expected[i]));
    return;
  }
}

void check_step(const Case& base, const Types& types, const std::vector<size_t>& counts, float step) {
  Case c = base;
  c.options.average = types.average;
  if (types.average) c.hyper.push_back(0.75);
  Tensors t = make(c, types, counts);
  std::fill(t.steps.begin(), t.steps.end(), step);
  const Tensors before = t;
  OptimizerPlan plan = plan_of(c, t);
  OptimizerCall call;
  call.hyper = c.hyper;
  call.grad_scale = 4;
  call.clip = 0.5;
  CHECK(!plan.step(call).skipped);
  for (size_t i = 0; i < counts.size(); ++i) {
    std::vector<double> p = (types.master ? before.masters : before.params)[i].values(), g = before.gradients[i].values();
    for (double& x : g) x *= 0.5 / 4;
    std::vector<std::vector<double>> s;
    for (const auto& list : before.states) s.push_back(list[i].values());
    reference(c, static_cast<double>(step) + 1, p, g, s);
    check_near(c, types, "weight", t.weights()[i], p);
    check_near(c, types, "param", t.params[i], p);
    for (size_t k = 0; k < s.size(); ++k) check_near(c, types, state_names(c.rule, c.options)[k].name, t.states[k][i], s[k]);
    if (types.copy) check_near(c, types, "copy", t.copies[i], p);
    if (types.average) {
      std::vector<double> average = before.averages[i].values();
      for (size_t e = 0; e < average.size(); ++e) average[e] = 0.75 * average[e] + 0.25 * p[e];
      check_near(c, types, "average", t.averages[i], average);
    }
    CHECK_EQ(t.steps[i], step + 1);
  }
}

}  // namespace

TEST(optim_matches_the_formulas_in_float64) {
  for (const Case& c : all_cases())
    for (const Types& types : kTypes)
      for (const float step : {0.0f, 4.0f}) check_step(c, types, {0, 1, 7, 16, 33, 1000}, step);
  check_step(all_cases()[4], kTypes[0], {70001, 3}, 4);  // several chunks
  check_step(all_cases()[12], kTypes[0], {70001, 3}, 4);
}

TEST(optim_same_bits_on_every_isa) {
  for (const Case& base : all_cases())
    for (const Types& types : kTypes)
      for (const bool stochastic : {false, true})
        for (const size_t count : {1, 15, 16, 100, 2050}) {
          Case c = base;
          c.options.average = types.average;
          c.options.stochastic = stochastic && types.param != f64;
          const Tensors made = make(c, types, {count});
          double scalars[kMaxScalars] = {};
          with_rule(c.rule, [&](auto rule) {
            const auto prepared = decltype(rule)::prepare(c.hyper.data(), 5, c.options);
            std::memcpy(scalars, &prepared, sizeof(prepared));
          });
          const auto run = [&](const Table& table, Tensors& t, double* sums) {
            Piece piece;
            piece.streams[types.master ? kOutput : kWeight] = t.params[0].stream();
            if (types.master) piece.streams[kWeight] = t.masters[0].stream();
            if (types.copy) piece.streams[kCopy] = t.copies[0].stream();
            if (types.average) piece.streams[kAverage] = t.averages[0].stream();
            piece.streams[kGradient] = t.gradients[0].stream();
            const auto names = state_names(c.rule, c.options);
            for (size_t k = 0; k < names.size(); ++k) piece.streams[kState + names[k].place] = t.states[k][0].stream();
            piece.count = count;
            piece.factor = 0.3;
            piece.average_weight = 0.25;
            piece.scalars = scalars;
            piece.random = 0x123456789abcdef;
            piece.first = 32768;
            table.measure(c.rule, piece, sums);
            table.update(c.rule, c.options, piece);
          };
          Tensors expected = made;
          double expected_sums[2] = {}, sums[2] = {};
          run(*table_for("portable"), expected, expected_sums);
          for (const Table* table : tables()) {
            Tensors t = made;
            run(*table, t, sums);
            if (!(t == expected) || std::memcmp(sums, expected_sums, sizeof(sums)) != 0)
              test::fail(
                  __FILE__, __LINE__,
                  format("%s on %s, %zu of %s: bits differ", describe(c).c_str(), table->isa, count, name_of(types.param)));
          }
        }
}

TEST(optim_sums_of_squares_have_one_order) {
  for (const DType dtype : {f32, f64, f16, b16})
    for (const size_t count : {0, 1, 7, 8, 16, 17, 5000}) {
      const Buffer x(dtype, numbers(count, -3, 3));
      const double expected = table_for("portable")->squares(dtype, x.data(), count);
      for (const Table* table : tables()) CHECK_EQ(table->squares(dtype, x.data(), count), expected);
      const double norm = norm_of(x.values());
      CHECK(std::fabs(std::sqrt(expected) - norm) <= 1e-12 * norm);
    }
}

TEST(optim_same_bits_for_any_number_of_threads) {
  const std::vector<size_t> counts{70000, 5, 0, 32768, 1, 32769, 16, 200, 100000, 31};
  for (const size_t which : {4, 8, 12, 14})
    for (const Types& types : {kTypes[0], kTypes[2], kTypes[4]}) {
      Case c = all_cases()[which];
      c.options.stochastic = true;
      const Tensors made = make(c, types, counts);
      std::vector<Tensors> results;
      std::vector<double> norms;
      for (const int threads : {1, 2, 3, 7}) {
        Tensors& t = results.emplace_back(made);
        OptimizerPlan plan = plan_of(c, t);
        OptimizerCall call;
        call.hyper = c.hyper;
        call.max_norm = 1;
        call.seed = 9;
        call.threads = threads;
        for (int step = 0; step < 3; ++step) norms.push_back(plan.step(call).norm);
      }
      for (size_t r = 1; r < results.size(); ++r) {
        CHECK(results[r] == results[0]);
        CHECK(std::memcmp(&norms[3 * r], &norms[0], 3 * sizeof(double)) == 0);
      }
      CHECK(!(results[0] == made));
    }
}

TEST(optim_rounds_by_chance_without_bias) {
  constexpr uint32_t count = 200000;
  for (const DType dtype : {f16, b16})
    for (const float x : {1.0003f, -1.7f, 3.1e-6f, -2e-8f, 0.0f, 1000.3f, 6.0e-5f, 6.2e-5f}) {
      const float bound = std::fabs(x) * (dtype == f16 ? 1 / 1024.0f : 1 / 128.0f) + (dtype == f16 ? 6e-8f : 0);
      double sum = 0, squares = 0;
      const uint64_t key = random_key(3, 5, 7);
      for (uint32_t i = 0; i < count; ++i) {
        const float rounded = rounded_by_chance(x, dtype, random_bits_of(random_bits(key, i), kWeight));
        uint16_t half;
        float back;
        cast(dtype, &half, f32, &rounded, 1);
        cast(f32, &back, dtype, &half, 1);
        if (back != rounded || std::fabs(rounded - x) > bound) {
          test::fail(__FILE__, __LINE__, format("%g becomes %g as %s", x, rounded, name_of(dtype)));
          break;
        }
        sum += rounded - x;
        squares += (rounded - x) * (rounded - x);
      }
      CHECK(std::fabs(sum) <= 5 * std::sqrt(squares) + 1e-3 * bound * count);
    }
  for (const float x : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(), 1e30f, 65504.0f})
    CHECK_EQ(rounded_by_chance(x, f16, 0xffffffffu), x);
  CHECK(std::isnan(rounded_by_chance(std::nanf(""), b16, 0xffffffffu)));
  CHECK_EQ(rounded_by_chance(std::numeric_limits<float>::infinity(), b16, 0xffffffffu), std::numeric_limits<float>::infinity());
}

// bfloat16 weights of 1 that lose 1/4096 of their spacing in every step: to nearest they never move, by chance they do on
// average.
TEST(optim_small_steps_are_not_lost_by_chance) {
  Case c{RuleId::Sgd, {}, {std::ldexp(1.0, -17), 0, 0, 0}};
  const std::vector<double> ones(4096, 1.0);
  double mean[2] = {};
  std::vector<Tensors> same_seed;
  for (const uint64_t seed : {0u, 1u, 1u, 2u}) {
    c.options.stochastic = seed != 0;
    Tensors t;
    t.params.emplace_back(b16, ones);
    t.gradients.emplace_back(b16, ones);
    t.steps = {0};
    OptimizerPlan plan = plan_of(c, t);
    OptimizerCall call;
    call.hyper = c.hyper;
    call.seed = seed;
    for (int i = 0; i < 256; ++i) plan.step(call);
    double sum = 0;
    for (const double x : t.params[0].values()) sum += x;
    mean[seed != 0] = sum / 4096;
    same_seed.push_back(t);
  }
  CHECK_EQ(mean[0], 1.0);
  CHECK(std::fabs(mean[1] - (1 - std::ldexp(256.0, -17))) < 2e-4);
  CHECK(same_seed[1] == same_seed[2]);
  CHECK(!(same_seed[2] == same_seed[3]));
}

TEST(optim_skipped_steps_change_nothing) {
  for (const size_t which : {1, 4, 8, 12})
    for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
      const Case c = all_cases()[which];
      Tensors t = make(c, kTypes[4], {33, 70000, 1});
      const Tensors before = t;
      OptimizerPlan plan = plan_of(c, t);
      OptimizerCall call;
      call.hyper = c.hyper;
      call.found_inf = true;
      CHECK(plan.step(call).skipped);
      CHECK(t == before);
      call.found_inf = false;
      std::vector<double> values = t.gradients[1].values();
      values[69999] = bad;
      const Buffer poisoned(f16, values);
      plan.set_gradient(1, poisoned.view());
      call.check_finite = true;
      CHECK(plan.step(call).skipped);
      CHECK(t == before);
      plan.set_gradient(1, t.gradients[1].view());
      CHECK(!plan.step(call).skipped);
      CHECK(!(t == before));
    }
}

TEST(optim_clips_the_norm_of_all_gradients) {
  const Case c{RuleId::Sgd, {}, {1, 0, 0, 0}};
  Tensors t = make(c, kTypes[0], {3, 40000, 0, 17});
  const Tensors before = t;
  double squares = 0;
  for (const Buffer& g : t.gradients) squares += std::pow(norm_of(g.values()), 2);
  OptimizerPlan plan = plan_of(c, t);
  OptimizerCall call;
  call.hyper = c.hyper;
  call.grad_scale = 8;
  call.max_norm = 2;
  const double norm = std::sqrt(squares) / 8;
  const OptimizerResult result = plan.step(call);
  CHECK(std::fabs(result.norm - norm) < 1e-9 * norm);
  CHECK(norm > 2);
  const double factor = 2 / (norm + 1e-6) / 8;
  const auto p = before.params[1].values(), g = t.gradients[1].values(), now = t.params[1].values();
  double worst = 0;
  for (size_t i = 0; i < p.size(); ++i) worst = std::max(worst, std::fabs(now[i] - (p[i] - factor * g[i])));
  CHECK(worst < 1e-6);
  call.max_norm = 1e9;  // nothing to clip: as if it were not asked for
  Tensors other = before;
  OptimizerPlan unclipped = plan_of(c, other), plain_plan = plan_of(c, t = before);
  unclipped.step(call);
  call.max_norm = 0;
  plain_plan.step(call);
  CHECK(other == t);

  const std::vector<View> list = views(before.gradients);
  CHECK(std::fabs(std::sqrt(sum_of_squares(list, 2)) - std::sqrt(squares)) < 1e-9 * std::sqrt(squares));
  CHECK_EQ(sum_of_squares(list, 1), sum_of_squares(list, 7));
  Tensors scaled = before;
  scale_all(views(scaled.gradients), 0.5, 2);
  CHECK_EQ(scaled.gradients[1].values()[39999], g[39999] / 2);
}

TEST(optim_follows_gradients_that_move) {
  const Case c{RuleId::Sgd, {}, {1, 0, 0, 0}};
  Tensors t = make(c, kTypes[0], {5});
  OptimizerPlan plan = plan_of(c, t);
  OptimizerCall call;
  call.hyper = c.hyper;
  const Buffer zero(f16, std::vector<double>(5, 0.0));
  const Tensors before = t;
  plan.set_gradient(0, zero.view());
  plan.step(call);
  CHECK(t.params[0] == before.params[0]);
  plan.set_gradient(0, before.gradients[0].view());
  plan.step(call);
  CHECK(!(t.params[0] == before.params[0]));
}

TEST(optim_norms_of_zero_leave_the_length_alone) {
  for (const RuleId rule : {RuleId::Lamb, RuleId::Lars}) {
    const Case c{rule, {}, {0.5, 0, 0, 1e-8, 0}};
    Tensors t;
    t.params.emplace_back(f32, std::vector<double>{0, 0});
    t.gradients.emplace_back(f32, std::vector<double>{3, -4});
    for (const auto& name : state_names(rule, {}))
      (void)name, t.states.emplace_back().emplace_back(f32, std::vector<double>{0, 0});
    t.steps = {0};
    OptimizerPlan plan = plan_of(c, t);
    OptimizerCall call;
    call.hyper = c.hyper;
    plan.step(call);
    const std::vector<double> expected = rule == RuleId::Lars ? std::vector<double>{-1.5, 2} : std::vector<double>{-0.5, 0.5};
    CHECK(std::fabs(t.params[0].values()[0] - expected[0]) < 1e-5);
    CHECK(std::fabs(t.params[0].values()[1] - expected[1]) < 1e-5);
  }
}

TEST(optim_refuses_what_does_not_fit) {
  const Case adam{RuleId::Adam, {}, {0.1, 0.9, 0.99, 1e-8, 0}};
  Tensors t = make(adam, kTypes[0], {4, 5});
  const auto made = [&](auto change) {
    OptimizerTensors a = arguments(t);
    change(a);
    OptimizerPlan plan(RuleId::Adam, {}, a);
  };
  made([](OptimizerTensors&) {});
  CHECK_THROWS(made([](OptimizerTensors& a) { a.states.pop_back(); }), InvalidArgument);
  CHECK_THROWS(made([](OptimizerTensors& a) { a.states[1].pop_back(); }), InvalidArgument);
  CHECK_THROWS(made([](OptimizerTensors& a) { a.states[1][0].count = 3; }), InvalidArgument);
  CHECK_THROWS(made([](OptimizerTensors& a) { a.params[1].dtype = DType::Int32; }), InvalidArgument);
  CHECK_THROWS(made([](OptimizerTensors& a) { a.params[1].dtype = b16; }), InvalidArgument);
  CHECK_THROWS(made([](OptimizerTensors& a) { a.steps.clear(); }), InvalidArgument);
  CHECK_THROWS(made([](OptimizerTensors& a) { a.steps[0].dtype = f64; }), InvalidArgument);
  CHECK_THROWS(made([](OptimizerTensors& a) { a.states[0] = a.params; }), InvalidArgument);  // the same memory
  CHECK_THROWS(made([](OptimizerTensors& a) { a.averages = a.params; }), InvalidArgument);   // not asked for
  CHECK_THROWS(made([](OptimizerTensors& a) { a.params[1].data = a.params[0].at(3); }), InvalidArgument);
  CHECK_THROWS(rule_named("adamw2"), InvalidArgument);
  if (cuda_status().find("device 0") == std::string::npos)
    CHECK_THROWS(OptimizerPlan(RuleId::Adam, {}, arguments(t), 0), Error);  // no GPU

  const Tensors before = t;
  OptimizerPlan plan(RuleId::Adam, {}, arguments(t));
  OptimizerCall call;
  call.hyper = adam.hyper;
  CHECK_THROWS(plan.step(call), InvalidArgument);  // no gradients yet
  View wrong = t.gradients[0].view();
  wrong.count = 3;
  CHECK_THROWS(plan.set_gradient(0, wrong), InvalidArgument);
  CHECK_THROWS(plan.set_gradient(0, t.params[0].view()), InvalidArgument);
  for (size_t i = 0; i < 2; ++i) plan.set_gradient(i, t.gradients[i].view());
  call.hyper = call.hyper.first(4);
  CHECK_THROWS(plan.step(call), InvalidArgument);
  call.hyper = adam.hyper;
  call.grad_scale = 0;
  CHECK_THROWS(plan.step(call), InvalidArgument);
  CHECK(t == before);
}

namespace {

bool all_once(size_t items, int threads) {
  std::vector<std::atomic<int>> taken(items);
  parallel_for(items, threads, [&](size_t i) { ++taken[i]; });
  return std::all_of(taken.begin(), taken.end(), [](const std::atomic<int>& n) { return n == 1; });
}

}  // namespace

TEST(pool_takes_every_item_once) {
  for (const size_t items : {0, 1, 2, 3, 1000})
    for (const int threads : {1, 2, 3, 7}) CHECK(all_once(items, threads));
  std::vector<std::thread> callers;  // at the same time
  std::atomic<int> good{0};
  for (int t = 0; t < 4; ++t)
    callers.emplace_back([&] {
      for (int i = 0; i < 50; ++i) good += all_once(100, 3);
    });
  for (std::thread& caller : callers) caller.join();
  CHECK_EQ(good.load(), 200);
}

TEST(forked_child_makes_threads_of_its_own) {  // its parent's it has not
  CHECK(all_once(1000, 3));
  const pid_t child = ::fork();
  if (child == 0) ::_exit(all_once(1000, 3) ? 0 : 1);
  int status = -1;
  ::waitpid(child, &status, 0);
  CHECK_EQ(status, 0);
}
