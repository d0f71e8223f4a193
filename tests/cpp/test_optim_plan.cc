// kernels/optim: what a plan does around the rules: the same bits for any number of threads, rounding by chance, skipped steps,
// clipping, gradients that move, refusals; and the threads.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <thread>

#include "base/clock.h"
#include "kernels/cuda.h"
#include "kernels/pool.h"
#include "kernels/random_rounding.h"
#include "optim.h"

using namespace roundel;
using namespace roundel::kernels;
using namespace roundel::optim_test;

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
    for (const int threads : {1, 2, 3, 7, 100}) CHECK(all_once(items, threads));
  std::vector<std::thread> callers;  // at the same time
  std::atomic<int> good{0};
  for (int t = 0; t < 4; ++t)
    callers.emplace_back([&] {
      for (int i = 0; i < 50; ++i) good += all_once(100, 3);
    });
  for (std::thread& caller : callers) caller.join();
  CHECK_EQ(good.load(), 200);
}

TEST(pool_does_not_wait_for_a_slow_threads_share) {
  std::atomic<int> done{0};
  bool others_did_the_rest = false;
  parallel_for(100, 2, [&](size_t i) {
    const auto limit = Clock::now() + std::chrono::seconds(20);
    while (i == 0 && done < 99 && Clock::now() < limit) std::this_thread::yield();
    if (i == 0) others_did_the_rest = done == 99;
    ++done;
  });
  CHECK(others_did_the_rest);
}

TEST(forked_child_makes_threads_of_its_own) {  // its parent's it has not
  CHECK(all_once(1000, 3));
  const pid_t child = ::fork();
  if (child == 0) ::_exit(all_once(1000, 3) ? 0 : 1);
  int status = -1;
  ::waitpid(child, &status, 0);
  CHECK_EQ(status, 0);
}
