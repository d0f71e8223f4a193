// What the parts of roundel_gpu_check share.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "base/error.h"

namespace roundel::test {

inline void must(cudaError_t status) {
  if (status != cudaSuccess) throw Error(std::string("CUDA: ") + cudaGetErrorString(status));
}

class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes) { must(cudaMalloc(&data_, bytes)); }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

template <class Launch>
double best_seconds(Launch launch) {
  cudaEvent_t start, stop;
  must(cudaEventCreate(&start));
  must(cudaEventCreate(&stop));
  float best = 1e30f;
  for (int i = 0; i < 20; ++i) {
    must(cudaEventRecord(start));
    launch();
    must(cudaEventRecord(stop));
    must(cudaEventSynchronize(stop));
    float milliseconds = 0;
    must(cudaEventElapsedTime(&milliseconds, start, stop));
    best = std::min(best, milliseconds);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  return best * 1e-3;
}

// gpu_check_optim.cu
void check_optimizers();
void write_optimizer_timings(const char* path, const char* device);

}  // namespace roundel::test
