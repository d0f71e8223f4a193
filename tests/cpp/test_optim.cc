// kernels/optim: every rule and choice on every mixture of types against formulas in float64 of this file's own, and the same
// bits on every instruction set.
#include <algorithm>

#include "kernels/rules.h"
#include "kernels/table.h"
#include "optim.h"

using namespace roundel;
using namespace roundel::kernels;
using namespace roundel::optim_test;

namespace {

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
        if (o.keras) decay(h[4], true);
        s[0][i] = h[1] * s[0][i] + (1 - h[1]) * g[i];
        s[1][i] = h[2] * s[1][i] + (1 - h[2]) * g[i] * g[i];
        update[i] = s[0][i] / (1 - std::pow(h[1], t)) / (std::sqrt(s[1][i] / (1 - std::pow(h[2], t))) + h[3]) +
                    (o.keras ? 0 : h[4]) * p[i];
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

// Where Adam divides a root without dividing: from the least number to infinity, by all that a bias correction can be.
TEST(optim_divides_roots_of_anything_alike_on_every_isa) {
  constexpr size_t count = 4099;
  std::vector<float> moments(count);
  for (float& v : moments) {
    const auto bits = static_cast<uint32_t>(uniform(0, 0x7f800000));
    std::memcpy(&v, &bits, sizeof(v));
  }
  const float ends[] = {0, 1e-45f, 1.2e-38f, 1, 3.4e38f, INFINITY};
  std::copy(std::begin(ends), std::end(ends), moments.begin());
  for (const double beta2 : {0.0, 0.5, 0.999, 0.9999999, 1 - 1e-15, 1 - 1e-16, 1.0})
    for (const double step : {1.0, 2.0, 1000.0, 1e7}) {
      const double hyper[] = {0.01, 0.9, beta2, 0, 0};
      const auto prepared = Adam::prepare(hyper, step, {});
      double scalars[kMaxScalars] = {};
      std::memcpy(scalars, &prepared, sizeof(prepared));
      const auto run = [&](const Table& table) {
        std::vector<float> weight(count, 0), gradient(count, 0), first(count, 1), second = moments;
        Piece piece;
        piece.streams[kWeight].data = weight.data();
        piece.streams[kGradient].data = gradient.data();
        piece.streams[kState].data = first.data();
        piece.streams[kState + 1].data = second.data();
        piece.count = count;
        piece.scalars = scalars;
        table.update(RuleId::Adam, {}, piece);
        return weight;
      };
      const std::vector<float> expected = run(*table_for("portable"));
      for (const Table* table : tables()) {
        const std::vector<float> weight = run(*table);
        for (size_t i = 0; i < count; ++i)
          if (std::memcmp(&weight[i], &expected[i], sizeof(float)) != 0) {
            test::fail(
                __FILE__, __LINE__,
                format("%s, beta2 %.17g, step %g: a moment of %g gives %.9g, not %.9g", table->isa, beta2, step,
                       static_cast<double>(moments[i]), static_cast<double>(weight[i]), static_cast<double>(expected[i])));
            break;
          }
      }
    }
}

TEST(optim_sums_of_squares_have_one_order) {
  for (const DType dtype : {f32, f64, f16, b16})
    for (const size_t count : {0, 1, 7, 8, 16, 17, 31, 32, 33, 67, 5000}) {
      std::vector<double> values = numbers(count, -3, 3);
      for (size_t i = 0; i < count; i += 5) values[i] *= dtype == f16 ? 1e-6 : 1e-25;  // a square that float32 does not have
      const Buffer x(dtype, values);
      const double expected = table_for("portable")->squares(dtype, x.data(), count);
      for (const Table* table : tables()) CHECK_EQ(table->squares(dtype, x.data(), count), expected);
      const double norm = norm_of(x.values());
      CHECK(std::fabs(std::sqrt(expected) - norm) <= 1e-12 * norm);
    }
}
