// The optimizers on the device: every rule against the CPU's, skipped steps, a captured graph; and how long steps take.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "gpu_check.h"
#include "kernels/kernels.h"
#include "kernels/optim.h"

using namespace roundel;
using namespace roundel::test;
using namespace roundel::kernels;

namespace {

constexpr DType f32 = DType::Float32, f64 = DType::Float64, f16 = DType::Float16, b16 = DType::BFloat16;

struct Types {
  DType param, gradient, state;
  bool master;
};

// Tensors in both memories: `host` is what the CPU's plan works on, `device` begins as a copy of it.
class Twin {
 public:
  Twin(DType dtype, size_t count, double low, double high)
      : dtype_(dtype), count_(count), host_(count * size_of(dtype) + 16), device_(host_.size()) {
    static std::mt19937_64 random(5);
    std::vector<double> values(count);
    for (double& x : values) x = std::uniform_real_distribution<double>(low, high)(random);
    cast(dtype, host_.data(), f64, values.data(), count);
    must(cudaMemcpy(device_.get(), host_.data(), host_.size(), cudaMemcpyHostToDevice));
  }
  View host() { return {host_.data(), count_, dtype_}; }
  View device() const { return {device_.get(), count_, dtype_}; }

  // How far the device's values are from the host's, in units of what rounding may do.
  double distance() {
    std::vector<std::byte> got(host_.size());
    must(cudaMemcpy(got.data(), device_.get(), got.size(), cudaMemcpyDeviceToHost));
    std::vector<double> a(count_), b(count_);
    cast(f64, a.data(), dtype_, got.data(), count_);
    cast(f64, b.data(), dtype_, host_.data(), count_);
    const double spacing = dtype_ == f64 ? 1e-12 : dtype_ == f32 ? 1e-5 : dtype_ == f16 ? 1 / 512.0 : 1 / 64.0;
    double worst = 0;
    for (size_t i = 0; i < count_; ++i) {
      const double error = std::fabs(a[i] - b[i]) / (spacing * std::fabs(b[i]) + (dtype_ == f64 ? 1e-12 : 1e-5));
      worst = error >= worst || std::isnan(error) ? error : worst;
    }
    return worst;
  }

 private:
  DType dtype_;
  size_t count_;
  std::vector<std::byte> host_;
  DeviceBuffer device_;
};

struct Job {
  RuleId rule;
  RuleOptions options;
  std::vector<double> hyper;
  std::vector<std::unique_ptr<Twin>> params, masters, gradients, steps;
  std::vector<std::vector<std::unique_ptr<Twin>>> states;

  Job(RuleId rule, RuleOptions options, std::vector<double> hyper, Types types, const std::vector<size_t>& counts)
      : rule(rule), options(options), hyper(std::move(hyper)), states(state_names(rule, options).size()) {
    for (const size_t count : counts) {
      params.push_back(std::make_unique<Twin>(types.param, count, -2, 2));
      if (types.master) masters.push_back(std::make_unique<Twin>(f32, count, -2, 2));
      gradients.push_back(std::make_unique<Twin>(types.gradient, count, -1, 1));
      for (auto& list : states)  // centered: the square of the mean stays below the mean square
        list.push_back(
            std::make_unique<Twin>(types.state, count, &list == &states[0] ? 0.6 : 0, &list == &states[0] ? 1 : 0.5));
      steps.push_back(std::make_unique<Twin>(f32, 1, 0, 0));
    }
  }

  template <class Side>
  OptimizerPlan plan(Side side, int device) {
    const auto all = [&](auto& list) {
      std::vector<View> views;
      for (auto& twin : list) views.push_back(side(*twin));
      return views;
    };
    OptimizerTensors tensors;
    tensors.params = all(params);
    tensors.masters = all(masters);
    tensors.steps = all(steps);
    for (auto& list : states) tensors.states.push_back(all(list));
    OptimizerPlan plan(rule, options, tensors, device);
    for (size_t i = 0; i < gradients.size(); ++i) plan.set_gradient(i, side(*gradients[i]));
    return plan;
  }
  OptimizerPlan on_host() {
    return plan([](Twin& t) { return t.host(); }, -1);
  }
  OptimizerPlan on_device() {
    return plan([](Twin& t) { return t.device(); }, 0);
  }

