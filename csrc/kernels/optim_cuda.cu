// Optimizer steps on the device: the rules of rules.h, a table of tensors in device memory, no wait of the host for anything.
//
// A step is `decide` (what the gradients are multiplied by, and whether to step at all), `prepare` (step numbers and scalars of
// every tensor) and `update` (one pass over all streams); before them `square` where the gradients' norm is wanted, and
// `measure` and `adapt` before the update of LAMB and LARS.
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <string>

#include "base/error.h"
#include "kernels/optim_cuda.h"
#include "kernels/optim_kernels.cuh"

namespace roundel::kernels {

namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw Error(format("[cuda] %s: %s", what, cudaGetErrorString(status)));
}

class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

// An array in device memory. Copies from pageable memory have left it when the call returns.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), (count + 1) * sizeof(T)), "cudaMalloc");
  }
  explicit DeviceArray(const std::vector<T>& from) : DeviceArray(from.size()) {
    check(cudaMemcpy(data_, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* get() const { return data_; }
  void put(const T* from, size_t first, size_t count, cudaStream_t stream) {
    check(cudaMemcpyAsync(data_ + first, from, count * sizeof(T), cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
  }

 private:
  T* data_ = nullptr;
};

// As many blocks as the device holds at once, or as there is work for.
template <class Kernel>
unsigned blocks_for(Kernel kernel, size_t work) {
  int device = 0, processors = 0, each = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const size_t held = static_cast<size_t>(processors) * static_cast<size_t>(each > 0 ? each : 1);
  return static_cast<unsigned>(work < held ? (work > 0 ? work : 1) : held);
}

template <class T>
class Device final : public CudaOptimizer {
 public:
  Device(RuleId rule, RuleOptions options, const std::vector<Row>& rows, const std::vector<Chunk>& chunks, int device)
      : rule_(rule),
        options_(options),
        device_(device),
        chunk_count_(chunks.size()),
        rows_(rows),
        chunks_(chunks),
        scalars_(rows.size() * kMaxScalars),
        sums_(2 * chunks.size()),
        numbers_(1),
        decision_(1) {
    std::memset(&known_, 0xff, sizeof(known_));
    with_rule(rule, [&](auto functor) {
      using Rule = decltype(functor);
      update_blocks_ = blocks_for(update<Rule, T>, chunk_count_);
      measure_blocks_ = blocks_for(measure<Rule, T>, chunk_count_);
    });
    square_blocks_ = blocks_for(square, chunk_count_);
  }

  void step(const StepNumbers& numbers, const std::vector<Row>& rows, size_t from, size_t to, void* stream) override {
    const OnDevice here(device_);
    auto* queue = static_cast<cudaStream_t>(stream);
    last_stream_ = queue;
    if (to > from) rows_.put(&rows[from], from, to - from, queue);
    if (std::memcmp(&numbers, &known_, sizeof(known_)) != 0) {
      known_ = numbers;
      numbers_.put(&known_, 0, 1, queue);
    }
    const size_t summed = numbers.check != 0 ? chunk_count_ : 0;
    if (summed > 0) square<<<square_blocks_, kThreads, 0, queue>>>(rows_.get(), chunks_.get(), chunk_count_, sums_.get());
    decide<<<1, kThreads, 0, queue>>>(numbers_.get(), options_.maximize, sums_.get(), summed, decision_.get());
    if (!rows.empty()) with_rule(rule_, [&](auto functor) { queue_rule(functor, rows.size(), queue); });
    check(cudaGetLastError(), "launch of an optimizer step");
  }

  OptimizerResult result() override {
    const OnDevice here(device_);
    Decision decision{};
    check(cudaMemcpyAsync(&decision, decision_.get(), sizeof(decision), cudaMemcpyDeviceToHost, last_stream_),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(last_stream_), "cudaStreamSynchronize");
    OptimizerResult result;
    result.norm = decision.norm;
    result.skipped = decision.skip != 0;
    return result;
  }

 private:
  template <class Rule>
  void queue_rule(Rule, size_t rows, cudaStream_t queue) {
    const auto row_blocks = static_cast<unsigned>((rows + kThreads - 1) / kThreads);
    prepare<Rule>
        <<<row_blocks, kThreads, 0, queue>>>(rows_.get(), rows, numbers_.get(), decision_.get(), options_, scalars_.get());
    if (Rule::kNorms) {
      measure<Rule, T><<<measure_blocks_, kThreads, 0, queue>>>(rows_.get(), chunks_.get(), chunk_count_, decision_.get(),
                                                                scalars_.get(), sums_.get());
      const auto adapt_blocks = static_cast<unsigned>(rows < 65535 ? rows : 65535);
      adapt<Rule><<<adapt_blocks, kThreads, 0, queue>>>(rows_.get(), rows, decision_.get(), sums_.get(), scalars_.get());
    }
    update<Rule, T><<<update_blocks_, kThreads, 0, queue>>>(rows_.get(), chunks_.get(), chunk_count_, decision_.get(),
                                                            numbers_.get(), options_, scalars_.get());
  }

  RuleId rule_;
  RuleOptions options_;
  int device_;
  size_t chunk_count_;
  unsigned update_blocks_ = 1, measure_blocks_ = 1, square_blocks_ = 1;
  DeviceArray<Row> rows_;
  DeviceArray<Chunk> chunks_;
  DeviceArray<double> scalars_, sums_;
  DeviceArray<StepNumbers> numbers_;
  DeviceArray<Decision> decision_;
  StepNumbers known_;
  cudaStream_t last_stream_ = nullptr;
};

}  // namespace

std::unique_ptr<CudaOptimizer> make_cuda_optimizer(RuleId rule, RuleOptions options, const std::vector<Row>& rows,
                                                   const std::vector<Chunk>& chunks, int device) {
  const OnDevice here(device);
  if (!rows.empty() && rows[0].streams[kWeight].dtype == DType::Float64)
    return std::make_unique<Device<double>>(rule, options, rows, chunks, device);
  return std::make_unique<Device<float>>(rule, options, rows, chunks, device);
}

double cuda_sum_of_squares(const std::vector<Row>& rows, const std::vector<Chunk>& chunks, int device, void* stream) {
  const OnDevice here(device);
  auto* queue = static_cast<cudaStream_t>(stream);
  const DeviceArray<Row> table(rows);
  const DeviceArray<Chunk> parts(chunks);
  const DeviceArray<double> sums(chunks.size());
  square<<<blocks_for(square, chunks.size()), kThreads, 0, queue>>>(table.get(), parts.get(), chunks.size(), sums.get());
  check(cudaGetLastError(), "launch of square");
  std::vector<double> all(chunks.size());
  check(cudaMemcpyAsync(all.data(), sums.get(), all.size() * sizeof(double), cudaMemcpyDeviceToHost, queue), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(queue), "cudaStreamSynchronize");
  double sum = 0;
  for (const double one : all) sum += one;
  return sum;
}

void cuda_scale_all(const std::vector<Row>& rows, const std::vector<Chunk>& chunks, double factor, int device, void* stream) {
  const OnDevice here(device);
  auto* queue = static_cast<cudaStream_t>(stream);
  const DeviceArray<Row> table(rows);
  const DeviceArray<Chunk> parts(chunks);
  scale<<<blocks_for(scale, chunks.size()), kThreads, 0, queue>>>(table.get(), parts.get(), chunks.size(), factor);
  check(cudaGetLastError(), "launch of scale");
  check(cudaStreamSynchronize(queue), "cudaStreamSynchronize");  // before the tables go
}

}  // namespace roundel::kernels
