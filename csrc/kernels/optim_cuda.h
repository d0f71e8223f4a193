// The part of a plan that lives on a GPU; optim_cuda.cu, or no_cuda.cc in a build without CUDA.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "kernels/optim_table.h"

namespace roundel::kernels {

class CudaOptimizer {
 public:
  virtual ~CudaOptimizer() = default;
  // Queues one step. Rows [from, to) have gradients that the device does not know yet. Nothing here waits for the device, and
  // nothing but changed rows and changed numbers is copied to it: captured in a graph, a step can be replayed as it is.
  virtual void step(const StepNumbers& numbers, const std::vector<Row>& rows, size_t from, size_t to, void* stream) = 0;
  virtual OptimizerResult result() = 0;  // of the last step; waits
};

// Throws Error where there is no CUDA.
std::unique_ptr<CudaOptimizer> make_cuda_optimizer(RuleId rule, RuleOptions options, const std::vector<Row>& rows,
                                                   const std::vector<Chunk>& chunks, int device);

// As sum_of_squares() and scale_all(), of tensors on one device: row r's gradient stream is the tensor.
double cuda_sum_of_squares(const std::vector<Row>& rows, const std::vector<Chunk>& chunks, int device, void* stream);
void cuda_scale_all(const std::vector<Row>& rows, const std::vector<Chunk>& chunks, double factor, int device, void* stream);

}  // namespace roundel::kernels