  double distance() {
    double worst = 0;
    const auto look = [&](auto& list) {
      for (auto& twin : list)
        if (const double one = twin->distance(); !(one <= worst)) worst = one;  // a NaN, too
    };
    look(params);
    look(masters);
    look(steps);
    for (auto& list : states) look(list);
    return worst;
  }
};

void check_rule(RuleId rule, RuleOptions options, const std::vector<double>& hyper, Types types) {
  Job job(rule, options, hyper, types, {0, 1, 7, 4099, 40000, 16});
  OptimizerPlan host = job.on_host(), device = job.on_device();
  OptimizerCall call;
  call.hyper = job.hyper;
  call.grad_scale = 4;
  call.max_norm = 3;
  for (int step = 0; step < 3; ++step) {
    const OptimizerResult expected = host.step(call);
    device.step(call);
    const OptimizerResult got = device.result();
    if (!(std::fabs(got.norm - expected.norm) <= 1e-12 * expected.norm) || got.skipped || !(job.distance() <= 1))
      fail(__FILE__, __LINE__,
           format("%s of %s, gradients %s, step %d: norm %.17g and %.17g, %g off", name_of(rule), name_of(types.param),
                  name_of(types.gradient), step, got.norm, expected.norm, job.distance()));
  }
  call.found_inf = true;
  device.step(call);
  CHECK(device.result().skipped);
  CHECK(job.distance() <= 1);
}

void check_graph() {
  Job job(RuleId::Adam, {}, {0.01, 0.9, 0.99, 1e-8, 0.1}, {f32, f32, f32, false}, {1000, 70000});
  OptimizerPlan host = job.on_host(), device = job.on_device();
  cudaStream_t stream;
  must(cudaStreamCreate(&stream));
  OptimizerCall call;
  call.hyper = job.hyper;
  call.stream = stream;
  device.step(call);  // the table and the numbers are in place now
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  device.step(call);
  must(cudaStreamEndCapture(stream, &graph));
  must(cudaGraphInstantiate(&executable, graph, 0));
  for (int i = 0; i < 3; ++i) must(cudaGraphLaunch(executable, stream));
  must(cudaStreamSynchronize(stream));
  for (int i = 0; i < 4; ++i) host.step(call);
  CHECK(job.distance() <= 1);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

}  // namespace

void test::check_optimizers() {
  const Types types[] = {
      {f32, f32, f32, false}, {f64, f64, f64, false}, {b16, b16, b16, false}, {f16, f16, f32, true}, {b16, f32, b16, true}};
  for (const Types& one : types)
    for (const bool keras : {false, true}) {
      RuleOptions plain, momentum, all;
      plain.keras = momentum.keras = all.keras = keras;
      momentum.momentum = true;
      all.momentum = all.centered = all.amsgrad = all.decoupled = all.maximize = true;
      for (const RuleOptions& options : {plain, momentum}) {
        check_rule(RuleId::Sgd, options, {0.1, 0.9, 0.3, 0.05}, one);
        check_rule(RuleId::Lars, options, {0.1, 0.9, 0.05, 1e-8, 0.02}, one);
      }
      for (const RuleOptions& options : {plain, all}) {
        check_rule(RuleId::Adam, options, {0.01, 0.9, 0.99, 1e-3, 0.05}, one);
        check_rule(RuleId::RmsProp, options, {0.01, 0.97, 1e-3, 0.05, 0.9}, one);
      }
      check_rule(RuleId::Adagrad, plain, {0.1, 0.01, 0.05, 1e-3}, one);
      check_rule(RuleId::Lamb, plain, {0.01, 0.9, 0.99, 1e-3, 0.05}, one);
    }
  check_rule(RuleId::Lion, {}, {0.01, 0.9, 0.99, 0.1}, types[0]);
  check_graph();
}

void test::write_optimizer_timings(const char* path, const char* device) {
  std::FILE* file = std::fopen(path, "w");
  if (file == nullptr) throw Error(std::string("cannot write ") + path);
  std::fprintf(file, "{\"schema\": 1, \"benchmark\": \"cuda_adamw\", \"device\": \"%s\", \"rows\": [", device);
  RuleOptions adamw;
  adamw.decoupled = true;
  const char* separator = "";
  struct Shape {
    const char* name;
    Types types;
    size_t tensors, count;
    double max_norm;
    size_t bytes;  // moved per element
  };
  const Shape shapes[] = {{"float32, one tensor", {f32, f32, f32, false}, 1, 100000000, 0, 28},
                          {"whole mixed step, one tensor", {f16, f16, f32, true}, 1, 100000000, 1, 30},
                          {"float32, 1,000 tensors", {f32, f32, f32, false}, 1000, 10000, 0, 28},
                          {"float32, 1,000 small tensors", {f32, f32, f32, false}, 1000, 16, 0, 28}};
  for (const Shape& shape : shapes) {
    Job job(RuleId::Adam, adamw, {1e-3, 0.9, 0.999, 1e-8, 0.01}, shape.types, std::vector<size_t>(shape.tensors, shape.count));
    OptimizerPlan plan = job.on_device();
    OptimizerCall call;
    call.hyper = job.hyper;
    call.max_norm = shape.max_norm;
    const double step = best_seconds([&] { plan.step(call); });
    const size_t bytes = shape.tensors * shape.count * shape.bytes;
    const DeviceBuffer from(bytes / 2), to(bytes / 2);
    const double copy = best_seconds([&] { must(cudaMemcpyAsync(to.get(), from.get(), bytes / 2, cudaMemcpyDeviceToDevice)); });
    std::fprintf(file,
                 "%s\n  {\"what\": \"%s\", \"tensors\": %zu, \"count\": %zu, \"bytes_moved\": %zu, \"time_us\": %.3f, "
                 "\"GBs\": %.1f, \"copy_time_us\": %.3f, \"percent_of_copy\": %.1f}",
                 separator, shape.name, shape.tensors, shape.count, bytes, step * 1e6, bytes / step * 1e-9, copy * 1e6,
                 100 * copy / step);
    separator = ",";
  }
  std::fprintf(file, "\n]}\n");
  std::fclose(file);
}
